"""Pictures with a class for every pixel, as semantic segmentation has them. The chapter on DAT."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from deformable_detr.data.images import read_image
from deformable_detr.data.names import counted, printable
from deformable_detr.data.places import pictures_in
from deformable_detr.data.transforms import TO_TENSOR

NO_CLASS = 255  # of pixels that nobody gave one: cross_entropy(..., ignore_index=NO_CLASS)


class MaskDataset(Dataset):
    """A folder of pictures, and one of PNG files of the same names and sizes, their masks: 8 bits a
    pixel, its class from 0 on, or 255 where it has none.

    Of the digits, data/digits/train and data/digits/masks/train with 11 classes: 0 is what no digit
    covers. num_classes: with that one. transform: of a picture and its mask, of
    torchvision.transforms.v2. names: of the samples, in order; may be cut. FileNotFoundError where
    a picture or a mask has no partner; ValueError, when a sample is read, for a mask of another
    size or mode and for a class that is not there. In one line, with the file.
    """

    def __init__(
        self,
        images_dir: Path | str,
        masks_dir: Path | str,
        num_classes: int,
        transform: v2.Transform = TO_TENSOR,
    ) -> None:
        if not 1 <= num_classes <= NO_CLASS:
            raise ValueError(f"num_classes must be from 1 to {NO_CLASS}, got {num_classes}")
        self.num_classes, self.transform = num_classes, transform
        self.pictures, self.masks = _by_name(images_dir), _by_name(masks_dir)
        self.names = sorted(self.pictures)
        for name in self.names:
            if name not in self.masks:
                raise FileNotFoundError(f"{self.pictures[name]} has no mask in {masks_dir}")
        if alone := self.masks.keys() - self.pictures.keys():
            raise FileNotFoundError(f"{self.masks[min(alone)]} has no picture in {images_dir}")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """The transformed picture, (3, h, w), and the classes of its pixels, (h, w) int64."""
        name = self.names[index]
        image = read_image(self.pictures[name])
        classes = read_mask(self.masks[name], image.size, self.num_classes)
        image, mask = self.transform(image, tv_tensors.Mask(torch.from_numpy(classes)))
        return image.as_subclass(Tensor), mask.as_subclass(Tensor).long()


def read_mask(path: Path | str, size: tuple[int, int], num_classes: int) -> np.ndarray:
    """The classes in a PNG file, (H, W) uint8. size: (W, H) of its picture. ValueError in one line
    where it is none of 8 bits a pixel, of another size, or has other classes."""
    name = printable(path)
    try:
        with Image.open(path, formats=["PNG"]) as image:
            mode, classes = image.mode, np.array(image)
    except (OSError, ValueError, SyntaxError) as error:  # of Pillow, where a file is cut or no PNG
        raise ValueError(f"cannot read mask {name}: {printable(error)}") from None
    if mode not in ("L", "P"):
        raise ValueError(f"{name} must have 8 bits a pixel, its class, got the mode {mode}")
    if classes.shape[::-1] != size:
        own, others = (f"{w} x {h}" for w, h in (classes.shape[::-1], size))
        raise ValueError(f"{name} must be of its picture's size, {others}, got {own}")
    wrong = (classes >= num_classes) & (classes != NO_CLASS)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ValueError(
            f"{name} has class {classes[row, column]} in row {row} and column {column}, expected 0 "
            f"to {num_classes - 1}, or {NO_CLASS} for none"
        )
    return classes


def _by_name(folder: Path | str) -> dict[str, Path]:
    """The pictures right in a folder, by their names without suffix."""
    found = defaultdict(list)
    for path in pictures_in(Path(folder)):
        if path.parent == Path(folder):
            found[path.stem].append(path)
    if not found:
        raise FileNotFoundError(f"no pictures in {folder}")
    for name, paths in sorted(found.items()):
        if len(paths) > 1:
            raise ValueError(
                f"{counted(len(paths), 'picture')} in {folder} are called {name}, expected one"
            )
    return {name: path for name, (path,) in found.items()}
