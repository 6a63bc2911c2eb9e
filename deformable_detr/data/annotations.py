"""Reading annotation files in COCO format. Chapter 12."""

import json
import sys
from pathlib import Path
from types import NoneType

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


def read_annotations(path: Path) -> dict:
    """The content of a COCO annotation file; ValueError in one line where it is no such file."""
    try:
        content = json.loads(path.read_text("utf-8-sig"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no annotation file at {path}") from None
    except (ValueError, RecursionError) as error:  # the latter of lists within lists without end
        raise ValueError(f"{path} is not JSON: {error}") from None
    missing = [key for key in KEYS if not isinstance(content, dict) or key not in content]
    if missing:
        raise ValueError(f"{path} is not a COCO annotation file: it has no {', '.join(missing)}")
    for kind, keys in KEYS.items():
        if not isinstance(content[kind], list):
            raise ValueError(f"{path}: {kind} must be a list, got {type(content[kind]).__name__}")
        for i, item in enumerate(content[kind]):
            lacking = [key for key in keys if not isinstance(item, dict) or key not in item]
            if lacking:
                raise ValueError(f"{path}: {kind}[{i}] has no {', '.join(lacking)}")
            for key, (expected, *types) in TYPES[kind].items():
                value = item.get(key)
                if key in item and not (type(value) in types and is_finite(value)):
                    given = f"{kind}[{i}] has the {key} {value!r:.80}"
                    raise ValueError(f"{path}: {given}, expected {expected}")
        if len({type(item["id"]) for item in content[kind]}) > 1:
            raise ValueError(f"{path}: the ids of {kind} are numbers and strings, mixed")
    _check_area_thresholds(content.get("info"), path)
    return content


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
        raise ValueError(
            f"{path}: info.area_thresholds must be two rising numbers above 0, got {given!r:.80}"
        )
