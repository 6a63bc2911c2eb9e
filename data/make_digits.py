"""Digits in scenes: real handwriting on real photographs and on noise, in COCO format.

    python data/make_digits.py              # data/digits, 9,500 images of 128 x 128, 7 ms each
    python data/make_digits.py --masks      # data/digits/masks too: a class for every pixel
    python data/make_digits.py --samples    # data/samples, the first images of the test split

The same on every machine: pixels come from integers and from IEEE-exact float64 arithmetic alone.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from functools import cache, partial
from pathlib import Path

import numpy as np
import skimage
import sklearn.datasets
from PIL import Image
from tqdm import tqdm

HERE = Path(__file__).parent
SEED = 2021
SIDE = 128
SMALLEST, LARGEST = 9, 72  # height of a digit in pixels
SPLITS = {"train": 8000, "val": 500, "test": 1000}
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
PHOTOGRAPHS = [
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "china.jpg",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "flower.jpg",
    "grass.png",
    "gravel.png",
    "ihc.png",
]
# percent of each photograph's longer side: a split sees this strip of it and no other
PHOTOGRAPH_SHARE = {"train": (0, 60), "val": (60, 80), "test": (80, 100)}
GLYPH_SHARE = {"train": (0, 70), "val": (70, 80), "test": (80, 100)}  # percent of each class


@cache
def glyphs(split: str) -> tuple[list[np.ndarray], list[int]]:
    """The split's share of the 1,797 handwritten digits, cut to their ink: (h, w) in 0..16."""
    digits = sklearn.datasets.load_digits()
    images, labels = [], []
    for label in range(10):
        own = np.flatnonzero(digits.target == label)
        start, stop = (len(own) * percent // 100 for percent in GLYPH_SHARE[split])
        for index in own[start:stop]:
            image = digits.images[index]
            rows, columns = np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0))
            images.append(image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
            labels.append(label)
    return images, labels


@cache
def photographs(split: str) -> list[np.ndarray]:
    """The split's strip of every photograph, (H, W, 3) uint8."""
    strips = []
    for name in PHOTOGRAPHS:
        with Image.open(photograph_path(name)) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        axis = int(pixels.shape[1] > pixels.shape[0])
        start, stop = (pixels.shape[axis] * share // 100 for share in PHOTOGRAPH_SHARE[split])
        strips.append(pixels[:, start:stop] if axis else pixels[start:stop])
    return strips


def photograph_path(name: str) -> Path:
    """Where scikit-learn or scikit-image has put it."""
    if name in ("china.jpg", "flower.jpg"):
        return Path(sklearn.datasets.__file__).parent / "images" / name
    return Path(skimage.__file__).parent / "data" / name


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear, pixel centres at half-integers: (h, w, ...) to float64 (height, width, ...)."""
    for axis, size in enumerate((height, width)):
        length = image.shape[axis]
        position = ((np.arange(size) + 0.5) * length / size - 0.5).clip(0, length - 1)
        low = np.floor(position).astype(int)
        high = np.minimum(low + 1, length - 1)
        part = (position - low).reshape((-1,) + (1,) * (image.ndim - 1 - axis))
        image = image.take(low, axis) * (1 - part) + image.take(high, axis) * part
    return image


def photograph_crop(rng: np.random.Generator, split: str) -> np.ndarray:
    """A random square piece of a random photograph, mirrored half the time."""
    pictures = photographs(split)
    picture = pictures[pick(rng, len(pictures))]
    side = 48 + pick(rng, min(picture.shape[:2]) - 48)
    top, left = (pick(rng, length - side + 1) for length in picture.shape[:2])
    crop = picture[top : top + side, left : left + side]
    return resize(crop[:, ::-1] if pick(rng, 2) else crop, SIDE, SIDE)


def fractal_noise(rng: np.random.Generator) -> np.ndarray:
    """Random colours at six scales, each half as strong as the last."""
    image = np.zeros((SIDE, SIDE, 3))
    for octave in range(6):
        cells = 2 ** (octave + 1)
        image += resize(rng.random((cells, cells, 3)), SIDE, SIDE) / 2**octave
    low, high = image.min(), image.max()
    return (image - low) / (high - low) * 255


def pick(rng: np.random.Generator, count: int) -> int:
    """A random integer in [0, count)."""
    return int(rng.random() * count)


@cache
def size_table() -> np.ndarray:
    """Cumulative integer weights that make the height of a digit log-uniform."""
    return np.cumsum([10**9 // size for size in range(SMALLEST, LARGEST + 1)])


def draw_digit(
    rng: np.random.Generator,
    scene: np.ndarray,
    split: str,
    taken: list[list[int]],
    classes: np.ndarray | None = None,
) -> tuple[int, list[int]] | None:
    """Set one digit where there is room: its label and box xywh, or None where there is none.

    scene: (SIDE, SIDE, 3) int64, changed in place. taken: the boxes xywh of earlier digits.
    classes: as in `make_image`, changed in place where the ink is half opaque.
    """
    images, labels = glyphs(split)
    table = size_table()
    for _ in range(20):
        index = pick(rng, len(images))
        height = SMALLEST + int(np.searchsorted(table, pick(rng, int(table[-1])), side="right"))
        ink = images[index]
        width = max(3, int(height * ink.shape[1] / ink.shape[0] + 0.5))
        if max(height, width) > SIDE:
            continue
        # from the blur of an 8 x 8 glyph to a stroke: none below 0.3, full above 0.6; in 0..256
        alpha = np.floor(((resize(ink, height, width) / 16 - 0.3) / 0.3).clip(0, 1) * 256)
        alpha = alpha.astype(np.int64)
        # the box ends where the ink is half opaque, as far as one sees it
        rows = np.flatnonzero((alpha >= 128).any(1))
        columns = np.flatnonzero((alpha >= 128).any(0))
        alpha = alpha[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        height, width = alpha.shape
        top, left = pick(rng, SIDE - height + 1), pick(rng, SIDE - width + 1)
        box = [left, top, width, height]
        if any(covers(box, other) for other in taken):
            continue
        where = (slice(top, top + height), slice(left, left + width))
        under = scene[where]
        colour = choose_colour(rng, under)
        scene[where] = (under * (256 - alpha[..., None]) + colour * alpha[..., None]) >> 8
        if classes is not None:
            classes[where][alpha >= 128] = labels[index] + 1
        return labels[index], box
    return None


def covers(one: list[int], other: list[int]) -> bool:
    """Whether two boxes xywh share more than a tenth of the smaller one."""
    sides = [
        min(one[i] + one[i + 2], other[i] + other[i + 2]) - max(one[i], other[i]) for i in (0, 1)
    ]
    smaller = min(one[2] * one[3], other[2] * other[3])
    return min(sides) > 0 and 10 * sides[0] * sides[1] > smaller


def choose_colour(rng: np.random.Generator, under: np.ndarray) -> np.ndarray:
    """A random colour that differs from what lies under it by at least 0.28 of the range."""
    for _ in range(20):
        colour = (rng.random(3) * 256).astype(np.int64)
        if int(np.abs(under - colour).sum()) > 0.28 * 255 * under.size:
            return colour
    dark = int(under.sum()) < 128 * under.size
    return np.full(3, 255 if dark else 0)


def make_image(
    index: int, split: str, classes: np.ndarray | None = None
) -> tuple[np.ndarray, list[tuple[int, list[int]]]]:
    """Image `index` of a split: (SIDE, SIDE, 3) uint8, and its digits as (label, box xywh).

    classes: (SIDE, SIDE) of zeros, changed in place to a digit's label + 1 where its ink is.
    """
    key = [SEED, list(SPLITS).index(split), index]
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))
    scene = photograph_crop(rng, split) if pick(rng, 2) else fractal_noise(rng)
    scene = np.floor(scene).astype(np.int64)
    digits = []
    for _ in range(1 + pick(rng, 8)):
        digit = draw_digit(rng, scene, split, [box for _, box in digits], classes)
        if digit is not None:
            digits.append(digit)
    strength = pick(rng, 13)  # the sum of four uniform numbers is nearly normal
    noise = np.floor((rng.random((4, SIDE, SIDE, 3)) - 0.5) * strength).astype(np.int64).sum(0)
    return (scene + noise).clip(0, 255).astype(np.uint8), digits


def make_mask(index: int, split: str) -> np.ndarray:
    """The class of every pixel of an image: (SIDE, SIDE) uint8, 0 where there is no digit."""
    classes = np.zeros((SIDE, SIDE), np.uint8)
    make_image(index, split, classes)
    return classes


def annotations(split: str, digits: list[list[tuple[int, list[int]]]]) -> dict:
    """The split's COCO annotations; `digits` are those of its images, in order."""
    images = [
        {"id": i + 1, "file_name": f"{i + 1:06}.png", "width": SIDE, "height": SIDE}
        for i in range(len(digits))
    ]
    boxes = [(i + 1, label, box) for i, found in enumerate(digits) for label, box in found]
    return {
        "info": {
            "description": f"Digits in scenes, {split}",
            "version": "2",
            "seed": SEED,
            # small, medium and large end here: 16^2 and 36^2 pixels, COCO's 32^2 and 96^2 scaled
            "area_thresholds": [256, 1296],
        },
        "images": images,
        "annotations": [
            {
                "id": i + 1,
                "image_id": image,
                "category_id": label + 1,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
            for i, (image, label, box) in enumerate(boxes)
        ],
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(NAMES)],
    }


def save_image(index: int, split: str, folder: Path) -> tuple[list, str]:
    """Write one image; its digits, and the checksum of its pixels."""
    pixels, digits = make_image(index, split)
    Image.fromarray(pixels).save(folder / f"{index + 1:06}.png", compress_level=1)
    return digits, hashlib.sha256(pixels.tobytes()).hexdigest()


def save_mask(index: int, split: str, folder: Path) -> None:
    """Write the mask of one image, under its name."""
    Image.fromarray(make_mask(index, split)).save(folder / f"{index + 1:06}.png")


def checksum(pixel_hashes: list[str], content: dict) -> str:
    """One number for a split: of its pixels and its annotations, not of the files' bytes."""
    text = json.dumps([pixel_hashes, content], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write_split(split: str, count: int, root: Path, workers: int) -> str:
    """Write the first `count` images of a split and its annotations; returns its checksum."""
    folder = root / split
    folder.mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    with multiprocessing.Pool(workers) as pool:
        made = pool.imap(partial(save_image, split=split, folder=folder), range(count), 64)
        made = list(tqdm(made, total=count, desc=split, unit="image"))
    digits, hashes = [d for d, _ in made], [h for _, h in made]
    content = annotations(split, digits)
    (root / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return checksum(hashes, content)


def write_masks(root: Path, workers: int) -> None:
    """root/masks/SPLIT: for each image a PNG of its size, whose numbers are category ids, or 0."""
    masks = root / "masks"
    if masks.exists():
        print(f"{masks} is there already")
        return
    with tempfile.TemporaryDirectory(dir=root, prefix=".masks-") as temporary:
        made = Path(temporary) / "masks"
        for split, count in SPLITS.items():
            folder = made / split
            folder.mkdir(parents=True)
            with multiprocessing.Pool(workers) as pool:
                saved = pool.imap(partial(save_mask, split=split, folder=folder), range(count), 64)
                list(tqdm(saved, total=count, desc=f"masks of {split}", unit="image"))
        made.rename(masks)


def write_samples(root: Path, count: int = 24) -> None:
    """The first images of the test split, for looking at."""
    root.mkdir(exist_ok=True)
    digits = [save_image(i, "test", root)[0] for i in range(count)]
    content = annotations("test", digits)
    (root / "annotations.json").write_text(json.dumps(content, indent=1) + "\n")


def may_replace(output: Path) -> bool:
    """Whether nothing but this command's own work is lost when `output` is replaced."""
    return output.is_dir() and (not any(output.iterdir()) or (output / "checksums.json").is_file())


def checksums_of(output: Path) -> dict | None:
    """The checksums written when a data set was made, or None where there are none to read."""
    try:
        return json.loads((output / "checksums.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def make_set(output: Path, workers: int, expected: dict) -> int:
    """Make all splits in place of what is there; returns the command's exit code."""
    output.parent.mkdir(parents=True, exist_ok=True)
    # made beside its place and moved there whole: an interrupted run leaves no half a data set
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".digits-") as temporary:
        made = Path(temporary) / "digits"
        sums = {split: write_split(split, n, made, workers) for split, n in SPLITS.items()}
        (made / "checksums.json").write_text(json.dumps(sums, indent=1) + "\n")
        if output.exists():
            shutil.rmtree(output)
        made.rename(output)
    if sums != expected:
        print(f"error: expected checksums {expected}, got {sums}", file=sys.stderr)
        return 1
    return 0


def main() -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=HERE / "digits", help="folder to make")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--force", action="store_true", help="make it anew where it exists")
    others = parser.add_mutually_exclusive_group()
    others.add_argument("--masks", action="store_true", help="a class for every pixel, too")
    others.add_argument("--samples", action="store_true", help="write data/samples instead")
    args = parser.parse_args()
    if args.workers < 1:
        parser.error(f"--workers must be at least 1, got {args.workers}")
    if args.samples:
        write_samples(HERE / "samples")
        return 0
    expected = json.loads((HERE / "digits.sha256.json").read_text())
    if args.output.exists() and not may_replace(args.output):
        parser.error(f"{args.output} is there and is not what this command makes")
    if not args.force and args.output.exists() and checksums_of(args.output) == expected:
        print(f"{args.output} is there already; --force makes it anew")
    elif code := make_set(args.output, args.workers, expected):
        return code
    if args.masks:
        write_masks(args.output, args.workers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
