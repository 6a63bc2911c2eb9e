"""Test-time augmentation: detect in several views of an image, and merge what they show.

Table 3 of the paper has it, with scales and flips; the official code has not (issue 34). Boxes of
several views are merged by non-maximum suppression or weighted boxes fusion. They cannot be
averaged query by query: a query finds another object in another view.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

from deformable_detr.data.preparation import DEFAULT, PREPARATIONS
from deformable_detr.data.transforms import SHORT_SIDE, SMALLEST_SIDE
from deformable_detr.structures import Detections

LARGEST_SCALE = 8.0  # of a view
OVERLAP = 0.55  # IoU from which two boxes of a class are one object; of Solovyev et al.


@dataclass(frozen=True)
class View:
    """One way to look at an image: mirrored or not, then transformed to a (3, h, w) tensor."""

    transform: Callable[[Image.Image], Tensor]
    flip: bool = False

    def of(self, image: Image.Image) -> Tensor:
        """What the model sees of it, (3, h, w)."""
        return self.transform(ImageOps.mirror(image) if self.flip else image)

    def back(self, found: Detections, width: int) -> Detections:
        """Detections in this view of an image so many pixels wide, as they lie in the image."""
        if not self.flip:
            return found
        x0, y0, x1, y1 = found.boxes.unbind(-1)
        return replace(found, boxes=torch.stack([width - x1, y0, width - x0, y1], -1))


def make_views(
    transforms: str = DEFAULT,
    scales: tuple[float, ...] = (1.0,),
    flip: bool = False,
    short_side: int = SHORT_SIDE,
) -> list[View]:
    """A view at each scale, and with flip also mirrored.

    transforms: how the model was trained, a name in PREPARATIONS. scales: factors of the
    size at which it is evaluated, above 0 and at most LARGEST_SCALE; that size is short_side, in
    pixels. ValueError where there is none, one is out of range, or makes an image smaller than
    SMALLEST_SIDE.
    """
    if not scales or not all(0 < scale <= LARGEST_SCALE for scale in scales):
        expected = f"one or more numbers above 0 and up to {LARGEST_SCALE:g}"
        raise ValueError(f"scales must be {expected}, got {tuple(scales)}")
    mirrors = (False, True) if flip else (False,)
    prepare = PREPARATIONS[transforms]
    if prepare.resizes and round(short_side * min(scales)) < SMALLEST_SIDE:
        raise ValueError(
            f"the scale {min(scales)} of a short side of {short_side} pixels is below "
            f"{SMALLEST_SIDE} pixels"
        )
    return [
        View(prepare.eval_transform(short_side, scale), mirror)
        for scale in scales
        for mirror in mirrors
    ]


def suppress(views: list[Detections], overlap: float = OVERLAP) -> Detections:
    """Merge by non-maximum suppression: of boxes of one class that overlap by more than `overlap`
    (IoU), the one with the highest score stays, as it is."""
    found = Detections.cat(views)
    return found[batched_nms(found.boxes, found.scores, found.labels, overlap)]


def fuse(views: list[Detections], overlap: float = OVERLAP) -> Detections:
    """Merge by weighted boxes fusion (Solovyev et al., "Weighted boxes fusion", 2019).

    Boxes, best first, join the fused box of their class with which they overlap most, if by more
    than `overlap` (IoU), or else start one. A fused box is its members' mean, weighted by score;
    its score is their mean score times the part of the views that have it, min(T, N) / N for T
    members and N views. Each view's own duplicates are suppressed first, as the paper's detectors
    do: a DETR's low-scored ones would pull that mean down. A fused detection names the query of its
    best member.
    """
    found = Detections.cat([suppress([view], overlap) for view in views])
    order = found.scores.argsort(descending=True, stable=True).tolist()
    fused, classes = torch.zeros_like(found.boxes), torch.zeros_like(found.labels)
    members: list[list[int]] = []
    for i in order:
        overlaps = box_iou(found.boxes[i, None], fused[: len(members)])[0]
        overlaps[classes[: len(members)] != found.labels[i]] = 0
        if len(members) and overlaps.max() > overlap:
            cluster = int(overlaps.argmax())
            members[cluster].append(i)
        else:
            cluster = len(members)
            members.append([i])
            classes[cluster] = found.labels[i]
        weights = found.scores[members[cluster]].clamp(min=1e-12)
        fused[cluster] = weights @ found.boxes[members[cluster]] / weights.sum()
    shares = [found.scores[m].mean() * min(len(m), len(views)) / len(views) for m in members]
    scores = torch.stack(shares) if shares else found.scores
    queries = found.queries[[m[0] for m in members]]
    merged = Detections(scores, classes[: len(members)], fused[: len(members)], queries)
    return merged[scores.argsort(descending=True, stable=True)]


MERGES = {"fusion": fuse, "nms": suppress}
