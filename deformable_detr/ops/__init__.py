"""The operator, multi-scale deformable attention: dispatch, plain PyTorch forms, kernels.

Chapter 5 derives it, chapters 6 and 7 build its kernel.
"""

import deformable_detr.ops.onnx  # noqa: F401, a translation to be registered
from deformable_detr.ops.dispatch import backends, ms_deform_attn
from deformable_detr.ops.errors import BackendError

__all__ = ["BackendError", "backends", "ms_deform_attn"]
