"""The kernel for the CPU: kernels/ms_deform_attn.cu as a C++ compiler builds it, called by ctypes.

One library for each (dtype, D, L * K). Chapter making_it_fast makes it fast.
"""

import ctypes
import os
import textwrap
from functools import cache, lru_cache

import torch
from torch import Tensor

from deformable_detr.ops.build import build, machine
from deformable_detr.ops.errors import BackendError
from deformable_detr.ops.once import once

NAMES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
}
SMALL = 1 << 18  # channels sampled, below which a second thread costs more than it gives


def forward(
    value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """The operator; arguments are checked, on the CPU, coordinates and weights in float32 (float64
    where value is). Returns (B, Q, M * D) in value's dtype."""
    value, locations, weights = (x.contiguous() for x in (value, locations, weights))
    B, S, M, D = value.shape
    Q, K = locations.shape[1], locations.shape[4]
    output, table = value.new_empty(B, Q, M * D), levels(tuple(shapes), K)
    if output.numel():
        library = load(value.dtype, D, len(shapes) * K, S * M * D >= 2**31)
        done = library.forward(
            *pointers(value, table, locations, weights, output),
            *sizes(B, S, Q, M),
            _threads(weights.numel() * D),
        )
        _memory_sufficed(done)
    return output


def backward(
    value: Tensor,
    shapes: list[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    grad_output: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of value, locations and weights; arguments as in `forward`."""
    inputs = value, locations, weights, grad_output
    value, locations, weights, grad_output = (x.contiguous() for x in inputs)
    B, S, M, D = value.shape
    Q, K = locations.shape[1], locations.shape[4]
    make = torch.empty_like if value.numel() else torch.zeros_like
    gradients, table = [make(x) for x in (value, locations, weights)], levels(tuple(shapes), K)
    if value.numel():
        library = load(value.dtype, D, len(shapes) * K, S * M * D >= 2**31)
        done = library.backward(
            *pointers(value, table, locations, weights, grad_output, *gradients),
            *sizes(B, S, Q, M),
            _threads(weights.numel() * D),
        )
        _memory_sufficed(done)
    return tuple(gradients)


@lru_cache(1024)
def levels(shapes: tuple[tuple[int, int], ...], K: int) -> Tensor:
    """The kernel's struct Levels, for reading: every point's height, width and first token."""
    starts = [sum(h * w for h, w in shapes[:level]) for level in range(len(shapes))]
    rows = [h for h, _ in shapes], [w for _, w in shapes], starts
    return torch.tensor(rows, dtype=torch.int32).repeat_interleave(K, dim=1)


def pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    """The addresses of contiguous tensors, good while the caller holds these."""
    return [ctypes.c_void_p(x.data_ptr()) for x in tensors]


def sizes(B: int, S: int, Q: int, M: int) -> tuple[ctypes.c_longlong | ctypes.c_int, ...]:
    """The kernel's images, tokens, queries and heads."""
    return ctypes.c_longlong(B), ctypes.c_int(S), ctypes.c_int(Q), ctypes.c_int(M)


def _memory_sufficed(done: bool) -> None:
    if not done:
        raise RuntimeError("ms_deform_attn can't allocate memory, or start a thread")


def _threads(work: int) -> ctypes.c_int:
    return ctypes.c_int(1 if work < SMALL else torch.get_num_threads())


@once
def why_not() -> str | None:
    """Why this backend cannot run here, or None where it can, as building the paper's shows."""
    if os.name != "posix":
        return "needs Linux or macOS"
    try:
        load(torch.float32, 32, 16)
    except BackendError as error:
        return textwrap.shorten(str(error), 500)
    return None


@once
def load(dtype: torch.dtype, D: int, points: int, huge: bool = False) -> ctypes.CDLL:
    """The library for one dtype, D channels a head, and L * K points; built where it is not yet.

    huge: offsets of 64 bits. Raises BackendError where the compiler fails, or what is in the cache
    is no library.
    """
    macros = {
        "VALUE": NAMES[dtype],
        "REAL": "double" if dtype == torch.float64 else "float",
        "OFFSET": "long long" if huge else "int",
        "D": D,
        "POINTS": points,
    }
    try:
        library = build(macros, openmp())
    except OSError as error:
        raise BackendError(f"the kernel could not be built: {error}") from None
    try:
        loaded = ctypes.CDLL(str(library))
    except OSError as error:
        raise BackendError(
            f"the built kernel does not load ({error}); remove {library} to build it anew, or set "
            "DEFORMABLE_DETR_CACHE to a folder from which programs may run"
        ) from None
    loaded.forward.restype = loaded.backward.restype = ctypes.c_bool
    return loaded


@cache
def openmp() -> tuple[str, ...]:
    """-fopenmp, where GCC's OpenMP is loaded already, which torch's own threads then mostly run on;
    else nothing.

    With a second one, or threads of its own, the kernel would compete with torch's, which go on
    spinning for some milliseconds after their last work.
    """
    try:
        ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return ()
    return ("-fopenmp",) if "Free Software Foundation" in machine()[0] else ()  # GCC
