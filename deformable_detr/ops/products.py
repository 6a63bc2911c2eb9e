"""Products of queries with what they sample, without the samples: what weights are made of where
keys decide them. Chapter "Fewer tokens".

The operator is linear in its weights. So its slope along the weight of one sample is the product of
the output's gradient with that sample: the backward pass of the kernel has it, and needs no more
memory than that.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from deformable_detr.ops.checks import check_arguments, real_dtype
from deformable_detr.ops.dispatch import KERNELS, choose, name_of_block
from deformable_detr.ops.reference import sample_levels
from deformable_detr.ops.registration import kernel, kernel_backward
from deformable_detr.ops.sizes import Shapes, SpatialShapes, are_known, check_spatial_shapes
from deformable_detr.ops.transforms import has_tangent


def sampled_products(
    query: Tensor, keys: Tensor, spatial_shapes: SpatialShapes, places: Tensor
) -> Tensor:
    """The dot product of every query with each of its samples of the keys, head by head.

    query: (B, Q, M * D). keys: (B, S, M, D), the L maps one after another. spatial_shapes, places:
    as `ms_deform_attn` has sizes and sampling locations; a sample outside is zero. Backends are
    chosen as there. Returns (B, Q, M, L, K) in float32, or float64 as keys are; differentiable in
    query, keys and places, any number of times. ValueError or TypeError where arguments do not fit
    together.
    """
    shapes = check_spatial_shapes(spatial_shapes)
    check_arguments(keys, shapes, places, places[..., 0])
    B, _, M, D = keys.shape
    if query.shape != (B, places.shape[1], M * D):
        given = tuple(query.shape)
        raise ValueError(f"query must be (B={B}, Q={places.shape[1]}, C={M * D}), got {given}")
    query, places = query.to(keys.dtype), places.to(real_dtype(keys))
    if _needs_plain_operations(shapes, query, keys, places):
        return by_levels(query, keys, shapes, places)
    return by_kernel(query, keys, [size for shape in shapes for size in shape], places)


def _needs_plain_operations(shapes: Shapes, *tensors: Tensor) -> bool:
    """Whether no kernel can run, or what is written down is a program for others."""
    if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export() or torch.compiler.is_exporting():
        return True
    if (
        not are_known(shapes)
        or choose(None, name_of_block(), tensors[0].device.type) not in KERNELS
    ):
        return True
    return not torch.compiler.is_compiling() and has_tangent(*tensors)


def by_levels(query: Tensor, keys: Tensor, shapes: Shapes, places: Tensor) -> Tensor:
    """The same in plain PyTorch, with the samples of one level at a time."""
    B, _, M, D = keys.shape
    real = places.dtype
    asked = query.to(real).view(B, -1, M, 1, 1, D)
    levels = keys.to(real).split([height * width for height, width in shapes], 1)
    products = [
        (sample_levels(level, [shape], places[:, :, :, i : i + 1]) * asked).sum(-1)
        for i, (level, shape) in enumerate(zip(levels, shapes, strict=True))
    ]
    return torch.cat(products, 3)


@torch.library.custom_op("deformable_detr::sampled_products", mutates_args=())
def by_kernel(query: Tensor, keys: Tensor, spatial_shapes: Sequence[int], places: Tensor) -> Tensor:
    """The same by the kernel for the tensors' device; spatial_shapes: H_1, W_1, H_2, ..."""
    weights = torch.zeros_like(places[..., 0])
    query = query.contiguous()
    return kernel_backward(keys, spatial_shapes, places, weights, query)[2]


@by_kernel.register_fake
def _(query: Tensor, keys: Tensor, spatial_shapes: Sequence[int], places: Tensor) -> Tensor:
    return places.new_empty(places.shape[:-1])


def _setup(ctx, inputs: tuple, output: Tensor) -> None:
    query, keys, ctx.shapes, places = inputs
    ctx.save_for_backward(query, keys, places)


def _differentiate(ctx, grad: Tensor) -> tuple:
    """With the products' gradients as weights, the operator sums the samples, which is the query's
    gradient; and its own slopes are those of keys and places."""
    query, keys, places = ctx.saved_tensors
    grad = grad.contiguous()
    grad_query = kernel(keys, ctx.shapes, places, grad)
    grad_keys, grad_places, _ = kernel_backward(keys, ctx.shapes, places, grad, query.contiguous())
    return grad_query, grad_keys, None, grad_places


by_kernel.register_autograd(_differentiate, setup_context=_setup)
