"""The faults of a data set's pictures: of one, and of all together. Chapter your_own_data."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

from tqdm import tqdm

from deformable_detr.data.faults import Fault
from deformable_detr.data.images import open_image
from deformable_detr.data.names import counted, listed, printable
from deformable_detr.data.places import Pictures, pictures_in
from deformable_detr.data.transforms import SHORT_SIDE, SMALLEST_SIDE

DARK = 127  # of 255: a picture that is nowhere brighter may have been read with the wrong range
THIN = 40  # times as long as wide: of 1333 pixels, COCO's recipe's longest side, 33 are left
LARGE = 3  # times the side to which COCO's recipe resizes
PADDED = 1 << 26  # pixels of an image that was padded to the largest width and height of all


@dataclass
class Seen:
    """What was found out about the picture of one entry of "images".

    size: (width, height) as shown, None where it cannot be read; stored: before it was turned as
    its EXIF says. bits: as in `Opened`. brightest: of all colours, to 255. fault: of this alone.
    """

    entry: dict
    path: Path
    fault: Fault | None = None
    size: tuple[int, int] | None = None
    stored: tuple[int, int] | None = None
    bits: int = 0
    turned: bool = False
    brightest: int = 255

    @property
    def name(self) -> str:
        """As a message has it."""
        return f"image {printable(self.entry['id'])}"


def look_at_all(pictures: Pictures, images: list[dict]) -> list[Seen]:
    """`look_at` each, in parallel: decoding an image lets other threads run."""
    few = len(images) < 1000
    with ThreadPool() as pool:
        seen = pool.imap(lambda image: look_at(pictures, image), images)
        seen = list(tqdm(seen, "check", len(images), leave=False, unit="image", disable=few))
        pool.close()
        pool.join()
    return seen


def look_at(pictures: Pictures, image: dict) -> Seen:
    """Decode the picture of one entry of "images"."""
    seen = Seen(image, pictures.path(image["file_name"]))
    try:
        opened = open_image(seen.path)
    except FileNotFoundError as error:
        seen.fault = Fault("missing image", True, f"{seen.name}: {error}", image["id"])
    except ValueError as error:
        seen.fault = Fault("corrupt image", True, f"{seen.name}: {error}", image["id"])
    else:
        seen.size, seen.stored = opened.image.size, opened.stored
        seen.bits, seen.turned = opened.bits, opened.turned
        seen.brightest = max(high for _, high in opened.image.getextrema())
        seen.fault = _size_fault(seen)
    return seen


def picture_faults(pictures: Pictures, seen: list[Seen]) -> list[Fault]:
    """The faults of these pictures: of single ones first, then those of many, once."""
    faults = [each.fault for each in seen if each.fault]
    missing = [fault for fault in faults if fault.kind == "missing image"]
    if len(missing) == len(seen) > 1:
        faults = [_all_missing(pictures, seen)]
    read = [each for each in seen if each.size]
    return [*faults, *_together(read), *_shape_faults(read), *_depth_faults(read)]


def stated(image: dict) -> tuple[float | None, float | None]:
    """The width and height of an entry of "images"; None for what it does not say, or has as 0 or
    -1, as some tools do where they do not know."""
    sides = image.get("width"), image.get("height")
    return tuple(side if isinstance(side, int | float) and side > 0 else None for side in sides)


def _size_fault(seen: Seen) -> Fault | None:
    says, size = stated(seen.entry), seen.size
    if says == size or None in says:
        return None
    sizes = f"{size[0]} x {size[1]}, not {says[0]} x {says[1]}"
    text = f"{seen.name}: {printable(seen.path)} is {sizes}"
    if says == seen.stored:
        text += ": its EXIF turns it; are its boxes, too, in pixels of the file as it is stored?"
        text += " Turn the pixels themselves, or the boxes"
    elif says == size[::-1]:
        text += "; was it turned when it was annotated?"
    return Fault("image size", True, text, seen.entry["id"])


def _all_missing(pictures: Pictures, seen: list[Seen]) -> Fault:
    """One line for 612 files that are not where they are expected."""
    there = [path.relative_to(pictures.folder) for path in pictures_in(pictures.folder)]
    holds = (
        f"{counted(len(there), 'picture')}, such as {listed(there[:1])}" if there else "no picture"
    )
    text = (
        f"none of {len(seen)} images is there; the first, {printable(seen[0].entry['file_name'])}, "
        f"was expected at {printable(seen[0].path)}; {printable(pictures.folder)} holds {holds}"
    )
    return Fault("missing image", True, text)


def _many(found: list[Seen], read: list[Seen], text: str, kind: str) -> Iterator[Fault]:
    """One warning that so many of all pictures are so, and which is the first."""
    if found:
        count = f"{len(found)} of {len(read)} images, such as {found[0].name}"
        yield Fault(kind, False, f"{text}: {count}", found[0].entry["id"])


def _together(read: list[Seen]) -> Iterator[Fault]:
    unstated = [each for each in read if None in stated(each.entry)]
    yield from _many(unstated, read, "width and height are not stated", "image size")
    turned = [
        each
        for each in read
        if each.turned
        and each.fault is None  # a fault of its size says so already
        and (each.stored == each.size or None in stated(each.entry))
    ]
    text = "turned as their EXIF says, so that boxes must be of the picture as it is shown"
    yield from _many(turned, read, text, "turned image")


def _shape_faults(read: list[Seen]) -> Iterator[Fault]:
    small = [each for each in read if max(each.size) < SMALLEST_SIDE]
    text = f"smaller than {SMALLEST_SIDE} pixels both ways, which is one cell of the coarsest map"
    yield from _many(small, read, text, "small image")
    thin = [each for each in read if max(each.size) > THIN * min(each.size)]
    text = f"more than {THIN} times as long as wide: little is left of the other side when resized"
    yield from _many(thin, read, text, "thin image")
    large = [each for each in read if min(each.size) > LARGE * SHORT_SIDE]
    text = f"shorter sides above {LARGE} x {SHORT_SIDE} pixels: small objects are lost where "
    text += "images are resized; deformable-detr tile cuts them"
    yield from _many(large, read, text, "large image")
    if read:
        widest, highest = (max(read, key=lambda each, i=i: each.size[i]) for i in (0, 1))
        width, height = widest.size[0], highest.size[1]
        largest = max(each.size[0] * each.size[1] for each in read)
        if width * height > max(PADDED, 4 * largest):
            text = (
                f"{widest.name} is {width} wide and {highest.name} is {height} high: where images "
                "are not resized, a batch is padded to both, which may exhaust the memory"
            )
            yield Fault("padding", False, text)


def _depth_faults(read: list[Seen]) -> Iterator[Fault]:
    deep = Counter(each.bits for each in read if each.bits)
    for bits in (8, 12):
        found = [each for each in read if each.bits == bits]
        text = f"of 16 bits, but no number reaches {2**bits}: read as of {bits} bits"
        if others := deep.total() - deep[bits]:
            text += f", unlike {others} others of 16"
        yield from _many(found, read, text, "bit depth")
    dark = [each for each in read if each.brightest <= DARK]
    most = max((each.brightest for each in dark), default=0)
    yield from _many(dark, read, f"nowhere brighter than {most} of 255", "dark image")
