"""What a detector looks at, data first and figures second. Chapter looking.

explain: all of it by one call (asking, explanation). sampling: where deformable attention sampled,
in any model. attention: the weights of dense attention. shared_keys: where DAT's keys are, and how
much they are attended to. gradients: which pixels move a detection.
measures: how much of both lies where. figures, overlays: drawn over the image. page, document: as
one HTML page. pictures: boxes on images, of detections and of data sets.
"""

from typing import Any

__all__ = ["explain"]


def __getattr__(name: str) -> Any:
    """`explain`, imported when it is asked for: whoever draws boxes needs no models."""
    if name != "explain":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from deformable_detr.look.asking import explain

    return explain
