"""Deformable attention and Deformable DETR.

The operator and its modules need torch and numpy alone; the detector is imported when it is asked
for, and with it what it needs.
"""

from importlib import import_module
from typing import Any

from deformable_detr.attention import DeformAttn, MSDeformAttn, Sampling
from deformable_detr.backend import BackendError
from deformable_detr.ops import backends, ms_deform_attn
from deformable_detr.postprocess import postprocess
from deformable_detr.structures import Batch, Detections, Output, Target

__all__ = [
    "BackendError",
    "Batch",
    "DeformAttn",
    "DeformableDETR",
    "DeformableDETRConfig",
    "Detections",
    "MSDeformAttn",
    "Output",
    "Sampling",
    "Target",
    "backends",
    "ms_deform_attn",
    "postprocess",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("deformable_detr.detector"), name)
