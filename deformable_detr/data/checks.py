"""Saying what is wrong with a data set in COCO format. Chapter 12."""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from deformable_detr.data.annotations import is_finite, read_annotations
from deformable_detr.data.images import SUFFIXES, read_image

SAME_BOX = 0.95  # overlap (IoU) from which two boxes are taken for one object annotated twice


@dataclass
class Fault:
    """Something wrong with a data set. A fatal one would stop training or spoil it."""

    kind: str
    fatal: bool
    message: str
    image_id: int | None = None
    annotation_id: int | None = None

    def __str__(self) -> str:
        return f"{'FATAL' if self.fatal else 'warning'}: {self.message}"


def check_dataset(images_dir: Path | str, annotation_file: Path | str) -> list[Fault]:
    """Every fault of a COCO-format data set, those of its images first; decodes every image."""
    content = read_annotations(Path(annotation_file))
    images = content["images"]
    faults = []

    def check(image: dict) -> list[Fault]:
        return check_image(Path(images_dir), image)

    few = len(images) < 1000
    with ThreadPool() as pool:  # decoding an image lets other threads run
        checked = pool.imap(check, {image["id"]: image for image in images}.values())
        for found in tqdm(checked, "check", len(images), leave=False, unit="image", disable=few):
            faults += found
        pool.close()
        pool.join()
    return [*faults, *_nothing_to_learn(content), *check_annotations(content)]


def check_annotations(content: dict) -> list[Fault]:
    """The faults of an annotation file's content (`read_annotations`) that show without images:
    first those of the file as a whole, then those of single annotations."""
    images = {image["id"]: image for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    faults = [*_duplicate_ids(content), *_category_faults(content)]
    faults += _format_faults(content["annotations"], images)
    for annotation in content["annotations"]:
        faults += _annotation_faults(annotation, images, categories)
    return faults + list(_duplicate_boxes(content["annotations"]))


def check_splits(splits: dict[str, tuple[Path, Path]]) -> list[Fault]:
    """The images that are in more than one split, file for file: what a model has seen in training
    says little about it in validation.

    splits: by name, the image folder and annotation file. Files that cannot be read are left to
    `check_dataset`.
    """
    same_size = defaultdict(list)  # only files of one size can be equal, and need be read
    for split, (images_dir, annotation_file) in splits.items():
        for image in read_annotations(Path(annotation_file))["images"]:
            path = Path(images_dir) / image["file_name"]
            if path.is_file():
                same_size[path.stat().st_size].append((split, image["id"], path))
    same = defaultdict(list)
    for found in same_size.values():
        if len({split for split, _, _ in found}) > 1:
            for split, image_id, path in found:
                same[hashlib.sha256(path.read_bytes()).digest()].append((split, image_id))
    return [
        Fault(
            "in two splits",
            False,
            "one picture is " + " and ".join(f"image {key} of {split}" for split, key in found),
            found[0][1],
        )
        for found in same.values()
        if len({split for split, _ in found}) > 1
    ]


def summary(images_dir: Path | str, content: dict) -> str:
    """One line with what a data set holds; of the annotation file's content, and of the folder the
    pictures that no entry names."""
    annotations = content["annotations"]
    crowds = sum(bool(a.get("iscrowd")) for a in annotations)
    empty = {i["id"] for i in content["images"]} - {a["image_id"] for a in annotations}
    named = {Path(images_dir, image["file_name"]) for image in content["images"]}
    pictures = (p for p in Path(images_dir).rglob("*") if p.suffix.lower() in SUFFIXES)
    unnamed = sum(path not in named for path in pictures)
    return (
        f"{len(content['images'])} images, {len(empty)} of them without boxes; "
        f"{len(annotations) - crowds} boxes, and {crowds} of crowds, which training leaves out; "
        f"{unnamed} pictures in the folder that no entry names"
    )


def label_histogram(content: dict) -> dict[str, int]:
    """How many boxes, crowds left out, each category of an annotation file has, by name."""
    counts = Counter(a["category_id"] for a in content["annotations"] if not a.get("iscrowd", 0))
    ordered = sorted(content["categories"], key=lambda category: category["id"])
    return {category["name"]: counts[category["id"]] for category in ordered}


def refuse_unreadable(content: dict, path: Path | str) -> None:
    """ValueError with the first annotations whose category or box means nothing."""
    images = {image["id"]: image for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    found = [
        fault.message
        for annotation in content["annotations"]
        for fault in _annotation_faults(annotation, images, categories)
        if fault.kind in ("unknown category", "bad box")
    ]
    if found:
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(f"{path}: {'; '.join(found[:3])}{more}")


def _duplicate_ids(content: dict) -> Iterator[Fault]:
    for kind in ("images", "annotations", "categories"):
        for key, count in Counter(item["id"] for item in content[kind]).items():
            if count > 1:
                yield Fault("duplicate id", True, f"{kind}: id {key} is used {count} times")


def _category_faults(content: dict) -> Iterator[Fault]:
    names = Counter(category["name"] for category in content["categories"])
    for name, count in names.items():
        if count > 1:
            yield Fault("duplicate name", True, f"{count} categories are called {name!r}")
    unused = [name for name, count in label_histogram(content).items() if not count]
    if unused and content["annotations"]:
        some = ", ".join(map(str, unused[:10])) + (", ..." if len(unused) > 10 else "")
        text = f"{len(unused)} of {len(names)} categories have no box: {some}"
        yield Fault("unused category", False, text)


def _nothing_to_learn(content: dict) -> Iterator[Fault]:
    """Without a box that is not a crowd's, there is nothing to train on or to choose weights by."""
    if not content["images"]:
        yield Fault("no image", True, "the annotation file has no image")
    elif not any(
        _is_box(a["bbox"]) and min(a["bbox"][2:]) > 0 and not a.get("iscrowd")
        for a in content["annotations"]
    ):
        yield Fault("no box", True, "no image has a box: there is nothing to learn")


def _format_faults(annotations: list[dict], images: dict) -> Iterator[Fault]:
    """Boxes that are all in another format than COCO's x, y, w, h in pixels."""
    readable = [a for a in annotations if _is_box(a["bbox"]) and a["image_id"] in images]
    if not readable:
        return
    first = f"first annotation {readable[0]['id']} with {readable[0]['bbox']}"
    if all(min(a["bbox"]) >= 0 and max(a["bbox"]) <= 1 for a in readable):
        text = f"all boxes lie in [0, 1], {first}: COCO's are in pixels, not parts of the image"
        yield Fault("box format", True, text)
    outside = [a for a in readable if _reaches_outside(a["bbox"], images[a["image_id"]])]
    if outside and all(
        a["bbox"][2] > a["bbox"][0] and a["bbox"][3] > a["bbox"][1] for a in readable
    ):
        text = f"{len(outside)} of {len(readable)} boxes leave their images, {first}"
        yield Fault(
            "box format", True, f"{text}: are these corners x1, y1, x2, y2? COCO has x, y, w, h"
        )


def _duplicate_boxes(annotations: list[dict]) -> Iterator[Fault]:
    """Each annotation that has nearly the box of an earlier one, in the same image and category."""
    sized = [a for a in annotations if _is_box(a["bbox"]) and min(a["bbox"][2:]) > 0]
    sized.sort(key=lambda a: (str(a["image_id"]), str(a["category_id"])))  # stable
    groups: dict[tuple, int] = {}
    of = [groups.setdefault((a["image_id"], a["category_id"]), len(groups)) for a in sized]
    group = np.array(of)
    boxes = np.array([a["bbox"] for a in sized], float).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    said = set()
    for lag in range(1, max(Counter(of).values(), default=1)):  # all pairs, a whole lag at once
        first = np.flatnonzero(group[lag:] == group[:-lag])
        overlaps = _overlap(boxes[first], boxes[first + lag])
        for i in first[overlaps > SAME_BOX]:
            earlier, later = sized[i], sized[i + lag]
            if later["id"] not in said:
                said.add(later["id"])
                text = f"nearly the box and the category of annotation {earlier['id']}"
                text = f"annotation {later['id']}: {text}"
                yield Fault("duplicate box", False, text, later["image_id"], later["id"])


def _overlap(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The intersection over union, (N,), of N pairs of boxes, (N, 4) xyxy each."""
    sides = np.minimum(one[:, 2:], other[:, 2:]) - np.maximum(one[:, :2], other[:, :2])
    both = sides.clip(0).prod(1)
    return both / ((one[:, 2:] - one[:, :2]).prod(1) + (other[:, 2:] - other[:, :2]).prod(1) - both)


def check_image(images_dir: Path, image: dict) -> list[Fault]:
    """The faults of one entry of "images": its file is missing, unreadable or of another size."""
    path, image_id = images_dir / image["file_name"], image["id"]
    try:
        size = read_image(path).size
    except FileNotFoundError as error:
        return [Fault("missing image", True, f"image {image_id}: {error}", image_id)]
    except ValueError as error:
        return [Fault("corrupt image", True, f"image {image_id}: {error}", image_id)]
    stated = image.get("width"), image.get("height")
    if stated == size:
        return []
    if None in stated:
        text = f"image {image_id}: its width and height are not stated"
        return [Fault("image size", False, text, image_id)]
    text = f"image {image_id}: {path} is {size[0]} x {size[1]}, not {stated[0]} x {stated[1]}"
    if stated == size[::-1]:
        text += "; was it turned when it was annotated?"
    return [Fault("image size", True, text, image_id)]


def _is_box(box: object) -> bool:
    numbers = isinstance(box, list) and len(box) == 4
    return numbers and all(isinstance(n, int | float) and is_finite(n) for n in box)


def _stated_size(image: dict) -> tuple[float, float]:
    """An image's width and height in the annotation file; infinite where it does not say."""
    stated = image.get("width"), image.get("height")
    return tuple(n if isinstance(n, int | float) else math.inf for n in stated)


def _reaches_outside(box: list[float], image: dict) -> bool:
    """By more than a pixel, as rounding may do."""
    x, y, width, height = box
    image_width, image_height = _stated_size(image)
    return min(x, y) < -1 or x + width > image_width + 1 or y + height > image_height + 1


def _annotation_faults(annotation: dict, images: dict, categories: set) -> Iterator[Fault]:
    key, image_id = annotation["id"], annotation["image_id"]

    def fault(kind: str, fatal: bool, text: str) -> Fault:
        return Fault(kind, fatal, f"annotation {key}: {text}", image_id, key)

    if annotation["category_id"] not in categories:
        yield fault("unknown category", True, f"unknown category {annotation['category_id']}")
    box = annotation["bbox"]
    if not _is_box(box):
        text = f"bbox must be four finite numbers x, y, w, h, got {box!r:.80}"
        yield fault("bad box", True, text)
        return
    x, y, width, height = box
    if width <= 0 or height <= 0:
        # COCO's own training split has two of size zero; below zero the format is another
        swapped = min(width, height) < 0
        hint = "; are its corners swapped?" if swapped else ""
        yield fault("empty box", swapped, f"box of no size: x, y, w, h = {box}{hint}")
    area = annotation.get("area")
    # a mask may fill its box, whose sides were rounded
    if area is not None and min(width, height) > 0 and not 0 < area <= (width + 1) * (height + 1):
        text = f"area {area} of a box of {width} x {height}: AP small, medium and large go by it"
        yield fault("area", False, text)
    if image_id not in images:
        yield fault("unknown image", True, f"unknown image {image_id}")
        return
    image = images[image_id]
    image_width, image_height = _stated_size(image)
    if x >= image_width or y >= image_height or x + width <= 0 or y + height <= 0:
        yield fault("box outside", True, f"box {box} lies outside its image {image_id}")
    elif _reaches_outside(box, image):
        yield fault("box cut", False, f"box {box} is cut at the border of image {image_id}")
