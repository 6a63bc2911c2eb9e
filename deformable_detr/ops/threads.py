"""The GPU's kernel on a CPU, slowly: every CUDA thread is a thread of the operating system.

kernels/cuda_threads.cpp supplies CUDA's words, and the macros are those of a GPU: several lanes to
a head, shuffles, shared memory, atomic additions. For tests and for chapters cuda_kernel and
making_it_fast, which trace this build and watch a race in it; `deformable_detr.ops.dispatch` never
picks it.
"""

import ctypes
import os
import re
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deformable_detr.ops import cuda
from deformable_detr.ops.build import build
from deformable_detr.ops.checks import check_sizes
from deformable_detr.ops.cpu import levels, pointers

SOURCE = "cuda_threads.cpp"
FLAGS = ("-std=c++20", "-O1", "-g")
ACCESS = np.dtype(
    [("address", "u8"), ("block", "i4"), ("thread", "i4"), ("bytes", "i4"), ("kind", "S1")],
    align=True,
)
TRACE = np.dtype(
    [
        ("block", "i4"),
        ("thread", "i4"),
        ("array", "U11"),
        ("offset", "i8"),
        ("bytes", "i4"),
        ("kind", "U1"),
    ]
)


class Races(NamedTuple):
    """What ThreadSanitizer said, "" where it found nothing, and the sums that came out."""

    report: str
    sums: list[int]
    expected: int  # each of the sums, without a race


class NoSanitizerError(RuntimeError):
    """ThreadSanitizer does not work on this machine."""


def forward(
    value: Tensor,
    shapes: list[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    *,
    groups: int | None = None,
    huge: bool = False,
    seed: int = 0,
) -> Tensor:
    """The operator, as `deformable_detr.ops.cuda.forward` but on the CPU.

    value: also float16 and bfloat16; locations and weights float32 then. groups: heads in a block,
    by default the GPU's. huge: offsets of 64 bits. seed: for the order in which blocks run and
    threads start. Returns (B, Q, M * D) in value's dtype.
    """
    value, locations, weights = map(_copy, (value, locations, weights))
    B, _, M, D = value.shape
    output = value.new_empty(B, locations.shape[1], M * D)
    if output.numel():
        points = weights.shape[3] * weights.shape[4]
        library, heads_each = load(value.dtype, D, points, groups, huge)
        arrays = value, locations, weights, output
        _launch(library.launch_forward, _blocks(weights, heads_each), seed, shapes, arrays)
    return output


def backward(
    value: Tensor,
    shapes: list[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    grad_output: Tensor,
    *,
    deterministic: bool = False,
    groups: int | None = None,
    huge: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of value, locations and weights; arguments as in `forward`.

    deterministic: value's gradient is summed in fixed point.
    """
    value, locations, weights, grad_output = map(_copy, (value, locations, weights, grad_output))
    grad_value, scale = cuda.accumulators(value, weights, grad_output, deterministic)
    gradients = grad_value, torch.empty_like(locations), torch.empty_like(weights)
    if value.numel() and weights.numel():
        points = weights.shape[3] * weights.shape[4]
        spec = value.dtype, value.shape[3], points, groups, huge, deterministic
        library, heads_each = load(*spec)
        arrays = value, locations, weights, grad_output, *gradients, scale
        _launch(library.launch_backward, _blocks(weights, heads_each), seed, shapes, arrays)
    if deterministic:
        grad_value = grad_value.double() / scale
    return grad_value.to(value.dtype), *gradients[1:]


def trace(
    value: Tensor,
    shapes: list[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    grad_output: Tensor | None = None,
    *,
    block: int = 0,
    groups: int | None = None,
) -> np.ndarray:
    """What one block's threads touch: in the backward pass where grad_output is given, else in the
    forward pass.

    Arguments as in `backward`. Returns a TRACE array, thread after thread, each in the order of its
    program: array "value", "output", "grad_output" or "grad_value", the first element touched,
    counted from the array's start, and kind "r" (read), "w" (write) or "a" (atomic addition).
    IndexError where there is no such block, and where the kernel touched memory outside all arrays.
    """
    value, locations, weights = map(_copy, (value, locations, weights))
    B, Q, M, L, K = weights.shape
    library, heads_each = load(value.dtype, value.shape[3], L * K, groups, record=True)
    blocks = _blocks(weights, heads_each)
    if block not in blocks:
        raise IndexError(f"block must be in [0, {len(blocks)}), got {block}")
    if grad_output is None:
        output = value.new_empty(B, Q, M * value.shape[3])
        run, others, named = library.launch_forward, (output,), {"output": output}
    else:
        grad_output = _copy(grad_output)
        grad_value, scale = cuda.accumulators(value, weights, grad_output, False)
        rest = torch.empty_like(locations), torch.empty_like(weights), scale
        run, others = library.launch_backward, (grad_output, grad_value, *rest)
        named = {"grad_output": grad_output, "grad_value": grad_value}
    _launch(run, range(block, block + 1), 0, shapes, (value, locations, weights, *others))
    return _named(_take(library), {"value": value, **named})


def races(atomic: bool = True, D: int = 8, points: int = 4) -> Races:
    """The kernel under ThreadSanitizer, forward and backward, on inputs whose sums are known.

    atomic: False replaces the atomic addition by a read and a write. All threads of a block, two
    warps, add to the same pixels; `sums` is value's gradient, a count in each number. Raises
    NoSanitizerError where compiler or system has no ThreadSanitizer.
    """
    macros = cuda.specialise(torch.float32, D, points, False, False, capability=80)
    macros |= {"GROUPS": 64 // int(macros["LANES"]), "PROGRAM": 1}
    if not atomic:
        macros["RACE"] = 1
    try:
        program = build(macros, (*FLAGS, "-fsanitize=thread"), SOURCE, program=True)
    except RuntimeError as error:
        if "tsan" not in str(error) and "fsanitize" not in str(error):
            raise
        raise NoSanitizerError(f"ThreadSanitizer is not installed: {error}") from error
    run = _run_sanitized(program)
    expected, *sums = map(int, run.stdout.split())
    return Races(_first_report(run.stderr), sums, expected)


@cache
def load(
    dtype: torch.dtype,
    D: int,
    points: int,
    groups: int | None = None,
    huge: bool = False,
    deterministic: bool = False,
    record: bool = False,
) -> tuple[ctypes.CDLL, int]:
    """The library, built where it is not yet, and how many heads a block of it takes."""
    macros = cuda.specialise(dtype, D, points, huge, deterministic, capability=80)
    heads_each = groups or int(macros["GROUPS"])
    macros |= {"GROUPS": heads_each} | ({"TRACE": 1} if record else {})
    return ctypes.CDLL(str(build(macros, FLAGS, SOURCE))), heads_each


def _copy(x: Tensor) -> Tensor:
    """Contiguous, and at an address from which 16 bytes can be loaded at once."""
    return x.detach().clone(memory_format=torch.contiguous_format)


def _blocks(weights: Tensor, heads_each: int) -> range:
    """The blocks of a launch: a head for every image, query and head."""
    B, Q, M, _, _ = weights.shape
    return range(-(-B * Q * M // heads_each))


def _launch(
    run: Callable[..., None],
    blocks: range,
    seed: int,
    shapes: list[tuple[int, int]],
    arrays: tuple[Tensor, ...],
) -> None:
    """The kernel for these blocks; arrays: value, locations, weights and what else it takes."""
    value, locations, *others = arrays
    check_sizes(value, locations)
    _, S, M, _ = value.shape
    B, Q, _, _, K, _ = locations.shape
    table = levels(tuple(shapes), K)  # kept until the kernel has run
    run(
        ctypes.c_int(blocks.start),
        ctypes.c_int(blocks.stop),
        ctypes.c_uint(seed),
        *pointers(value, table, locations, *others),
        ctypes.c_longlong(B * Q * M),
        *(ctypes.c_int(n) for n in (S, Q, M)),
    )


def _take(library: ctypes.CDLL) -> np.ndarray:
    """The accesses that the library recorded, as ACCESS."""
    library.take_trace.restype = ctypes.c_longlong
    accesses = np.empty(library.take_trace(None), ACCESS)
    library.take_trace(ctypes.c_void_p(accesses.ctypes.data))
    return accesses


def _named(accesses: np.ndarray, arrays: dict[str, Tensor]) -> np.ndarray:
    """ACCESS to TRACE: addresses as places in arrays."""
    result = np.zeros(len(accesses), TRACE)
    for name in ("block", "thread", "bytes", "kind"):
        result[name] = accesses[name]
    first, last = accesses["address"], accesses["address"] + accesses["bytes"].astype("u8")
    for name, x in arrays.items():
        start, size = x.data_ptr(), x.element_size()
        inside = (first >= start) & (last <= start + x.numel() * size)
        result["array"][inside] = name
        result["offset"][inside] = (first[inside] - start) // size
    outside = int((result["array"] == "").sum())
    if outside:
        raise IndexError(f"{outside} of {len(accesses)} accesses lie outside all arrays")
    return result


def _run_sanitized(program: Path) -> subprocess.CompletedProcess:
    """The program's run; once more at fixed addresses where the sanitizer cannot map its own."""
    frames = "stack_trace_format='    #%n %f %s:%l' strip_path_prefix=kernels/"
    environment = os.environ | {"TSAN_OPTIONS": f"exitcode=66 {frames}"}
    for prefix in ((), ("setarch", "-R")):
        try:
            run = subprocess.run(
                [*prefix, str(program)],
                capture_output=True,
                text=True,
                errors="replace",
                env=environment,
                timeout=300,
            )
        except FileNotFoundError as error:  # no setarch
            raise NoSanitizerError(f"ThreadSanitizer does not run here: {error}") from error
        if run.returncode in (0, 66) and "FATAL" not in run.stderr:
            return run
        if "ThreadSanitizer" not in run.stderr and not prefix:
            raise RuntimeError(f"the kernel ended with {run.returncode}: {run.stderr[-300:]}")
    raise NoSanitizerError(f"ThreadSanitizer does not run here: {run.stderr.strip()[:300]}")


def _first_report(text: str) -> str:
    """The first of the sanitizer's warnings, without the frames of the standard library."""
    found = re.search(r"^WARNING: ThreadSanitizer.*?(?=^=====|\Z)", text, re.MULTILINE | re.DOTALL)
    lines = found[0].splitlines() if found else []
    return "\n".join(x for x in lines if not re.match(r"    #\d+ .*(/|<null>)", x)).strip()
