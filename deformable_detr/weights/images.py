"""How images are prepared, in Hugging Face's folders: preprocessor_config.json. Chapter
published_weights.

Ours resize to a short side, keep proportions, and normalise by ImageNet's colours, as the published
detectors do. What is prepared otherwise there cannot be done here, and is said.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from deformable_detr.data.names import printable
from deformable_detr.data.preparation import PREPARATIONS, preparation_of
from deformable_detr.data.transforms import MEAN, SHORT_SIDE, STD
from deformable_detr.files import write_atomically
from deformable_detr.models import BaseDetector
from deformable_detr.weights.reading import read_json, require_regular

PREPROCESSOR, CARD = "preprocessor_config.json", "card.json"  # files of a folder
LONG_SIDE = 1333  # of an image of SHORT_SIDE, at most; others are in proportion
BILINEAR = 2  # Pillow's number
UNRESIZED = next(name for name, each in PREPARATIONS.items() if not each.resizes)


def write_preparation(folder: Path, model: BaseDetector, card: dict, processor: str) -> None:
    """Write how images are prepared, as transformers reads it, and the card as a whole beside it.

    processor: the class in transformers.
    """
    content = {"image_processor_type": processor} | to_preprocessor(model, card)
    for name, each in ((PREPROCESSOR, content), (CARD, card)):
        text = json.dumps(each, indent=2) + "\n"
        write_atomically(folder / name, lambda t, text=text: Path(t).write_text(text, "utf-8"))


def to_preprocessor(model: BaseDetector, card: dict) -> dict[str, object]:
    """The content of preprocessor_config.json. card: of a file of ours, as {"short_side": 480}."""
    name = card.get("transforms", preparation_of(model.config.backbone))
    short = card.get("short_side", SHORT_SIDE)
    return {
        "format": "coco_detection",
        "do_resize": PREPARATIONS[name].resizes,
        "size": {"shortest_edge": short, "longest_edge": _longest(short)},
        "resample": BILINEAR,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "do_pad": True,
    }


def read_preparation(folder: Path) -> tuple[dict, list[str]]:
    """The card of a folder, and what of its preprocessor_config.json is not done here, in words.

    In what both say, the latter is right. ValueError, in one line, where a file means nothing.
    """
    card, given = _read(folder / CARD), _read(folder / PREPROCESSOR)
    if not given:
        return card, []
    try:
        theirs, said = from_preprocessor(given)
    except ValueError as error:
        raise ValueError(f"{folder / PREPROCESSOR} is not one we can use: {error}") from None
    name = card.get("transforms")
    known = isinstance(name, str) and name in PREPARATIONS
    if known and PREPARATIONS[name].resizes == ("short_side" in theirs):
        theirs.pop("transforms", None)  # which the card knows more exactly
    else:
        card.pop("transforms", None)
    return card | theirs, said


def from_preprocessor(content: dict) -> tuple[dict[str, object], list[str]]:
    """Entries of a card, and what of a preprocessor_config.json is not done here; ValueError where
    its size means nothing."""
    if not content.get("do_resize", True):
        return {"transforms": UNRESIZED}, list(_other_colours(content))
    size = content.get("size", SHORT_SIDE)
    if type(size) is int:  # as old files have it
        size = {"shortest_edge": size, "longest_edge": content.get("max_size", LONG_SIDE)}
    short, said = _short_side(size)
    return {"short_side": short}, [*said, *_other_colours(content)]


def _short_side(size: object) -> tuple[int, list[str]]:
    """What images are resized to, and what of it is not done here."""
    sides = {}
    if isinstance(size, dict):
        sides = {name: value for name, value in size.items() if type(value) is int and value > 0}
    if "shortest_edge" in sides:
        short, ours = sides["shortest_edge"], _longest(sides["shortest_edge"])
        theirs = sides.get("longest_edge", ours)
        if abs(theirs - ours) <= 1:  # which rounding can make
            return short, []
        return short, [f"its images have a longer side of at most {theirs} pixels, here {ours}"]
    if {"height", "width"} <= sides.keys():
        height, width = sides["height"], sides["width"]
        short = min(height, width)
        text = f"its images have {height} x {width} pixels, here a shorter side of {short}"
        return short, [text]
    raise ValueError(f"its size is {printable(repr(size), 80)}, expected shortest_edge in pixels")


def _other_colours(content: dict) -> Iterator[str]:
    """What of the colours is not done here."""
    for name, ours in (("do_rescale", True), ("do_normalize", True), ("resample", BILINEAR)):
        if content.get(name, ours) != ours:
            yield f"its {name} is {printable(repr(content[name]), 40)}, here {ours}"
    for name, ours in (("image_mean", MEAN), ("image_std", STD)):
        given = content.get(name, ours)
        numbers = isinstance(given, list | tuple) and all(type(x) in (int, float) for x in given)
        if not numbers or [round(x, 3) for x in given] != list(ours):
            yield f"its {name} is {printable(repr(given), 80)}, here {list(ours)}"


def _longest(short: int) -> int:
    """The longer side of an image with that short side, at most, in pixels."""
    return round(LONG_SIDE * short / SHORT_SIDE)


def _read(path: Path) -> dict:
    """The object in a JSON file; empty where there is no such file."""
    if not path.exists():
        return {}
    require_regular(path)
    content = read_json(path.read_text("utf-8", "replace"), path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object, got {printable(repr(content), 80)}")
    return content
