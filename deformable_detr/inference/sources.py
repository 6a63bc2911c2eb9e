"""What people give to be looked at: files, folders, arrays, tensors, bytes, and lists of these.

Chapter your_own_data.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from deformable_detr.data.images import SUFFIXES, read_image, readable_formats
from deformable_detr.data.names import counted

# pictures by their names, which are not read here
UNREAD = (".arw", ".cr2", ".dcm", ".dng", ".exr", ".heic", ".heif", ".jxl", ".nef", ".psd", ".svg")
SEVERAL_FRAMES = (".avif", ".gif", ".png", ".tif", ".tiff", ".webp")  # a file can have

Picture = Path | str | bytes | np.ndarray | Tensor | Image.Image


@dataclass
class Source:
    """A picture, not yet read: a file's path, a file's content, pixels.

    named: whether it was given by itself, and not found in a folder.
    """

    picture: Path | bytes | np.ndarray | Image.Image
    named: bool = True

    @property
    def path(self) -> Path | None:
        """Its file, if it is one."""
        return self.picture if isinstance(self.picture, Path) else None

    def read(self) -> Image.Image:
        """As `read_image` has it; ValueError and FileNotFoundError in one line."""
        return read_image(self.picture)

    def header(self) -> tuple[object, int]:
        """What tells its size from others, as far as it is known without reading it, and its number
        of frames."""
        if isinstance(self.picture, np.ndarray):
            return self.picture.shape[:2], 1
        if isinstance(self.picture, Image.Image):
            return self.picture.size[::-1], 1
        if self.path is None or not self.path.is_file():  # a pipe would wait for ever
            return None, 1
        try:
            with Image.open(self.path, formats=readable_formats()) as image:
                several = self.path.suffix.lower() in SEVERAL_FRAMES
                return image.size[::-1], getattr(image, "n_frames", 1) if several else 1
        except Exception:  # which reading it will say
            return None, 1


def find_sources(images: Picture | Iterable[Picture]) -> Iterator[Source]:
    """Each picture of what was given, in order; those of a folder by name.

    Arrays are uint8, uint16 or floats in [0, 1], (H, W), (H, W, 3) as RGB, (H, W, 4) as RGBA, or N
    of these as (N, H, W, C). Tensors are uint8 or floats in [0, 1], (3, H, W) or (1, H, W), or N of
    these. bytes are a file's. FileNotFoundError where a path leads nowhere or to a folder without
    images; TypeError and ValueError on what is no picture.
    """
    if isinstance(images, Image.Image | bytes):
        yield Source(images)
    elif isinstance(images, np.ndarray | Tensor):
        yield from map(Source, _arrays(images))
    elif isinstance(images, Path | str):
        yield from _files(Path(images))
    elif isinstance(images, Iterable) and not isinstance(images, dict | bytearray | memoryview):
        for image in images:
            yield from find_sources(image)
    else:
        expected = "a path, an array, a tensor, a PIL image or a file's bytes"
        raise TypeError(f"an image must be {expected}, got {type(images).__name__}")


def _files(path: Path) -> Iterator[Source]:
    """A file, or those of a folder whose names are of pictures."""
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"no image at {path}")
        yield Source(path)
        return
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES + UNREAD)
    if not files:
        folders = sum(p.is_dir() for p in path.iterdir())
        raise FileNotFoundError(
            f"no image in the folder {path}: expected {', '.join(SUFFIXES)}"
            + f"; {counted(folders, 'subfolder')} in it not searched" * bool(folders)
        )
    yield from (Source(file, named=False) for file in files)


def _arrays(pixels: np.ndarray | Tensor) -> list[np.ndarray]:
    """uint8 or uint16, with colours last, of one picture or of a stack."""
    if isinstance(pixels, Tensor):
        if pixels.ndim not in (3, 4) or pixels.shape[-3] not in (1, 3):
            expected = "(3, H, W), (1, H, W) or (N, 3, H, W)"
            raise ValueError(f"an image tensor must be {expected}, got {tuple(pixels.shape)}")
        pixels = pixels.detach().movedim(-3, -1).cpu()
        pixels = (pixels.float() if pixels.is_floating_point() else pixels).numpy()
    if pixels.dtype.kind == "f":
        pixels = _from_floats(pixels)
    return list(pixels) if pixels.ndim == 4 else [pixels]


def _from_floats(pixels: np.ndarray) -> np.ndarray:
    """uint8; ValueError outside [0, 1], where numbers could mean anything."""
    if not pixels.size or not (pixels.min() >= 0 and pixels.max() <= 1):
        lowest, highest = (pixels.min(), pixels.max()) if pixels.size else (0, 0)
        raise ValueError(
            f"an image of floats must lie in [0, 1], got {lowest:.3g} to {highest:.3g} in "
            f"{pixels.shape}: convert to uint8, before any normalisation"
        )
    return (pixels * 255).round().astype(np.uint8)


def image_ids(sources: list[Source]) -> list[int | str | None]:
    """An id for each, all numbers or all texts: the number that its file is named after (39769 of
    000000039769.jpg), where all are and no two have the same; else the file's name, with as many
    folders in front as tell files apart. None for what is no file."""
    paths = [source.path for source in sources if source.path]
    stems = {path: path.stem for path in paths}
    if all(stem.isdecimal() for stem in stems.values()):
        stems = {path: int(stem) for path, stem in stems.items()}
        ids = stems if len(set(stems.values())) == len(stems) else distinct_names(paths)
    else:
        ids = distinct_names(paths)
    return [ids[source.path] if source.path else None for source in sources]


def distinct_names(paths: Iterable[Path]) -> dict[Path, str]:
    """The name of each file, with as many folders in front as tell all of them apart."""
    paths = set(paths)
    for depth in range(1, max((len(path.parts) for path in paths), default=0)):
        names = {path: "/".join(path.parts[-depth:]) for path in paths}
        if len(set(names.values())) == len(paths):
            return names
    return {path: path.as_posix() for path in paths}
