"""The operator: multi-scale deformable attention without its projections.
Chapter many_scales derives it."""

import torch
from torch import Tensor

from deformable_detr.ops import reference
from deformable_detr.ops.checks import check_arguments, real_dtype
from deformable_detr.ops.dispatch import KERNELS, asked, choose, name_of_block
from deformable_detr.ops.registration import kernel
from deformable_detr.ops.sizes import Shapes, SpatialShapes, are_known, check_spatial_shapes
from deformable_detr.ops.transforms import has_tangent, refuse_transform


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
        and on CUDA L * K <= 512. The kernels take D <= 16384, and S, Q and M * D below 2**31.
    backend: "cuda" and "cpu", the kernel for the tensors' device; "reference", plain PyTorch, on
        any device; "gather", PyTorch without grid_sample, which is also what "reference" does where
        a traced program reads spatial_shapes from a tensor. By default the one that `use_backend`
        names, or else the environment variable DEFORMABLE_DETR_BACKEND. Where nothing does, the
        kernel where `backends()` has it, "gather" inside torch.func's transforms and forward-mode
        derivatives, and "reference" for all else, such as an ONNX export, in which it is one
        GridSample for each level (opset 16 or later).
    Returns (B, Q, M * D) in value's dtype, the heads side by side. Differentiable, any
    number of times, in all three float tensors ("reference" twice only where torch's grid_sample
    is). On a pixel's centre, where the slope jumps, it is the one to the right and below. These may
    mix float32, float16 and bfloat16, as autocast makes them: coordinates, weights and sums are
    float32 inside. float64 goes with float64 only.
    Raises ValueError or TypeError where shapes, dtypes or devices do not fit together, and
    BackendError, a RuntimeError, where a backend is asked for that cannot run.
    """
    shapes = check_spatial_shapes(spatial_shapes)
    check_arguments(value, shapes, sampling_locations, attention_weights)
    tensors = value, sampling_locations, attention_weights
    block, device = name_of_block(), value.device.type
    chosen = choose(backend, block, device)
    if chosen in KERNELS and not torch.compiler.is_compiling() and has_tangent(*tensors):
        forced = asked(backend, block, device)
        if forced:
            refuse_transform(*forced)
        chosen = "gather"
    return _run(chosen, *tensors, shapes)


def _run(
    chosen: str,
    value: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    shapes: Shapes,
) -> Tensor:
    """The chosen backend's output, in value's dtype."""
    real = real_dtype(value)
    locations, weights = sampling_locations.to(real), attention_weights.to(real)
    flat = [size for shape in shapes for size in shape]
    if chosen in KERNELS and are_known(shapes):
        return kernel(value, flat, locations, weights)
    if chosen in KERNELS:
        return kernel(value, [], locations, weights, torch.stack(flat))
    # grid_sample wants maps, whose sizes are numbers
    maps = chosen == "reference" and (are_known(shapes) or torch.jit.is_tracing())
    plain = reference.ms_deform_attn if maps else reference.ms_deform_attn_gather
    return plain(value.to(real), shapes, locations, weights).to(value.dtype)
