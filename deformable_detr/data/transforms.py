"""Image transforms with boxes, by torchvision.transforms.v2.
Chapters training and your_own_data."""

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import box_area
from torchvision.transforms import v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, RGB in [0, 1]

SHORT_SIDE = 800  # pixels, of an image as the paper's models are evaluated
SMALLEST_SIDE = 32  # pixels, of an image that may be asked for: one cell at the largest stride
LONGEST_SIDE = 16384  # pixels, of an image before a crop; only of those 27 times as long as wide
TO_TENSOR = v2.Compose(
    [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
)


def coco_train_transform(short: int = SHORT_SIDE) -> v2.Transform:
    """The training recipe of DETR and Deformable DETR: mirror, then either a random short side or
    a random crop between two resizings; no side over 1333.

    These are its sizes at short = 800; all are in proportion to it.
    """

    def scaled(*sizes: int) -> list[int]:
        return [round(size * short / SHORT_SIDE) for size in sizes]

    resize = RandomShortSide(scaled(*range(480, 801, 32)), *scaled(1333))
    crop = v2.Compose(
        [RandomShortSide(scaled(400, 500, 600)), RandomSizeCrop(*scaled(384, 600)), resize]
    )
    return v2.Compose([v2.RandomHorizontalFlip(), v2.RandomChoice([resize, crop]), TO_TENSOR])


def coco_eval_transform(short: int = SHORT_SIDE) -> v2.Transform:
    """Resize to a shorter side of `short` pixels, the longer at most 1333 / 800 times it, about."""
    longest = round(1333 * short / SHORT_SIDE)
    return v2.Compose([RandomShortSide([short], max_size=longest), TO_TENSOR])


def strong_train_transform(short: int = SHORT_SIDE) -> v2.Transform:
    """COCO's, after other colours and, in three of ten cases, a picture set on a larger black one:
    with few images each must look different every time."""
    zoom_out = v2.RandomZoomOut(side_range=(1.0, 2.0), p=0.3)
    return v2.Compose([v2.RandomPhotometricDistort(), zoom_out, coco_train_transform(short)])


def digits_train_transform(short: int | None = None) -> v2.Transform:
    """For small pictures of things that must not be mirrored: zoom in or out, other colours.

    The size stays as it is, if it is large enough, or else gets a shorter side of `short` pixels,
    as in `coco_eval_transform`. Boxes of which less than half is left after a crop are dropped.
    """
    longest = round(1333 * (short or SHORT_SIDE) / SHORT_SIDE)
    return v2.Compose(
        [
            RandomShortSide([short], longest) if short else LargeEnough(),
            v2.RandomChoice([RandomZoom(0.7, 1.4), v2.Identity()], p=[0.3, 0.7]),
            v2.RandomChannelPermutation(),
            v2.RandomInvert(0.5),
            v2.ColorJitter(brightness=0.2, contrast=0.2),
            TO_TENSOR,
        ]
    )


def digits_eval_transform() -> v2.Transform:
    """The picture as it is, if it is large enough."""
    return v2.Compose([LargeEnough(), TO_TENSOR])


class RandomShortSide(v2.Transform):
    """Resize to a shorter side drawn from `sides`, the longer at most `max_size`, or a pixel or two
    more: it rounds as the official code does. v2.RandomShortestSize gives some sizes one less.

    Where the shorter side would come below a pixel, or the longer above LONGEST_SIDE, the image is
    squeezed, so that a line of 20,000 x 1 does not become millions of pixels long.
    """

    def __init__(self, sides: list[int], max_size: int | None = None) -> None:
        super().__init__()
        self.sides, self.max_size = sides, max_size

    def make_params(self, flat_inputs: list) -> dict:
        """The new size of these inputs."""
        height, width = v2.functional.get_size(flat_inputs[0])
        short, long = sorted((height, width))
        side = self.sides[draw(0, len(self.sides) - 1)]
        if self.max_size is not None and long / short * side > self.max_size:
            side = max(1, round(self.max_size * short / long))
        limit = self.max_size if self.max_size is not None and side == 1 else LONGEST_SIDE
        other = min(int(side * long / short), limit)
        return {"size": [other, side] if width < height else [side, other]}

    def transform(self, inpt: object, params: dict) -> object:
        """Resize one of them."""
        return self._call_kernel(v2.functional.resize, inpt, **params)


class LargeEnough(v2.Transform):
    """Enlarge an image that is smaller than SMALLEST_SIDE both ways, until its longer side is that:
    a feature map of a single cell has no variance to normalise by."""

    def make_params(self, flat_inputs: list) -> dict:
        """The size of these inputs, or None where it stays."""
        size = v2.functional.get_size(flat_inputs[0])
        scale = SMALLEST_SIDE / max(size)
        return {"size": [max(1, round(side * scale)) for side in size] if scale > 1 else None}

    def transform(self, inpt: object, params: dict) -> object:
        """Resize one of them."""
        if params["size"] is None:
            return inpt
        return self._call_kernel(v2.functional.resize, inpt, **params)


class RandomSizeCrop(v2.Transform):
    """A crop whose width and height are drawn from [smallest, largest], or the image's if less."""

    def __init__(self, smallest: int, largest: int) -> None:
        super().__init__()
        self.smallest, self.largest = smallest, largest

    def make_params(self, flat_inputs: list) -> dict:
        """Where to crop these inputs."""
        size = v2.functional.get_size(flat_inputs[0])
        height, width = (draw(min(self.smallest, n), min(n, self.largest)) for n in size)
        top, left = draw(0, size[0] - height), draw(0, size[1] - width)
        return {"top": top, "left": left, "height": height, "width": width}

    def transform(self, inpt: object, params: dict) -> object:
        """Crop one of them."""
        return self._call_kernel(v2.functional.crop, inpt, **params)


class RandomZoom(v2.Transform):
    """Enlarge and cut out, or shrink and set on black, at a random place; the size stays.

    Scales are uniform in [smallest, largest]. A box that keeps less than half of its area is
    emptied, for the data set to drop.
    """

    def __init__(self, smallest: float, largest: float) -> None:
        super().__init__()
        self.smallest, self.largest = smallest, largest

    def make_params(self, flat_inputs: list) -> dict:
        """How to zoom these inputs."""
        height, width = v2.functional.get_size(flat_inputs[0])
        scale = self.smallest + (self.largest - self.smallest) * torch.rand(()).item()
        size = round(height * scale), round(width * scale)
        top = draw(min(0, size[0] - height), max(0, size[0] - height))
        left = draw(min(0, size[1] - width), max(0, size[1] - width))
        return {"size": size, "top": top, "left": left, "height": height, "width": width}

    def transform(self, inpt: object, params: dict) -> object:
        """Zoom one of them."""
        crop = {name: params[name] for name in ("top", "left", "height", "width")}
        if not isinstance(inpt, tv_tensors.BoundingBoxes):
            inpt = self._call_kernel(v2.functional.resize, inpt, size=list(params["size"]))
            return self._call_kernel(v2.functional.crop, inpt, **crop)
        whole = v2.functional.resize(inpt, size=list(params["size"]))
        offset = whole.new_tensor([params["left"], params["top"]] * 2)
        limit = whole.new_tensor([params["width"], params["height"]] * 2)
        cut = (whole.as_subclass(Tensor) - offset).clamp(min=0).minimum(limit)
        cut = cut * (box_area(cut) >= 0.5 * box_area(whole)).unsqueeze(-1)
        return tv_tensors.BoundingBoxes(
            cut, format="XYXY", canvas_size=(params["height"], params["width"])
        )


def draw(low: int, high: int) -> int:
    """A random integer in [low, high]."""
    return int(torch.randint(low, high + 1, ()).item())
