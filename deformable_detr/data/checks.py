"""Saying what is wrong with a data set in COCO format. Chapter your_own_data."""

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator
from pathlib import Path

import numpy as np

from deformable_detr.data.annotations import read_annotations
from deformable_detr.data.crowding import QUERIES, crowding
from deformable_detr.data.duplicates import duplicate_boxes
from deformable_detr.data.faults import Fault
from deformable_detr.data.names import counted, id_order, listed, printable
from deformable_detr.data.picture_checks import look_at_all, picture_faults, stated
from deformable_detr.data.places import Pictures, pictures_in, plain_name

LARGEST = 2**31  # pixels that a box may be from its image's corner, and still be a box


def check_dataset(images_dir: Path | str, annotation_file: Path | str) -> list[Fault]:
    """Every fault of a COCO-format data set, those of its images first; decodes every image."""
    content = read_annotations(Path(annotation_file))
    pictures = Pictures(images_dir, content["images"])
    by_id = {image["id"]: image for image in content["images"]}
    seen = look_at_all(pictures, list(by_id.values()))
    faults = [*picture_faults(pictures, seen), *_nothing_to_learn(content)]
    for each in seen:
        if each.size and None in stated(each.entry):
            by_id[each.entry["id"]].update(width=each.size[0], height=each.size[1])
    return [*faults, *check_annotations(content)]


def check_annotations(content: dict, num_queries: int = QUERIES) -> list[Fault]:
    """The faults of an annotation file's content (`read_annotations`) that show without images:
    first those of the file as a whole, then those of single annotations.

    num_queries: of the model, if there is one, which finds no more objects in an image.
    """
    images = {image["id"]: image for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    annotations = content["annotations"]
    faults = [*_duplicate_ids(content), *_duplicate_files(content), *_category_faults(content)]
    faults += [*_format_faults(annotations, images), *_ignored(annotations)]
    faults += [*_equal_areas(annotations)]
    faults += [Fault("crowded image", False, text) for text in crowding(content, num_queries)]
    own_areas = not any(fault.kind == "area" for fault in faults)
    for annotation in annotations:
        faults += _annotation_faults(annotation, images, categories, own_areas)
    return faults + list(_duplicate_boxes(annotations))


def summary(images_dir: Path | str, content: dict) -> str:
    """One line with what a data set holds; of the annotation file's content, and of the folder the
    pictures that no entry names."""
    annotations = content["annotations"]
    crowds = sum(bool(a.get("iscrowd")) for a in annotations)
    empty = {i["id"] for i in content["images"]} - {a["image_id"] for a in annotations}
    pictures = Pictures(images_dir, content["images"])
    named = {pictures.path(image["file_name"]) for image in content["images"]}
    unnamed = sum(path not in named for path in pictures_in(Path(images_dir)))
    return (
        f"{counted(len(content['images']), 'image')}, {len(empty)} of them without boxes; "
        f"{counted(len(annotations) - crowds, 'box')}, and {crowds} of crowds, which training "
        "leaves out; "
        f"{counted(unnamed, 'picture')} in the folder that no entry names"
    )


def label_histogram(content: dict) -> dict[str, int]:
    """How many boxes, crowds left out, each category of an annotation file has, by name."""
    counts = Counter(a["category_id"] for a in content["annotations"] if not a.get("iscrowd", 0))
    ordered = sorted(content["categories"], key=lambda category: id_order(category["id"]))
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
    """Ids that are used twice; 7 and "7" are one, as other tools read them."""
    for kind in ("images", "annotations", "categories"):
        for key, count in Counter(str(item["id"]) for item in content[kind]).items():
            if count > 1:
                text = f"{kind}: id {printable(key)} is used {count} times"
                yield Fault("duplicate id", True, text)


def _duplicate_files(content: dict) -> Iterator[Fault]:
    """Files that have several entries: each would be learned without the boxes of the others."""
    boxes: dict[Hashable, list] = defaultdict(list)
    for a in content["annotations"]:
        boxes[a["image_id"]].append((str(a["category_id"]), str(a["bbox"])))
    entries: dict[str, dict] = defaultdict(dict)
    for image in content["images"]:
        entries[plain_name(image["file_name"])][image["id"]] = sorted(boxes[image["id"]])
    several = {name: of_file for name, of_file in entries.items() if len(of_file) > 1}
    for fatal in (True, False):
        found = {
            name: of_file
            for name, of_file in several.items()
            if any(each != next(iter(of_file.values())) for each in of_file.values()) == fatal
        }
        if found:
            name, of_file = next(iter(found.items()))
            text = (
                f"{counted(len(found), 'file')} under several ids, such as {printable(name)} under "
            )
            text += listed(of_file, 3)
            text += ": each has only part of the boxes" if fatal else ", with the same boxes"
            yield Fault("one file, two ids", fatal, text, next(iter(of_file)))


def _category_faults(content: dict) -> Iterator[Fault]:
    names = Counter(category["name"] for category in content["categories"])
    for name, count in names.items():
        if count > 1:
            yield Fault("duplicate name", True, f"{count} categories are called {printable(name)}")
    unused = [name for name, count in label_histogram(content).items() if not count]
    if unused and content["annotations"]:
        text = f"{len(unused)} of {len(names)} categories have no box: {listed(unused)}"
        yield Fault("unused category", False, text)


def _nothing_to_learn(content: dict) -> Iterator[Fault]:
    """Without a box that is not a crowd's, there is nothing to train on or to choose weights by."""
    boxes = [a for a in content["annotations"] if _is_box(a["bbox"]) and min(a["bbox"][2:]) > 0]
    if not content["images"]:
        yield Fault("no image", True, "the annotation file has no image")
    elif not boxes:
        yield Fault("no box", True, "no image has a box: there is nothing to learn")
    elif all(a.get("iscrowd") for a in boxes):
        count = counted(len(boxes), "box")
        text = f"of {count} all are crowds' (iscrowd: 1): there is nothing to learn"
        yield Fault("no box", True, text)


def _ignored(annotations: list[dict]) -> Iterator[Fault]:
    ignored = [a for a in annotations if a.get("ignore") and not a.get("iscrowd")]
    if ignored:
        yield Fault(
            "ignore",
            False,
            f"{len(ignored)} of {len(annotations)} annotations say ignore, which neither training "
            "nor COCO's metrics read: they count as objects; iscrowd: 1 leaves them out",
            ignored[0]["image_id"],
            ignored[0]["id"],
        )


def _equal_areas(annotations: list[dict]) -> Iterator[Fault]:
    sized = [a for a in annotations if _is_box(a["bbox"]) and a.get("area") is not None]
    areas = {a["area"] for a in sized}
    boxes = [a["bbox"][2] * a["bbox"][3] for a in sized]
    others = sum(area not in areas for area in boxes)
    if len(sized) > 2 and len(areas) == 1 < len(set(boxes)) and others > len(sized) / 2:
        text = f"all {len(sized)} areas are {areas.pop()}, though boxes differ: AP small, medium "
        yield Fault("area", False, text + "and large go by them; without area it is the box's")


def _format_faults(annotations: list[dict], images: dict) -> Iterator[Fault]:
    """Boxes that are all in another format than COCO's x, y, w, h in pixels."""
    readable = [a for a in annotations if _is_box(a["bbox"]) and a["image_id"] in images]
    if not readable:
        return
    first = f"first annotation {printable(readable[0]['id'])} with {readable[0]['bbox']}"
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
    groups: dict[tuple, int] = {}
    of = [groups.setdefault((a["image_id"], a["category_id"]), len(groups)) for a in sized]
    boxes = np.array([a["bbox"] for a in sized], float).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    for row, earlier_row in duplicate_boxes(boxes, np.array(of, int)):
        later, earlier = sized[row]["id"], printable(sized[earlier_row]["id"])
        text = f"annotation {printable(later)}: nearly the box and the category of annotation "
        yield Fault("duplicate box", False, text + earlier, sized[row]["image_id"], later)


def _is_box(box: object) -> bool:
    numbers = isinstance(box, list) and len(box) == 4
    return numbers and all(type(n) in (int, float) and abs(n) <= LARGEST for n in box)


def _stated_size(image: dict) -> tuple[float, float]:
    """An image's width and height in the annotation file; infinite where it does not say."""
    return tuple(math.inf if side is None else side for side in stated(image))


def _reaches_outside(box: list[float], image: dict) -> bool:
    """By more than a pixel, as rounding may do."""
    x, y, width, height = box
    image_width, image_height = _stated_size(image)
    return min(x, y) < -1 or x + width > image_width + 1 or y + height > image_height + 1


def _annotation_faults(
    annotation: dict, images: dict, categories: set, own_areas: bool = True
) -> Iterator[Fault]:
    """own_areas: whether areas are to be compared with boxes."""
    key, image_id = annotation["id"], annotation["image_id"]

    def fault(kind: str, fatal: bool, text: str) -> Fault:
        return Fault(kind, fatal, f"annotation {printable(key)}: {text}", image_id, key)

    if annotation["category_id"] not in categories:
        text = f"unknown category {printable(annotation['category_id'])}"
        yield fault("unknown category", True, text)
    box = annotation["bbox"]
    if not _is_box(box):
        text = f"bbox must be four finite numbers x, y, w, h, got {printable(repr(box)[:80])}"
        yield fault("bad box", True, text)
        return
    x, y, width, height = box
    if width <= 0 or height <= 0:
        # COCO's own training split has two of size zero; below zero the format is another
        swapped = min(width, height) < 0
        hint = "; are its corners swapped?" if swapped else ""
        yield fault("empty box", swapped, f"box of no size: x, y, w, h = {box}{hint}")
    area = annotation.get("area") if own_areas else None
    # a mask may fill its box, whose sides were rounded
    if area is not None and min(width, height) > 0 and not 0 < area <= (width + 1) * (height + 1):
        text = f"area {area} of a box of {width} x {height}: AP small, medium and large go by it"
        yield fault("area", False, text)
    if image_id not in images:
        yield fault("unknown image", True, f"unknown image {printable(image_id)}")
        return
    image, named = images[image_id], printable(image_id)
    image_width, image_height = _stated_size(image)
    if x >= image_width or y >= image_height or x + width <= 0 or y + height <= 0:
        yield fault("box outside", True, f"box {box} lies outside its image {named}")
    elif _reaches_outside(box, image):
        yield fault("box cut", False, f"box {box} is cut at the border of image {named}")
