"""Pictures as people have them: files, folders, arrays, of 8 or 16 bits, turned or transparent."""

import sys
import warnings
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from deformable_detr.data.names import printable

SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".png", ".ppm"),
    *(".tif", ".tiff", ".webp"),
)
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
ORIENTATION = 0x0112  # the tag of EXIF; 1 is upright

Picture = Path | str | bytes | np.ndarray | Image.Image


@dataclass
class Opened:
    """A picture, RGB, as it is shown.

    bits: of each number that a picture of 16 bits really uses, 8, 12 or 16; 0 of another one.
    stored: its (width, height) before it was turned as its EXIF says. turned: whether it was.
    """

    image: Image.Image
    bits: int
    stored: tuple[int, int]
    turned: bool


def read_image(source: Picture) -> Image.Image:
    """An RGB picture, turned as its EXIF says, and what is transparent shown in its own colour, as
    in training. source: a file's path or its content (bytes), pixels, or a picture.

    Of 16 bits the upper eight are kept; where its numbers end below 256 or 4096, it is one of 8 or
    12 bits, which a warning says once. FileNotFoundError and ValueError, in one line, name the file
    and what is wrong.
    """
    opened = open_image(source)
    if 0 < opened.bits < 16:
        warnings.warn(
            f"a picture of 16 bits whose numbers end below {2**opened.bits} is read as one of "
            f"{opened.bits} bits; its own 16 would show it black",
            stacklevel=1,  # here, so that it is said once, whoever reads
        )
    return opened.image


def open_image(source: Picture) -> Opened:
    """`read_image`, with what it found out and no warning."""
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _opened(source)
    is_path = not isinstance(source, bytes)
    name = f"image {printable(source)}" if is_path else f"an image from {len(source)} bytes"
    try:
        file = Path(source) if is_path else BytesIO(source)
        if is_path and file.exists() and not file.is_file():
            raise ValueError("it is no file")  # but a folder, or a pipe, which would never end
        with Image.open(file, formats=readable_formats()) as image:
            return _opened(image, file)
    except FileNotFoundError:
        raise FileNotFoundError(f"no image at {printable(source)}") from None
    except MemoryError:
        raise
    except UnidentifiedImageError:
        reason = f"it is none of {', '.join(readable_formats())}"
    except Exception as error:  # decoders raise what they like
        reason = getattr(error, "strerror", None) or printable(error) or type(error).__name__
    raise ValueError(f"cannot read {name}: {reason}")


def readable_formats() -> list[str]:
    """Those of FORMATS that this Pillow reads. Its other readers are rare, and some of them call
    programs."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _opened(image: Image.Image, file: Path | BytesIO | None = None) -> Opened:
    """file: what it was opened from, if that is known."""
    stored, bits, mode = image.size, 0, _deep_mode(image)  # which is lost once it is loaded
    file = _file_of(image) if mode and file is None else file
    turned = image.getexif().get(ORIENTATION, 1) not in (0, 1)
    if image.mode[0] in "IF":  # convert("RGB") would cut all above 255 off
        pixels = np.asarray(image)
        if image.mode == "F" or pixels.min() < 0 or pixels.max() > 0xFFFF:
            raise ValueError(f"its pixels are {image.mode} of Pillow; expected 8 or 16 bits")
        eight, bits = to_eight_bits(pixels.astype(np.uint16))
        eight = _with_exif(Image.fromarray(eight), image)
    elif mode:
        eight, bits = _deep_colours(image, file, mode)
    else:
        eight = image
    return Opened(_to_rgb(ImageOps.exif_transpose(eight)), bits, stored, turned)


def to_eight_bits(pixels: np.ndarray) -> tuple[np.ndarray, int]:
    """uint8 of uint16 colours, and of how many bits they were taken to be: 8, 12 or 16, by the
    largest of them. Cameras and scanners write 12 bits into 16, and leave the upper four empty."""
    largest = int(pixels.max())
    bits = 8 if 0 < largest < 2**8 else 12 if 0 < largest < 2**12 else 16
    return (pixels >> (bits - 8)).astype(np.uint8), bits


def _deep_mode(image: Image.Image) -> str:
    """How the colours of 16 bits are stored in a file, which Pillow reads the upper bytes of:
    "RGB;16B" (or LA, RGBA), L in place of B where the lower byte comes first; else ""."""
    if len(tiles := getattr(image, "tile", [])) != 1:
        return ""
    mode = tiles[0][3] if isinstance(tiles[0][3], str) else tiles[0][3][0]
    return mode if isinstance(mode, str) and mode[-4:-1] == ";16" else ""


def _file_of(image: Image.Image) -> BytesIO:
    """All that an image is read from, which has not been read yet."""
    place = image.fp.tell()
    image.fp.seek(0)
    file = BytesIO(image.fp.read())
    image.fp.seek(place)
    return file


def _deep_colours(image: Image.Image, file: Path | BytesIO, mode: str) -> tuple[Image.Image, int]:
    """An image of 16-bit colours in eight: Pillow's own upper bytes, unless these are nearly empty,
    so that the lower ones count."""
    image.load()
    upper = np.asarray(image)
    if upper[..., :3].max() >= 2**4:
        return image, 16
    deep = upper[..., :3].astype(np.uint16) << 8 | _lower_bytes(file, mode)
    colours, bits = to_eight_bits(deep)
    return _with_exif(Image.fromarray(np.dstack([colours, upper[..., 3:]])), image), bits


def _lower_bytes(file: Path | BytesIO, mode: str) -> np.ndarray:
    """(H, W, 3), of 16-bit colours: the file is read as if their bytes were the other way round."""
    little = {"L": True, "B": False, "N": sys.byteorder == "little"}[mode[-1]]
    swapped = f"{mode[:-1]}{'B' if little else 'L'}"
    if mode.startswith("LA"):  # of which Pillow knows one order only: four bytes are read as such
        swapped = "RGBA"
    with Image.open(file, formats=readable_formats()) as image:
        tile = image.tile[0]
        how = swapped if tile[3] == mode else (swapped, *tile[3][1:])
        made = (*tile[:3], how)
        image.tile = [tile._make(made) if hasattr(tile, "_make") else made]
        image.load()
        read = np.asarray(image)
    return read[..., 1:2] if swapped == "RGBA" else read[..., :3]


def _with_exif(made: Image.Image, image: Image.Image) -> Image.Image:
    """The same picture with another's EXIF, which says how it is turned."""
    made.info["exif"] = image.getexif().tobytes()
    return made


def _from_array(pixels: np.ndarray) -> Opened:
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    colours = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))
    if not colours or not pixels.size or pixels.dtype not in (np.uint8, np.uint16):
        raise ValueError(
            "an image array must be uint8 or uint16 and (H, W), (H, W, 3) or (H, W, 4), "
            f"got {pixels.dtype} and {pixels.shape}"
        )
    bits = 0
    if pixels.dtype == np.uint16:
        if pixels.ndim == 3:
            pixels = pixels[:, :, :3]  # what is transparent is shown in its own colour
        pixels, bits = to_eight_bits(pixels)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return Opened(_to_rgb(image), bits, image.size, False)


def _to_rgb(image: Image.Image) -> Image.Image:
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
