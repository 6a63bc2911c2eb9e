"""The operator: multi-scale deformable attention without its projections. Chapter 5 derives it,
chapters 6 and 7 build its kernel."""

import os
import warnings
from collections.abc import Sequence
from functools import cache
from typing import NoReturn

import torch
from torch import Tensor

from deformable_detr.ops import cpu, cuda, reference
from deformable_detr.ops.errors import BackendError
from deformable_detr.ops.sizes import (
    Shapes,
    SpatialShapes,
    are_known,
    check_spatial_shapes,
    quietly,
)

KERNELS = {"cuda": cuda, "cpu": cpu}  # by the tensors' device
BACKENDS = ("cuda", "cpu", "reference", "gather")
VARIABLE = "DEFORMABLE_DETR_BACKEND"


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    backend: str | None = None,
) -> Tensor:
    """Sample K points on each of L levels for every query and head, and sum them by weight.

    The inner sums of Eq. 3 in "Deformable DETR" (Zhu et al., 2021).

    value: (B, S, M, D), the L maps one after another, each flattened row by row;
        S = sum(H_l * W_l). Must be finite: a sample outside still multiplies a pixel, by zero.
    spatial_shapes: L pairs (H_l, W_l), or an integer tensor (L, 2), also under torch.compile and
        torch.export, where its numbers are read when the program runs. Pairs spare a GPU the wait
        for them.
    sampling_locations: (B, Q, M, L, K, 2) as (x, y), normalised: (0, 0) is the top-left corner of
        the top-left pixel, (1, 1) the bottom-right corner of the bottom-right one. Samples outside
        a map count as zero, also where the coordinate is NaN or infinite.
    attention_weights: (B, Q, M, L, K), usually a softmax over the last two axes together. K >= 1,
        and on CUDA L * K <= 512.
    backend: "cuda" and "cpu", the kernel for the tensors' device; "reference", plain PyTorch, on
        any device; "gather", PyTorch without grid_sample. By default, or where the environment
        variable DEFORMABLE_DETR_BACKEND names one, that one; else the kernel where `backends()` has
        it, "gather" inside torch.func's transforms and forward-mode derivatives, and "reference"
        for all else, such as an ONNX export, in which it is one GridSample for each level (opset 16
        or later).
    Returns (B, Q, M * D) in value's dtype, the heads side by side. Differentiable, any
    number of times, in all three float tensors ("reference" twice only where torch's grid_sample
    is). These may mix float32, float16 and bfloat16, as autocast makes them: coordinates, weights
    and sums are float32 inside. float64 goes with float64 only.
    Raises ValueError or TypeError where shapes, dtypes or devices do not fit together, and
    BackendError, a RuntimeError, where a backend is asked for that cannot run.
    """
    shapes = check_spatial_shapes(spatial_shapes)
    _check(value, shapes, sampling_locations, attention_weights)
    chosen = _choose(backend, value.device.type)
    tensors = value, sampling_locations, attention_weights
    if chosen in KERNELS and not torch.compiler.is_compiling() and _has_tangent(*tensors):
        if backend or os.environ.get(VARIABLE):
            _refuse_transform(chosen, "backend" if backend else VARIABLE)
        chosen = "gather"
    real = torch.float64 if value.dtype == torch.float64 else torch.float32
    locations, weights = sampling_locations.to(real), attention_weights.to(real)
    flat = [size for shape in shapes for size in shape]
    if chosen in KERNELS and are_known(shapes):
        return _kernel(value, flat, locations, weights)
    if chosen in KERNELS:
        return _kernel(value, [], locations, weights, torch.stack(flat))
    # grid_sample wants maps, whose sizes are numbers
    maps = chosen == "reference" and (are_known(shapes) or torch.jit.is_tracing())
    plain = reference.ms_deform_attn if maps else reference.ms_deform_attn_gather
    return plain(value.to(real), shapes, locations, weights).to(value.dtype)


def backends() -> dict[str, str]:
    """Each backend's name with "available", or with what it lacks here."""
    reasons = {name: module.why_not() for name, module in KERNELS.items()}
    return {name: reasons.get(name) or "available" for name in BACKENDS}


def _choose(backend: str | None, device: str) -> str:
    """The backend for tensors on this device."""
    asked = backend or (os.environ.get(VARIABLE) if device != "meta" else None)
    if asked:
        return _forced(asked, device, "backend" if backend else VARIABLE)
    if _transformed():
        return "gather"
    if device == "meta" or torch.onnx.is_in_onnx_export():
        return "reference"
    reason = KERNELS[device].why_not() if device in KERNELS else f"no kernel for {device}"
    if reason:
        _say_once(f"ms_deform_attn runs in plain PyTorch, which is slow: {reason}")
        return "reference"
    return device


def _forced(name: str, device: str, origin: str) -> str:
    """This backend, or an error where it cannot run: never another in its place."""
    if name not in BACKENDS:
        raise ValueError(f"{origin} must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name in KERNELS and device != name:
        raise BackendError(f"{origin} {name!r} needs tensors on {name}, got {device}")
    if name in KERNELS and KERNELS[name].why_not():
        raise BackendError(f"{origin} {name!r} is not available: {KERNELS[name].why_not()}")
    if name in KERNELS and _transformed():
        _refuse_transform(name, origin)
    return name


def _transformed() -> bool:
    """Whether one of torch.func's transforms is at work, which plain operations alone know."""
    functorch = torch._C._functorch
    stack = functorch.get_interpreter_stack() or ()
    return any(level.key() != functorch.TransformType.Functionalize for level in stack)


def _has_tangent(*tensors: Tensor) -> bool:
    """Whether a forward-mode derivative is under way."""
    forward_ad = torch.autograd.forward_ad
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def _refuse_transform(name: str, origin: str = "backend") -> NoReturn:
    raise BackendError(
        f"{origin} {name!r} has neither forward-mode derivatives nor torch.func's transforms; "
        "'gather' has"
    )


# what torch.compiler.assume_constant_result sets, without the two seconds that importing it takes
_choose._dynamo_marked_constant = True


@cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


@quietly
def _check(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> None:
    tensors = {"value": value, "sampling_locations": locations, "attention_weights": weights}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
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
    dtypes = [value.dtype, locations.dtype, weights.dtype]
    doubles = {dtype == torch.float64 for dtype in dtypes}
    if not all(dtype.is_floating_point for dtype in dtypes) or len(doubles) > 1:
        raise TypeError(
            "value, sampling_locations and attention_weights must be floating, and float64 all or "
            f"none, got {', '.join(map(str, dtypes))}"
        )
    devices = [value.device, locations.device, weights.device]
    if len(set(devices)) > 1:
        raise ValueError(
            "value, sampling_locations and attention_weights must be on one device, got "
            + ", ".join(map(str, devices))
        )


# The kernel as PyTorch knows it: an operator with a fake form for torch.compile, and autograd.


# hidden: the sizes as a tensor (2 * L,), where they are known only when the program runs.


@torch.library.custom_op("deformable_detr::ms_deform_attn", mutates_args=())
def _kernel(
    value: Tensor,
    spatial_shapes: Sequence[int],
    locations: Tensor,
    weights: Tensor,
    hidden: Tensor | None = None,
) -> Tensor:
    shapes = _checked(value, spatial_shapes, locations, weights, hidden)
    if value.is_cuda:
        return cuda.forward(value, shapes, locations, weights)
    wide = value.to(locations.dtype)
    return cpu.forward(wide, shapes, locations, weights).to(value.dtype)


@torch.library.custom_op("deformable_detr::ms_deform_attn_backward", mutates_args=())
def _kernel_backward(
    value: Tensor,
    spatial_shapes: Sequence[int],
    locations: Tensor,
    weights: Tensor,
    grad_output: Tensor,
    hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = _checked(value, spatial_shapes, locations, weights, hidden)
    B, _, M, D = value.shape
    like = (B, locations.shape[1], M * D), value.dtype, value.device
    if (grad_output.shape, grad_output.dtype, grad_output.device) != like:
        raise ValueError(
            f"grad_output must be (B, Q, M * D) as value is, {like}, got "
            f"{(tuple(grad_output.shape), grad_output.dtype, grad_output.device)}"
        )
    if value.is_cuda:
        return cuda.backward(value, shapes, locations, weights, grad_output)
    wide = value.to(locations.dtype), grad_output.to(locations.dtype)
    grad_value, *others = cpu.backward(wide[0], shapes, locations, weights, wide[1])
    return grad_value.to(value.dtype), *others


def _checked(
    value: Tensor, flat: Sequence[int], locations: Tensor, weights: Tensor, hidden: Tensor | None
) -> list[tuple[int, int]]:
    """The levels' sizes, of arguments that a traced program may have brought here by itself."""
    shapes = check_spatial_shapes(_pairs(flat if hidden is None else hidden.tolist()))
    _check(value, shapes, locations, weights)
    real = torch.float64 if value.dtype == torch.float64 else torch.float32
    if not locations.dtype == weights.dtype == real:
        raise TypeError(
            f"sampling_locations and attention_weights must be {real} for the kernel, got "
            f"{locations.dtype} and {weights.dtype}"
        )
    if _has_tangent(value, locations, weights):
        _refuse_transform(value.device.type)
    return shapes


def _pairs(flat: Sequence[int | Tensor]) -> Shapes:
    return list(zip(flat[::2], flat[1::2], strict=True))


@_kernel.register_fake
def _fake(
    value: Tensor,
    spatial_shapes: Sequence[int],
    locations: Tensor,
    weights: Tensor,
    hidden: Tensor | None = None,
) -> Tensor:
    B, _, M, D = value.shape
    return value.new_empty(B, locations.shape[1], M * D)


@_kernel_backward.register_fake
def _(
    value: Tensor,
    spatial_shapes: Sequence[int],
    locations: Tensor,
    weights: Tensor,
    grad_output: Tensor,
    hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    # contiguous, as the kernel's are
    return tuple(x.new_empty(x.shape) for x in (value, locations, weights))


def _setup(ctx, inputs: tuple, output: object) -> None:
    value, ctx.shapes, locations, weights, *grad_output, hidden = inputs
    ctx.save_for_backward(value, locations, weights, *grad_output, hidden)


def _differentiate(ctx, grad_output: Tensor) -> tuple:
    value, locations, weights, hidden = ctx.saved_tensors
    grads = _kernel_backward(
        value, ctx.shapes, locations, weights, grad_output.contiguous(), hidden
    )
    return grads[0], None, *grads[1:], None


def _differentiate_twice(ctx, *grads: Tensor) -> tuple:
    """Through the gather form: its gradients, written as a function, differentiated once more; and
    as often as one likes, where a graph of that is asked for."""
    again = torch.is_grad_enabled()
    *saved, hidden = ctx.saved_tensors
    with torch.enable_grad():
        inputs = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in saved]
        value, locations, weights, grad_output = inputs
        shapes = _pairs(ctx.shapes if hidden is None else hidden.unbind())
        output = reference.ms_deform_attn_gather(
            value.to(locations.dtype), shapes, locations, weights
        )
        first = torch.autograd.grad(
            output, inputs[:3], grad_output.to(output.dtype), create_graph=True
        )
        second = torch.autograd.grad(first, inputs, grads, allow_unused=True, create_graph=again)
    return second[0], None, *second[1:], None


_kernel.register_autograd(_differentiate, setup_context=_setup)
_kernel_backward.register_autograd(_differentiate_twice, setup_context=_setup)
