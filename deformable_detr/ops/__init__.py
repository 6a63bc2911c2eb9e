"""The operator, multi-scale deformable attention: dispatch, plain PyTorch forms, kernels.

From the bottom: sizes, checks and transforms of its arguments; reference, two forms in plain
PyTorch; build and cache, then cpu and cuda, the kernel; registration, the kernel as PyTorch knows
it; dispatch, which of them runs; operator; products, of queries with samples; uneven, levels with
different numbers of points. threads runs the GPU's kernel on a CPU, to be looked at.
Chapter many_scales derives the operator, chapters cuda_kernel and making_it_fast build its kernel.
"""

import deformable_detr.ops.onnx  # noqa: F401, a translation to be registered
from deformable_detr.ops.dispatch import backends, keep_backend, use_backend
from deformable_detr.ops.errors import BackendError
from deformable_detr.ops.operator import ms_deform_attn
from deformable_detr.ops.products import sampled_products
from deformable_detr.ops.sizes import SpatialShapes, check_spatial_shapes

__all__ = [
    "BackendError",
    "SpatialShapes",
    "backends",
    "check_spatial_shapes",
    "keep_backend",
    "ms_deform_attn",
    "sampled_products",
    "use_backend",
]
