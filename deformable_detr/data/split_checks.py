"""The faults of a whole data folder: of each split, and between them. Chapter your_own_data."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from deformable_detr.data.annotations import read_annotations
from deformable_detr.data.checks import check_dataset, label_histogram
from deformable_detr.data.faults import Fault
from deformable_detr.data.names import counted, listed, printable
from deformable_detr.data.places import (
    Pictures,
    Place,
    find_split,
    has_split,
    is_file,
    without_annotations,
    without_val,
)

BETWEEN = "between splits"  # stands in the place of a split's name
REMEDY = (
    "all splits must list the same ids and names: convert them together (of Pascal VOC: "
    "deformable-detr convert), or copy the list of categories and correct the ids"
)


def check_data(splits: dict[str, Place]) -> Iterator[tuple[str, list[Fault]]]:
    """The faults of each split, and at last those between splits, under the name BETWEEN.

    What `check` prints, and what `train` refuses to start with: the same decides for both. splits:
    by name, the image folder and annotation file.
    """
    for split, place in splits.items():
        yield split, check_dataset(*place)
    contents = {split: read_annotations(place[1]) for split, place in splits.items()}
    yield BETWEEN, [*compare_categories(contents), *_unlearned(contents), *check_splits(splits)]


def missing_splits(data_dir: Path | str) -> list[Fault]:
    """The splits that a training would miss, and pictures that no annotation file knows."""
    faults = []
    if not has_split(data_dir, "train"):
        try:
            find_split(data_dir, "train")
        except FileNotFoundError as error:
            faults.append(Fault("missing split", True, str(error)))
    if text := without_val(data_dir):
        faults.append(Fault("missing split", False, text))
    if text := without_annotations(data_dir, "test"):
        faults.append(Fault("missing split", False, text))
    return faults


def compare_categories(contents: dict[str, dict]) -> Iterator[Fault]:
    """Fatal faults where another split names its classes unlike the first, train."""
    first, *others = contents
    for other in others:
        pair = contents[first]["categories"], contents[other]["categories"]
        if text := category_difference(*pair, first, other):
            yield Fault("categories differ", True, text)


def category_difference(
    one: list[dict], other: list[dict], name: str = "train", other_name: str = "val"
) -> str:
    """How two lists of categories differ in ids or names, in one line; "" if they do not."""
    for first, second in ((one, other), (other, one)):
        names = {category["id"]: category["name"] for category in second}
        for category in first:
            key, called = category["id"], category["name"]
            if key not in names or names[key] != called:
                text = f"category {printable(key)}, '{printable(called)}', is in one of {name} and "
                text += f"{other_name} only"
                if key in names:
                    text += f" (in the other, {printable(key)} is '{printable(names[key])}')"
                return f"{text}; {REMEDY}"
    return ""


def check_splits(splits: dict[str, Place]) -> list[Fault]:
    """The images that are in more than one split, file for file: what a model has seen in training
    says little about it in validation.

    Files that cannot be read are left to `check_dataset`.
    """
    same_size = defaultdict(list)  # only files of one size can be equal, and need be read
    for split, (images_dir, annotation_file) in splits.items():
        images = read_annotations(Path(annotation_file))["images"]
        pictures = Pictures(images_dir, images)
        for image in images:
            path = pictures.path(image["file_name"])
            if is_file(path):
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
            "one picture is "
            + " and ".join(f"image {printable(key)} of {split}" for split, key in found),
            found[0][1],
        )
        for found in same.values()
        if len({split for split, _ in found}) > 1
    ]


def _unlearned(contents: dict[str, dict]) -> Iterator[Fault]:
    """Classes with boxes in one split and none in another."""
    first, *others = contents
    learned = {name for name, count in label_histogram(contents[first]).items() if count}
    for other in others:
        there = {name for name, count in label_histogram(contents[other]).items() if count}
        for names, has, lacks, then in (
            (learned - there, first, other, "is not measured there"),
            (there - learned, other, first, "cannot be learned"),
        ):
            if names and learned and there:
                count = f"{counted(len(names), 'class')} with boxes in {has} and none in {lacks}"
                text = f"{count}, so that their AP {then}: {listed(sorted(names))}"
                yield Fault("class in one split", False, text)
