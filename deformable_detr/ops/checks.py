"""What the operator's arguments must be, said in one line where they are not.
Chapter many_scales."""

import torch
from torch import Tensor

from deformable_detr.ops.sizes import Shapes, are_known, quietly

WIDEST = 2**14  # channels: a kernel's thread keeps a head's gradient on its stack
ALL = "value, sampling_locations and attention_weights"


@quietly
def check_arguments(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> None:
    """TypeError or ValueError unless types, shapes, dtypes and devices fit together, as in
    `deformable_detr.ms_deform_attn`."""
    tensors = {"value": value, "sampling_locations": locations, "attention_weights": weights}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    _check_shapes(value, shapes, locations, weights)
    dtypes = [tensor.dtype for tensor in tensors.values()]
    doubles = {dtype == torch.float64 for dtype in dtypes}
    if not all(dtype.is_floating_point for dtype in dtypes) or len(doubles) > 1:
        given = ", ".join(map(str, dtypes))
        raise TypeError(f"{ALL} must be floating, and float64 all or none, got {given}")
    devices = [tensor.device for tensor in tensors.values()]
    if len(set(devices)) > 1:
        raise ValueError(f"{ALL} must be on one device, got {', '.join(map(str, devices))}")


def _check_shapes(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> None:
    if value.ndim != 4:
        raise ValueError(f"value must be (B, S, M, D), got {tuple(value.shape)}")
    B, S, M, _ = value.shape
    total = sum(height * width for height, width in shapes) if are_known(shapes) else S
    if total != S:
        raise ValueError(f"spatial_shapes {shapes} hold {total} tokens, but value has S={S}")
    expected = (B, M, len(shapes), 2)
    if locations.ndim != 6 or (locations.shape[0], *locations.shape[2:4], locations.shape[5]) != (
        expected
    ):
        raise ValueError(
            f"sampling_locations must be (B={B}, Q, M={M}, L={len(shapes)}, K, 2), "
            f"got {tuple(locations.shape)}"
        )
    if locations.shape[4] < 1:
        raise ValueError(f"K must be at least 1, got sampling_locations {tuple(locations.shape)}")
    if weights.shape != locations.shape[:-1]:
        raise ValueError(
            f"attention_weights must be {tuple(locations.shape[:-1])} as (B, Q, M, L, K), "
            f"got {tuple(weights.shape)}"
        )


def real_dtype(value: Tensor) -> torch.dtype:
    """The dtype of coordinates, weights and sums for a value: float64 for its own, else float32."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def check_real(value: Tensor, locations: Tensor, weights: Tensor) -> None:
    """TypeError unless coordinates and weights have the dtype in which a kernel takes them."""
    real = real_dtype(value)
    if not locations.dtype == weights.dtype == real:
        raise TypeError(
            f"sampling_locations and attention_weights must be {real} for the kernel, got "
            f"{locations.dtype} and {weights.dtype}"
        )


def check_sizes(value: Tensor, locations: Tensor) -> None:
    """ValueError where the kernel cannot count so far, whose sizes are ints of 32 bits."""
    _, S, M, D = value.shape
    Q, L, K = locations.shape[1], *locations.shape[3:5]
    if max(S, Q, M, M * D, 2 * L * K) >= 2**31 or D > WIDEST:
        raise ValueError(
            f"the kernel takes S, Q, M * D and 2 * L * K below 2**31 and D up to {WIDEST}, "
            f"got S={S}, Q={Q}, M={M}, D={D}, L={L}, K={K}; backend='reference' takes any"
        )


def check_grad_output(value: Tensor, locations: Tensor, grad_output: Tensor) -> None:
    """ValueError unless the gradient is the output's: (B, Q, M * D), as value is."""
    B, _, M, D = value.shape
    like = (B, locations.shape[1], M * D), value.dtype, value.device
    if (grad_output.shape, grad_output.dtype, grad_output.device) != like:
        given = tuple(grad_output.shape), grad_output.dtype, grad_output.device
        raise ValueError(f"grad_output must be (B, Q, M * D) as value is, {like}, got {given}")
