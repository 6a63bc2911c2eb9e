"""Whether a transform takes boxes to where it takes their pixels, to a fraction of a pixel.
Chapter your_own_data.

A map of coordinates goes through the transform beside the image, and is resized as images are:
between pixels it is interpolated, as they are. What it says of each pixel of the transformed image
is where that one was; flips, crops, sizes, rotations and shears together are one affine map, which
a fit finds.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from deformable_detr.data.coco import CocoDataset
from deformable_detr.data.names import counted, printable

SAMPLES = 5000  # pixels that the fit sees, at most
LIMITS = 1.0, 0.1  # pixels by which a fit may miss one that the next fit shall see
FEW = 0.5  # of the pixels that must lie on the map


class Coordinates(tv_tensors.Mask):
    """(3, H, W): x and y of each pixel's centre, and 1; other numbers than 1 are padding's.

    A mask to every transform, so that none changes its colours, but interpolated between pixels.
    """

    @classmethod
    def of(cls, height: int, width: int) -> "Coordinates":
        """Those of an image of this size."""
        y, x = (torch.arange(side, dtype=torch.float64) + 0.5 for side in (height, width))
        y, x = torch.meshgrid(y, x, indexing="ij")
        return cls(torch.stack([x, y, torch.ones_like(x)]))


def _smoothly(kernel: Callable) -> Callable:
    def call(value: Coordinates, *given: object, **options: object) -> Coordinates:
        options["interpolation"] = InterpolationMode.BILINEAR
        return tv_tensors.wrap(kernel(value.as_subclass(Tensor), *given, **options), like=value)

    return call


for name in ("resize", "resized_crop", "affine", "rotate", "perspective", "elastic"):
    kernel = _smoothly(getattr(functional, f"{name}_image"))
    functional.register_kernel(getattr(functional, name), Coordinates)(kernel)


@dataclass(frozen=True)
class Placement:
    """Where a transform took one box. error: by how many pixels of the transformed image one of its
    sides misses its place; NaN where the transform bends images, so that nobody knows."""

    annotation_id: object
    error: float


def placements(dataset: CocoDataset, index: int) -> Iterator[Placement]:
    """The boxes of an image that a data set's transform leaves; crowds are none. ValueError where
    it leaves other labels than boxes."""
    image_id = dataset.image_ids[index]
    image = dataset.load_image(image_id)
    found = [a for a in dataset.coco.imgToAnns[image_id] if not a["iscrowd"]]
    boxes = torch.tensor([a["bbox"] for a in found], dtype=torch.float32)
    boxes[:, 2:] += boxes[:, :2]  # xywh to xyxy
    size = image.height, image.width
    boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size)
    boxes = functional.clamp_bounding_boxes(boxes)
    given = image, boxes, torch.arange(len(found)), Coordinates.of(*size)
    _, moved, rows, coordinates = dataset.transform(*given)
    if len(moved) != len(rows):
        counts = f"{counted(len(moved), 'box')} and {counted(len(rows), 'label')}"
        text = f"the transform leaves {counts} of image"
        raise ValueError(f"{text} {printable(image_id)}, expected one label for each box")
    boxes, moved, coordinates = (x.as_subclass(Tensor) for x in (boxes, moved, coordinates))
    expected = place(boxes[rows].double(), coordinates.double())
    for row, box, there in zip(rows.tolist(), moved.double(), expected, strict=True):
        if (box[2:] > box[:2]).all():  # others are dropped
            yield Placement(found[row]["id"], (box - there).abs().max().item())


def place(boxes: Tensor, coordinates: Tensor) -> Tensor:
    """Where boxes belong in a transformed image: the smallest boxes around their four corners, cut
    at its borders.

    boxes: (N, 4) xyxy in the original image. coordinates: (3, H, W), transformed. Returns (N, 4)
    float64 xyxy, NaN where no affine map fits.
    """
    there = fit_affine(coordinates)
    if there is None:
        return torch.full_like(boxes, torch.nan)
    x, y = boxes[:, [0, 2, 2, 0]], boxes[:, [1, 1, 3, 3]]
    corners = torch.stack([x, y, torch.ones_like(x)], -1) @ there  # (N, 4, 2)
    height, width = coordinates.shape[-2:]
    limit = corners.new_tensor([width, height])
    return torch.cat([corners.amin(1), corners.amax(1)], -1).clamp(min=0).minimum(limit.repeat(2))


def fit_affine(coordinates: Tensor) -> Tensor | None:
    """(3, 2) T, with (x, y, 1) @ T the place in the transformed image of a point in the original;
    None where no such map fits.

    Fitted again without the pixels that the first fit misses, such as those at borders, where
    interpolation has no neighbours; and again.
    """
    inside = ((coordinates[2] - 1).abs() < 1e-6).nonzero()
    inside = inside[:: max(1, len(inside) // SAMPLES)]
    here = inside.flip(1).double() + 0.5  # (x, y) of centres
    was = coordinates[:, inside[:, 0], inside[:, 1]].t()
    good = torch.ones(len(here), dtype=torch.bool)
    for limit in (*LIMITS, None):
        if good.sum() < max(3, FEW * len(here)):
            return None
        there = torch.linalg.lstsq(was[good], here[good]).solution
        if limit:
            good = (was @ there - here).abs().amax(1) < limit
    return there
