"""Deformable attention and Deformable DETR."""

from deformable_detr.attention import DeformAttn, MSDeformAttn, Sampling
from deformable_detr.detector import DeformableDETR, DeformableDETRConfig
from deformable_detr.ops import backends, ms_deform_attn
from deformable_detr.postprocess import postprocess
from deformable_detr.structures import Batch, Detections, Output, Target

__all__ = [
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
