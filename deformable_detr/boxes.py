"""Boxes: cxcywh, normalised to [0, 1], inside the model; xyxy, in pixels, outside it."""

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) centre and size to (..., 4) left, top, right, bottom, in the same units."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """The logit of x in [0, 1], finite at the ends: both x and 1 - x count as at least eps."""
    x = x.clamp(0, 1)
    return (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()
