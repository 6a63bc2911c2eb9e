"""Deformable attention, Deformable DETR, and the family that grew from it.

What is exported is imported when it is asked for, and with it what it needs: the operator and its
modules need torch and numpy alone.
"""

from importlib import import_module
from typing import Any

EXPORTS = {  # name: the module that has it
    "BackendError": "ops",
    "backends": "ops",
    "ms_deform_attn": "ops",
    "use_backend": "ops",
    "DeformAttn": "layers.attention",
    "MSDeformAttn": "layers.attention",
    "Sampling": "layers.attention",
    "Batch": "structures",
    "Detections": "structures",
    "Output": "structures",
    "Target": "structures",
    "DeformableDETR": "models",
    "DeformableDETRConfig": "models",
    "postprocess": "inference.postprocess",
}

__all__ = sorted(EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *EXPORTS]
