"""Large images tile by tile: small objects keep their size, and memory is bounded.
Chapter your_own_data."""

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

from deformable_detr.data.tiles import tile_places
from deformable_detr.structures import Detections

SAME = 0.5  # part of the smaller of two boxes from which, in other tiles, they are one object
EDGE = 0.01  # part of a tile's side: a box that comes so near to its end is cut off there

Look = Callable[[list[Image.Image]], list[Detections]]


def detect_tiles(
    look: Look, image: Image.Image, side: int, batch_size: int = 8, whole: bool = False
) -> Detections:
    """The detections of an image, looked at in tiles of side x side pixels, best first.

    look: gives the detections of some pictures. whole: look at the whole image too, for objects
    that are larger than a tile. What several tiles show is merged as in `merge_tiles`.
    """
    places = tile_places(*image.size, side)
    if whole and len(places) > 1:
        places.append((0, 0, *image.size))
    parts, cut = [], []
    for start in range(0, len(places), batch_size):
        batch = places[start : start + batch_size]
        for place, found in zip(batch, look([image.crop(each) for each in batch]), strict=True):
            found.boxes = found.boxes + found.boxes.new_tensor([*place[:2], *place[:2]])
            parts.append(found)
            cut.append(_is_cut(found.boxes, place, image.size))
    return merge_tiles(parts, cut)


def merge_tiles(parts: list[Detections], cut: list[Tensor]) -> Detections:
    """All tiles' detections, in pixels of the image, of each object one.

    Of two boxes of a class from two tiles, one of which holds more than SAME of the smaller, one
    stays: that which no tile's end cuts off, and else that of the higher score. Within a tile
    nothing is dropped. cut: (N,) bool for each part.
    """
    found, is_cut = Detections.cat(parts), torch.cat(cut)
    tile = torch.cat([torch.full((len(part),), i) for i, part in enumerate(parts)])
    order = (is_cut.to(found.scores.dtype) - found.scores / 2).argsort(stable=True)
    found, tile = found[order], tile[order]
    areas = (found.boxes[:, 2:] - found.boxes[:, :2]).clamp(min=0).prod(-1)
    stays = torch.ones(len(found), dtype=torch.bool)
    for i in range(len(found)):
        if stays[i]:
            shared = _shared_area(found.boxes[i], found.boxes[i + 1 :])
            same = shared > SAME * areas[i + 1 :].minimum(areas[i])
            other = (tile[i + 1 :] != tile[i]) & (found.labels[i + 1 :] == found.labels[i])
            stays[i + 1 :] &= ~(same & other)
    kept = found[stays]
    return kept[kept.scores.argsort(descending=True, stable=True)]


def _shared_area(box: Tensor, boxes: Tensor) -> Tensor:
    """(N,), of one box, (4,) xyxy, with each of others, (N, 4)."""
    sides = box[2:].minimum(boxes[:, 2:]) - box[:2].maximum(boxes[:, :2])
    return sides.clamp(min=0).prod(-1)


def _is_cut(boxes: Tensor, place: tuple[int, ...], size: tuple[int, int]) -> Tensor:
    """(N,) bool: which boxes reach an end of their tile that is not the image's."""
    x0, y0, x1, y1 = place
    edge = EDGE * max(x1 - x0, y1 - y0)
    left, top, right, bottom = boxes.unbind(-1)
    return (
        ((left < x0 + edge) & (x0 > 0))
        | ((top < y0 + edge) & (y0 > 0))
        | ((right > x1 - edge) & (x1 < size[0]))
        | ((bottom > y1 - edge) & (y1 < size[1]))
    )
