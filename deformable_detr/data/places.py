"""Where a data set lies: its splits, their annotation files, and their pictures.
Chapter your_own_data."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from deformable_detr.data.images import SUFFIXES
from deformable_detr.data.names import counted, listed, printable

SPLITS = {  # by the names under which they are found
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
Place = tuple[Path, Path]  # the image folder and the annotation file of a split


def find_split(data_dir: Path | str, split: str) -> Place:
    """The image folder and annotation file of a split, in one of these layouts:

    DATA/train and DATA/annotations/train.json (or instances_train.json); as COCO comes,
    DATA/train2017 and DATA/annotations/instances_train2017.json; as Roboflow exports it,
    DATA/train/_annotations.coco.json beside the images. Images may lie in DATA/images/train or, of
    all splits, in DATA/images. val may be called valid or validation, as in SPLITS, and asked for
    by any of these names. FileNotFoundError where there is none, ValueError where there are
    several.
    """
    root = Path(data_dir)
    found = list(_places(root, split)) or list(_places(root, _as_in_splits(split)))
    if len(found) > 1:
        files = " and ".join(printable(file) for _, file in found)
        raise ValueError(f"{len(found)} annotation files for {split}, expected one: {files}")
    if not found:
        raise FileNotFoundError(_nothing_found(root, split))
    return found[0]


def has_split(data_dir: Path | str, split: str) -> bool:
    """Whether a data set has annotations for a split."""
    return any(_places(Path(data_dir), split))


def training_splits(data_dir: Path | str) -> dict[str, Place]:
    """The places of what a training reads: train, and val if it is there. FileNotFoundError without
    train."""
    names = ("train", "val") if has_split(data_dir, "val") else ("train",)
    return {name: find_split(data_dir, name) for name in names}


def all_splits(data_dir: Path | str) -> dict[str, Place]:
    """The places of all splits in SPLITS that a data set has; FileNotFoundError without any."""
    names = [name for name in SPLITS if has_split(data_dir, name)]
    return {name: find_split(data_dir, name) for name in names or ["train"]}


def without_annotations(data_dir: Path | str, split: str) -> str:
    """Where a split's pictures are there, and no annotations: one line that says so, or else ""."""
    root = Path(data_dir)
    if not has_split(root, split):
        for name in SPLITS.get(split, (split,)):
            for folder in (root / name, root / f"{name}2017", root / "images" / name):
                if count := count_pictures(folder):
                    return f"{folder} has {counted(count, 'picture')}, but no annotation file"
    return ""


def without_val(data_dir: Path | str) -> str:
    """What a training does without a val split, in one line; "" where there is one."""
    if has_split(data_dir, "val"):
        return ""
    why = without_annotations(data_dir, "val") or f"{data_dir} has no val split"
    return (
        f"{why}: AP is not measured while training, so that there are no best weights and no "
        "threshold, and patience does nothing"
    )


class Pictures:
    """The files that the entries of an annotation file name.

    A name may have backslashes, or folders in front that are not here, as train/1.png has, as long
    as one file answers to it.
    """

    def __init__(self, folder: Path | str, images: list[dict]) -> None:
        self.folder = Path(folder)
        counts = Counter(_parts(name).name for name in {image["file_name"] for image in images})
        self.shared = {name for name, count in counts.items() if count > 1}

    def path(self, file_name: str) -> Path:
        """Where it is; or would be, if it were there."""
        parts = _parts(file_name)
        places = [self.folder / file_name, self.folder / parts, self.folder.parent / parts]
        if parts.name not in self.shared:
            places.append(self.folder / parts.name)
        return next((place for place in places if exists(place)), places[0])


def exists(path: Path) -> bool:
    """Whether something is there; not so where no file can have that name."""
    try:
        return path.exists()
    except (OSError, ValueError):  # too long; with a zero byte
        return False


def is_file(path: Path) -> bool:
    """Whether a file is there that has an end, unlike a pipe."""
    return exists(path) and path.is_file()


def pictures_in(folder: Path) -> Iterator[Path]:
    """All pictures in a folder and below it, by their names."""
    if folder.is_dir():
        yield from (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def count_pictures(folder: Path) -> int:
    """How many pictures lie in a folder and below it."""
    return sum(1 for _ in pictures_in(folder))


def plain_name(file_name: str) -> str:
    """A file's name with slashes, as the same in every entry."""
    return str(_parts(file_name))


def _parts(file_name: str) -> PurePosixPath:
    return PurePosixPath(file_name.replace("\\", "/"))


def _as_in_splits(split: str) -> str:
    """The name in SPLITS of what is called by any of its names."""
    return next((name for name, names in SPLITS.items() if split in names), split)


def _places(root: Path, split: str) -> Iterator[Place]:
    folder = root / "annotations"
    for name in SPLITS.get(split, (split,)):
        for place in (
            (_images(root, name), folder / f"{name}.json"),
            (_images(root, name), folder / f"instances_{name}.json"),
            (root / f"{name}2017", folder / f"instances_{name}2017.json"),
            (root / name, root / name / "_annotations.coco.json"),
        ):
            if place[1].is_file():
                yield place


def _images(root: Path, name: str) -> Path:
    places = root / name, root / "images" / name, root / "images"
    return next((place for place in places if place.is_dir()), places[0])


def _nothing_found(root: Path, split: str) -> str:
    """Where annotations were expected, and what to do with what is there instead."""
    if not root.exists():
        return f"there is no folder {root}"
    if not root.is_dir():
        return f"{root} is a file, expected the folder of a data set"
    folder = root / "annotations"
    text = (
        f"no {split} annotations in {root}: expected {folder / f'{split}.json'} or "
        f"{folder / f'instances_{split}2017.json'} or {root / split / '_annotations.coco.json'}"
    )
    if any(root.rglob("*.xml")):
        return f"{text}; of Pascal VOC's XML files make them: deformable-detr convert {root} NEW"
    others = [path.relative_to(root) for path in (*root.glob("*.json"), *folder.glob("*.json"))]
    return text + (f"; there is {listed(others, 5)}" if others else "")
