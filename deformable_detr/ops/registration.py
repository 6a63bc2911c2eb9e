"""The kernel as PyTorch knows it: a registered operator, with a fake form for torch.compile and
derivatives for autograd. Chapters cuda_kernel and making_it_fast build what it calls."""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from deformable_detr.ops import cpu, cuda, reference
from deformable_detr.ops.checks import (
    check_arguments,
    check_grad_output,
    check_real,
    check_sizes,
)
from deformable_detr.ops.sizes import Shapes, check_spatial_shapes
from deformable_detr.ops.transforms import has_tangent, refuse_transform


@torch.library.custom_op("deformable_detr::ms_deform_attn", mutates_args=())
def kernel(
    value: Tensor,
    spatial_shapes: Sequence[int],
    locations: Tensor,
    weights: Tensor,
    hidden: Tensor | None = None,
) -> Tensor:
    """The operator by the kernel for the tensors' device: (B, Q, M * D) in value's dtype.

    spatial_shapes: the levels' sizes in a row, H_1, W_1, H_2, ... hidden: the same as a tensor
    (2 * L,), where they are known only when the program runs. locations and weights: float32, or
    float64 where value is. Arguments are checked here too: a traced program calls this by itself.
    """
    shapes = _checked(value, spatial_shapes, locations, weights, hidden)
    if value.is_cuda:
        return cuda.forward(value, shapes, locations, weights)
    return cpu.forward(value, shapes, locations, weights)


@torch.library.custom_op("deformable_detr::ms_deform_attn_backward", mutates_args=())
def kernel_backward(
    value: Tensor,
    spatial_shapes: Sequence[int],
    locations: Tensor,
    weights: Tensor,
    grad_output: Tensor,
    hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of value, locations and weights; arguments as in `kernel`."""
    shapes = _checked(value, spatial_shapes, locations, weights, hidden)
    check_grad_output(value, locations, grad_output)
    if value.is_cuda:
        return cuda.backward(value, shapes, locations, weights, grad_output)
    return cpu.backward(value, shapes, locations, weights, grad_output)


def pairs(flat: Sequence[int | Tensor]) -> Shapes:
    """H_1, W_1, H_2, ... as (H, W) of each level."""
    return list(zip(flat[::2], flat[1::2], strict=True))


def _checked(
    value: Tensor, flat: Sequence[int], locations: Tensor, weights: Tensor, hidden: Tensor | None
) -> list[tuple[int, int]]:
    """The levels' sizes, of arguments that are checked."""
    shapes = check_spatial_shapes(pairs(flat if hidden is None else hidden.tolist()))
    check_arguments(value, shapes, locations, weights)
    check_real(value, locations, weights)
    check_sizes(value, locations)
    if has_tangent(value, locations, weights):
        refuse_transform(value.device.type)
    return shapes


# Without data: the shapes that come out.


@kernel.register_fake
def fake(
    value: Tensor,
    spatial_shapes: Sequence[int],
    locations: Tensor,
    weights: Tensor,
    hidden: Tensor | None = None,
) -> Tensor:
    """An empty output of `kernel`."""
    _stays_whole_in_inductor()
    B, _, M, D = value.shape
    return value.new_empty(B, locations.shape[1], M * D)


def _stays_whole_in_inductor() -> None:
    """Say to torch.compile, once it is loaded, that it calls the kernel. Where the variable CI is
    set, it refuses to by itself, because `ops.onnx` registers a decomposition."""
    inductor = sys.modules.get("torch._inductor.lowering")
    operator = torch.ops.deformable_detr.ms_deform_attn.default
    if inductor is not None and operator not in inductor.lowerings:
        inductor.make_fallback(operator, warn=False)


@kernel_backward.register_fake
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


# Derivatives.


def _setup(ctx, inputs: tuple, output: object) -> None:
    value, ctx.shapes, locations, weights, *grad_output, hidden = inputs
    ctx.save_for_backward(value, locations, weights, *grad_output, hidden)


def _differentiate(ctx, grad_output: Tensor) -> tuple:
    value, locations, weights, hidden = ctx.saved_tensors
    grads = kernel_backward(value, ctx.shapes, locations, weights, grad_output.contiguous(), hidden)
    return grads[0], None, *grads[1:], None


def _differentiate_twice(ctx, *grads: Tensor) -> tuple:
    """Through the gather form: its gradients, written as a function, differentiated once more; and
    as often as one likes, where a graph of that is asked for."""
    again = torch.is_grad_enabled()
    *saved, hidden = ctx.saved_tensors
    with torch.enable_grad():
        inputs = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in saved]
        value, locations, weights, grad_output = inputs
        shapes = pairs(ctx.shapes if hidden is None else hidden.unbind())
        output = reference.ms_deform_attn_gather(
            value.to(locations.dtype), shapes, locations, weights
        )
        first = torch.autograd.grad(
            output, inputs[:3], grad_output.to(output.dtype), create_graph=True
        )
        second = torch.autograd.grad(first, inputs, grads, allow_unused=True, create_graph=again)
    return second[0], None, *second[1:], None


kernel.register_autograd(_differentiate, setup_context=_setup)
kernel_backward.register_autograd(_differentiate_twice, setup_context=_setup)
