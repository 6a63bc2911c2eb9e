"""Pictures as people have them: files, folders, arrays, of 8 or 16 bits, turned or transparent."""

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")

Picture = Path | str | np.ndarray | Image.Image


def find_images(images: Picture | Iterable[Picture]) -> Iterator[tuple[Picture, bool]]:
    """Each picture, and whether it was found in a folder rather than named.

    FileNotFoundError where a path leads nowhere or to a folder without images; TypeError on what is
    no picture.
    """
    if isinstance(images, np.ndarray | Image.Image):
        yield images, False
    elif isinstance(images, Path | str):
        path = Path(images)
        if not path.is_dir():
            if not path.exists():
                raise FileNotFoundError(f"no image at {path}")
            yield path, False
            return
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
        if not files:
            folders = sum(p.is_dir() for p in path.iterdir())
            raise FileNotFoundError(
                f"no image in the folder {path}: expected {', '.join(SUFFIXES)}"
                + f"; its {folders} subfolders are not searched" * bool(folders)
            )
        yield from ((file, True) for file in files)
    elif isinstance(images, Iterable) and not isinstance(images, Tensor | bytes | dict):
        for image in images:
            yield from find_images(image)
    else:
        raise TypeError(
            f"an image must be a path, a numpy array or a PIL image, got {type(images).__name__}"
        )


def read_image(source: Picture) -> Image.Image:
    """An RGB picture, turned as its EXIF says; of 16 bits the upper eight are kept, and what is
    transparent is shown in its own colour, as in training.

    FileNotFoundError and ValueError, in one line, name the file and what is wrong.
    """
    if isinstance(source, np.ndarray):
        return _to_rgb(_from_array(source))
    if isinstance(source, Image.Image):
        return _to_rgb(source)
    try:
        with Image.open(source) as image:
            return _to_rgb(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"no image at {source}") from None
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read image {source}: {error}") from None


def _from_array(pixels: np.ndarray) -> Image.Image:
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    colours = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))
    if not colours or not pixels.size or pixels.dtype not in (np.uint8, np.uint16):
        raise ValueError(
            "an image array must be uint8 or uint16 and (H, W), (H, W, 3) or (H, W, 4), "
            f"got {pixels.dtype} and {pixels.shape}"
        )
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels))


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # convert("RGB") would cut all above 255 off
        pixels = np.asarray(image)
        if image.mode == "F" or pixels.min() < 0 or pixels.max() > 0xFFFF:
            raise ValueError(f"its pixels are {image.mode} of Pillow; expected 8 or 16 bits")
        image = Image.fromarray((pixels.astype(np.uint16) >> 8).astype(np.uint8))
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
