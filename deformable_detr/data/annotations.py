"""Reading annotation files in COCO format, and what other tools write for it.
Chapter your_own_data."""

import json
import sys
from collections import Counter
from pathlib import Path
from types import NoneType

from deformable_detr.data.names import printable

KEYS = {  # what every entry of an annotation file must have
    "images": ("id", "file_name"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}
ID, TEXT = ("a whole number or text", int, str), ("text", str)
NUMBER = ("a finite number or null", int, float, NoneType)
FLAG = ("0, 1, true, false or null", int, bool, NoneType)
TYPES = {  # that these may have, where they are
    "images": {"id": ID, "file_name": TEXT, "width": NUMBER, "height": NUMBER},
    "annotations": {"id": ID, "image_id": ID, "category_id": ID, "area": NUMBER, "iscrowd": FLAG},
    "categories": {"id": ID, "name": TEXT},
}
REFERENCES = {"image_id": "images", "category_id": "categories"}  # of an annotation
EXACT = 2**53  # whole numbers below this are the same as floats


def read_annotations(path: Path) -> dict:
    """The content of a COCO annotation file; ValueError in one line where it is no such file.

    Where it has one reading, it may differ from COCO's: a box may be missing if there are polygons
    (`segmentation`), which it then surrounds; ids may be text, or whole numbers with a point, and
    an annotation may name its image and category by 7 where they are called "7".
    """
    content = _read_json(path)
    missing = [key for key in KEYS if not isinstance(content, dict) or key not in content]
    if missing:
        raise ValueError(f"{path} is not a COCO annotation file: it has no {', '.join(missing)}")
    for kind in KEYS:
        if not isinstance(content[kind], list):
            raise ValueError(f"{path}: {kind} must be a list, got {type(content[kind]).__name__}")
        for i, item in enumerate(content[kind]):
            if isinstance(item, dict):
                _read_ids(item)
                if kind == "annotations":
                    _read_box(item)
            _check_item(item, kind, f"{path}: {kind}[{i}]")
    for key, kind in REFERENCES.items():
        _read_references(content["annotations"], key, [item["id"] for item in content[kind]])
    _check_area_thresholds(content.get("info"), path)
    return content


def _read_json(path: Path) -> object:
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file that can be read from its beginning to its end")
    try:
        return json.loads(path.read_text("utf-8-sig"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no annotation file at {path}") from None
    except (ValueError, RecursionError) as error:  # the latter of lists within lists without end
        raise ValueError(f"{path} is not JSON: {printable(error)}") from None


def _check_item(item: object, kind: str, where: str) -> None:
    """ValueError where an entry lacks something, or has it of another type."""
    lacking = [key for key in KEYS[kind] if not isinstance(item, dict) or key not in item]
    if lacking:
        hint = ", and no polygons to take it from" if lacking == ["bbox"] else ""
        raise ValueError(f"{where} has no {', '.join(lacking)}{hint}")
    for key, (expected, *types) in TYPES[kind].items():
        value = item.get(key)
        if key in item and not (type(value) in types and is_finite(value)):
            given = printable(repr(value)[:80])
            raise ValueError(f"{where} has the {key} {given}, expected {expected}")


def _read_ids(item: dict) -> None:
    """7 of 7.0, which is what tables make of whole numbers."""
    for key in ("id", *REFERENCES):
        value = item.get(key)
        if type(value) is float and value.is_integer() and abs(value) < EXACT:
            item[key] = int(value)


def _read_box(annotation: dict) -> None:
    """The box around the polygons of an annotation that has none."""
    if annotation.get("bbox") or not (points := polygon_points(annotation.get("segmentation"))):
        return
    x, y = points[::2], points[1::2]
    annotation["bbox"] = [min(x), min(y), max(x) - min(x), max(y) - min(y)]


def polygon_points(segmentation: object) -> list[float]:
    """x, y, x, y, ... of all points of polygons, or of one that is not in a list; else []."""
    if not isinstance(segmentation, list) or not segmentation:
        return []
    polygons = segmentation if isinstance(segmentation[0], list) else [segmentation]
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            return []
    points = [number for polygon in polygons for number in polygon]
    numbers = all(type(n) in (int, float) and is_finite(n) for n in points)
    return points if numbers else []


def _read_references(annotations: list[dict], key: str, ids: list) -> None:
    """Have annotations name images or categories exactly as these are called, 7 or "7"."""
    known = set(ids)
    as_text = Counter(str(each) for each in known)
    called = {str(each): each for each in known if as_text[str(each)] == 1}
    for annotation in annotations:
        if annotation[key] not in known:
            annotation[key] = called.get(str(annotation[key]), annotation[key])


def is_finite(value: object) -> bool:
    """Whether a number fits into a float; also of what is no number at all."""
    return not isinstance(value, int | float) or abs(value) <= sys.float_info.max


def _check_area_thresholds(info: object, path: Path) -> None:
    """ValueError where a file says at what areas small and medium objects end, and they do not."""
    if not isinstance(info, dict) or "area_thresholds" not in info:
        return
    given = info["area_thresholds"]
    numbers = isinstance(given, list) and all(type(n) in (int, float) for n in given)
    if not numbers or len(given) != 2 or not 0 < given[0] < given[1] <= sys.float_info.max:
        given = printable(repr(given)[:80])
        raise ValueError(
            f"{path}: info.area_thresholds must be two rising numbers above 0, got {given}"
        )
