"""Pascal VOC's annotations, one XML file for each picture, as COCO's. Chapter your_own_data."""

import math
import shutil
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from deformable_detr.data.names import counted, listed, printable
from deformable_detr.data.places import SPLITS, pictures_in
from deformable_detr.files import removed_on_error, require_folder, require_new, write_json

SIDES = ("xmin", "ymin", "xmax", "ymax")


@dataclass
class VocSplit:
    """A split's pictures with their XML files, and the names of what lacks the other."""

    pairs: list[tuple[Path, Path]] = field(default_factory=list)
    pictures_alone: list[str] = field(default_factory=list)
    files_alone: list[str] = field(default_factory=list)


def convert_voc(source: Path | str, target: Path | str) -> list[str]:
    """Write a folder of Pascal VOC's format as one of COCO's; returns lines that say what was done.

    source: with folders train, valid or val, and test, in each the pictures and XML files, beside
    one another or in folders of their own; or as VOC itself comes, JPEGImages, Annotations and
    ImageSets/Main/train.txt; or without splits, when all is train. All splits number the classes of
    all of them, by name, from 1. Objects that are marked difficult become crowds, which training
    leaves out and metrics forgive, as VOC's own does. Pictures without an XML file are left out.
    Raises ValueError and OSError, in one line, with the file and what is wrong in it; of what was
    written until then nothing stays.
    """
    source, target = Path(source), Path(target)
    require_folder(target)
    require_new(target)
    splits = find_voc(source)
    read = {
        name: [(picture, read_xml(file)) for picture, file in split.pairs]
        for name, split in splits.items()
    }
    names = {o["name"] for pairs in read.values() for _, content in pairs for o in content["boxes"]}
    categories = {name: i for i, name in enumerate(sorted(names), 1)}
    require_new(target)  # what another process has written meanwhile stays
    with removed_on_error(target):
        for name, pairs in read.items():
            (target / name).mkdir()
            for picture, _ in pairs:
                shutil.copy(picture, target / name)
            write_json(target / "annotations" / f"{name}.json", as_coco(pairs, categories))
    lines = [line for name in splits for line in _said(name, splits[name], read[name])]
    return [*lines, f"{counted(len(categories), 'class')}, in all splits: {listed(categories, 30)}"]


def find_voc(source: Path) -> dict[str, VocSplit]:
    """The pictures and XML files of each split; ValueError where there are none."""
    if not source.is_dir():
        raise ValueError(f"there is no folder {source}")
    if (source / "ImageSets" / "Main").is_dir():
        found = _as_voc_comes(source)
    else:
        folders = {split: folder for split in SPLITS if (folder := _folder(source, split))}
        found = {
            split: _pairs(by_stem(pictures_in(folder)), by_stem(folder.rglob("*.xml")))
            for split, folder in (folders or {"train": source}).items()
        }
    if not any(split.pairs for split in found.values()):
        raise ValueError(f"no picture with an XML file of its name in {source}")
    return found


def _as_voc_comes(source: Path) -> dict[str, VocSplit]:
    """Of all its lists, those with the name of a split; there are others for each class."""
    pictures = by_stem(pictures_in(source / "JPEGImages"))
    files = by_stem((source / "Annotations").rglob("*.xml"))
    found = {}
    for split in SPLITS:
        if (file := source / "ImageSets" / "Main" / f"{split}.txt").is_file():
            lines = file.read_text("utf-8-sig").splitlines()  # Windows' editors mark it
            names = (line.strip() for line in lines if line.strip())
            # a name, which may have spaces, or one with a number behind, as VOC's lists of a class
            wanted = {name for each in names for name in (each, each.split()[0])}
            listed_ones = ({k: v for k, v in of.items() if k in wanted} for of in (pictures, files))
            found[split] = _pairs(*listed_ones)
    return found


def _folder(source: Path, split: str) -> Path | None:
    """The folder of a split, under any of its names; ValueError where there are two."""
    folders = [source / name for name in SPLITS[split] if (source / name).is_dir()]
    if len(folders) > 1:
        raise ValueError(f"{' and '.join(map(str, folders))} are both {split}, expected one")
    return folders[0] if folders else None


def by_stem(paths: Iterable[Path]) -> dict[str, list[Path]]:
    """Files by their names without endings, which several may have."""
    found: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(paths):
        found[path.stem].append(path)
    return found


def _pairs(pictures: dict[str, list[Path]], files: dict[str, list[Path]]) -> VocSplit:
    pairs = [_pair(found, files[stem]) for stem, found in pictures.items() if stem in files]
    paired = {picture for picture, _ in pairs}
    alone = [path for found in pictures.values() for path in found if path not in paired]
    lost = [path for stem, found in files.items() if stem not in pictures for path in found]
    return VocSplit(pairs, [path.name for path in alone], [path.name for path in lost])


def _pair(pictures: list[Path], files: list[Path]) -> tuple[Path, Path]:
    """The picture of an XML file: of several, as a.png and a.tif, the one that its <filename>
    names. ValueError where that does not decide."""
    if len(pictures) > 1 and len(files) == 1:
        name = (_root(files[0]).findtext("filename") or "").strip()
        pictures = [path for path in pictures if path.name == name] or pictures
    several = pictures if len(pictures) > 1 else files
    if len(several) > 1:
        both = f"{printable(several[0])} and {printable(several[1])}"
        raise ValueError(f"{both} have one name, so that it is not clear which belong together")
    return pictures[0], files[0]


def read_xml(path: Path) -> dict:
    """What an XML file says: "size", width and height or None, and "boxes", each with its "name",
    "bbox" (x, y, width, height from the corner of the image) and "difficult"."""
    root = _root(path)
    size = tuple(_number(root, f"size/{side}", path, default=0) for side in ("width", "height"))
    return {
        "size": tuple(int(side) for side in size) if min(size) > 0 else None,
        "boxes": [_read_object(each, path) for each in root.iter("object")],
    }


def _root(path: Path) -> ET.Element:
    try:
        return ET.parse(path).getroot()
    except (ET.ParseError, ValueError) as error:
        raise ValueError(f"{printable(path)} is not XML: {printable(error)}") from None


def _read_object(element: ET.Element, path: Path) -> dict:
    """VOC counts pixels from 1, and a box includes its last pixel."""
    if not (name := (element.findtext("name") or "").strip()):
        raise ValueError(f"{printable(path)}: an object has no name")
    x0, y0, x1, y1 = (_number(element, f"bndbox/{side}", path) for side in SIDES)
    (x0, x1), (y0, y1) = sorted((x0, x1)), sorted((y0, y1))
    box = [max(x0 - 1, 0), max(y0 - 1, 0), x1, y1]
    return {
        "name": name,
        "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
        "difficult": _number(element, "difficult", path, default=0) != 0,
    }


def _number(element: ET.Element, place: str, path: Path, default: float | None = None) -> float:
    text = (element.findtext(place) or "").strip()
    if not text and default is not None:
        return default
    try:
        number = float(text)
        if math.isfinite(number):
            return int(number) if number.is_integer() else number
        raise ValueError
    except ValueError:
        raise ValueError(
            f"{printable(path)}: {place} must be a number, got '{printable(text)}'"
        ) from None


def as_coco(pairs: list[tuple[Path, dict]], categories: dict[str, int]) -> dict:
    """The content of an annotation file in COCO format."""
    images, annotations = [], []
    for image_id, (picture, content) in enumerate(pairs, 1):
        width, height = content["size"] or (None, None)
        images.append({"id": image_id, "file_name": picture.name, "width": width, "height": height})
        for each in content["boxes"]:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": categories[each["name"]],
                    "bbox": each["bbox"],
                    "area": each["bbox"][2] * each["bbox"][3],
                    "iscrowd": int(each["difficult"]),
                }
            )
    named = [{"id": number, "name": name} for name, number in categories.items()]
    return {"images": images, "annotations": annotations, "categories": named}


def _said(name: str, split: VocSplit, pairs: list[tuple[Path, dict]]) -> Iterator[str]:
    boxes = [each for _, content in pairs for each in content["boxes"]]
    difficult = sum(each["difficult"] for each in boxes)
    crowds = f", {difficult} of them difficult, which become crowds" if difficult else ""
    yield f"{name}: {counted(len(pairs), 'image')}, {counted(len(boxes), 'box')}{crowds}"
    if alone := split.pictures_alone:
        count = counted(len(alone), "picture")
        yield (
            f"{name}: {count} without an XML file left out: {listed(alone, 3)}; for one that "
            "shows nothing, write an XML file without objects"
        )
    if alone := split.files_alone:
        count = counted(len(alone), "XML file")
        yield f"{name}: {count} without a picture left out: {listed(alone, 3)}"
