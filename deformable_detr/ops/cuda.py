"""The kernel for NVIDIA GPUs: kernels/ms_deform_attn.cu, which NVRTC builds through CuPy.

Chapter cuda_kernel writes it, chapter making_it_fast makes it fast.
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from deformable_detr.ops.build import sources
from deformable_detr.ops.cpu import NAMES, levels

THREADS = 128  # in a block, at most
SHARED = 48 * 1024  # bytes a block may have without asking
MAX_POINTS = 512


def specialise(
    dtype: torch.dtype, D: int, points: int, huge: bool, deterministic: bool, capability: int
) -> dict[str, str | int]:
    """The kernel's macros: a lane loads 16 bytes where D allows it, and lanes side by side share a
    head. capability: 90 for sm_90. ValueError where a head's points do not fit into shared memory.
    """
    if points > MAX_POINTS:
        raise ValueError(
            f"the CUDA kernel takes L * K <= {MAX_POINTS}, got {points}; "
            "backend='reference' takes any"
        )
    size = dtype.itemsize
    vector = next(v for v in (16 // size, 8, 4, 2, 1) if v * size <= 16 and D % v == 0)
    chunks = D // vector
    lanes = min(32, 1 << (chunks - 1).bit_length())
    real = 8 if dtype == torch.float64 else 4
    offset = 8 if huge else 4
    bytes_each = 4 * points * (real + offset) + max(real, offset)  # Corners of a head
    groups = max(1, min(THREADS // lanes, SHARED // bytes_each))
    macros = {
        "VALUE": NAMES[dtype],
        "REAL": "double" if real == 8 else "float",
        "OFFSET": "long long" if huge else "int",
        "D": D,
        "POINTS": points,
        "VECTOR": vector,
        "VECTORS": min(4, -(-chunks // lanes)),
        "LANES": lanes,
        "GROUPS": groups,
    }
    if deterministic:
        macros["FIXED_POINT"] = 1
    elif capability >= 90 and real == 4 and vector % 4 == 0:
        macros["VECTOR_REDUCTION"] = 1
    return macros


def options(macros: dict[str, str | int]) -> tuple[str, ...]:
    """NVRTC's options for these macros."""
    return ("--std=c++17", *(f"-D{name}={value}" for name, value in macros.items()))


def source() -> str:
    """The kernel's text."""
    return sources().joinpath("ms_deform_attn.cu").read_text("utf-8")


@cache
def why_not() -> str | None:
    """Why this backend cannot run here, or None where it can, which a small build has shown."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if torch.version.cuda is None:
        return "torch is built for another maker's GPUs, not for CUDA"
    try:
        import cupy

        cupy.RawModule(code='extern "C" __global__ void nothing() {}', backend="nvrtc").compile()
    except ModuleNotFoundError:
        return f"CuPy is not installed: pip install cupy-cuda{torch.version.cuda.split('.')[0]}x"
    except Exception as error:  # of CuPy, NVRTC, the driver: each has its own
        return f"CuPy does not work here ({type(error).__name__}: {error})"
    return None


@cache
def load(device: int, dtype: torch.dtype, D: int, points: int, huge: bool, deterministic: bool):
    """The built module for one device, and how many heads a block of it takes."""
    import cupy

    major, minor = torch.cuda.get_device_capability(device)
    macros = specialise(dtype, D, points, huge, deterministic, 10 * major + minor)
    with cupy.cuda.Device(device):
        module = cupy.RawModule(code=source(), options=options(macros), backend="nvrtc")
        module.compile()
    return module, macros["LANES"], macros["GROUPS"]


def forward(
    value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """The operator; arguments are checked, on one GPU, coordinates and weights in float32 (float64
    where value is). Returns (B, Q, M * D) in value's dtype."""
    value, locations, weights = (_aligned(x) for x in (value, locations, weights))
    B, S, M, D = value.shape
    Q, K = locations.shape[1], locations.shape[4]
    output = value.new_empty(B, Q, M * D)
    if output.numel():
        spec = (value.dtype, D, len(shapes) * K, S * M * D >= 2**31, False)
        arrays = value, _levels(shapes, K), locations, weights, output
        _launch("forward", spec, arrays, (B, S, Q, M))
    return output


def backward(
    value: Tensor,
    shapes: list[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    grad_output: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of value, locations and weights; arguments as in `forward`.

    The gradient of value is summed by atomic additions, whose order changes from run to run; under
    torch.use_deterministic_algorithms in fixed point, where it does not matter.
    """
    inputs = value, locations, weights, grad_output
    value, locations, weights, grad_output = (_aligned(x) for x in inputs)
    B, S, M, D = value.shape
    Q, K = locations.shape[1], locations.shape[4]
    fixed = torch.are_deterministic_algorithms_enabled()
    grad_value, scale = accumulators(value, weights, grad_output, fixed)
    make = torch.empty_like if value.numel() else torch.zeros_like
    grad_locations, grad_weights = make(locations), make(weights)
    if value.numel() and weights.numel():
        spec = (value.dtype, D, len(shapes) * K, S * M * D >= 2**31, fixed)
        inputs = value, _levels(shapes, K), locations, weights, grad_output
        gradients = grad_value, grad_locations, grad_weights, scale
        _launch("backward", spec, (*inputs, *gradients), (B, S, Q, M))
    if fixed:
        grad_value = grad_value.double() / scale
    return grad_value.to(value.dtype), grad_locations, grad_weights


def accumulators(
    value: Tensor, weights: Tensor, grad_output: Tensor, fixed: bool
) -> tuple[Tensor, Tensor]:
    """Zeros for the gradient of value, and by what is multiplied what is added there: 1, or in
    fixed point a power of two with which no sum can leave 62 bits."""
    scale = torch.ones((), dtype=torch.float64, device=value.device)
    if fixed and value.numel() and weights.numel():
        limit = grad_output.abs().max().double() * weights.abs().max().double()
        limit = limit * weights[0, :, 0].numel()  # Q * L * K points may add to one pixel
        scale = torch.exp2(61 - limit.clamp(min=1e-280).log2().ceil())
        scale = torch.where(limit.isfinite(), scale, torch.nan)
    return torch.zeros_like(value, dtype=torch.int64 if fixed else weights.dtype), scale


def _levels(shapes: list[tuple[int, int]], K: int) -> np.ndarray:
    """The kernel's struct Levels as one element, which CuPy passes by value."""
    table = levels(tuple(shapes), K).numpy().reshape(-1)
    return table.view(f"V{table.nbytes}")


def _launch(name: str, spec: tuple, arrays: tuple, size: tuple) -> None:
    """One kernel on torch's current stream of the tensors' device."""
    import cupy

    B, S, Q, M = size
    device = arrays[0].device.index
    module, lanes, groups = load(device, *spec)
    items = B * Q * M
    with cupy.cuda.Device(device), _stream(device):
        module.get_function(name)(
            (-(-items // groups),),
            (lanes, groups),
            (
                *(x.data_ptr() if isinstance(x, Tensor) else x for x in arrays),
                np.int64(items),
                np.int32(S),
                np.int32(Q),
                np.int32(M),
            ),
        )


def _stream(device: int):
    """torch's current stream of this device, as CuPy takes it."""
    import cupy

    stream = torch.cuda.current_stream(device)
    if hasattr(cupy.cuda.Stream, "from_external") and hasattr(stream, "__cuda_stream__"):
        return cupy.cuda.Stream.from_external(stream)
    return cupy.cuda.ExternalStream(stream.cuda_stream, device)  # before CuPy 14


def _aligned(x: Tensor) -> Tensor:
    """Contiguous, and at an address from which 16 bytes can be loaded at once."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()
