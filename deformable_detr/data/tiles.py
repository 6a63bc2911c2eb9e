"""Large images in pieces: where these lie, and a data set made of them. Chapter your_own_data."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from PIL import Image
from tqdm import tqdm

from deformable_detr.data.coco import CocoDataset
from deformable_detr.data.names import counted, printable
from deformable_detr.data.places import Place, plain_name
from deformable_detr.files import removed_on_error, require_new, write_json, writing

OVERLAP = 0.25  # part of a tile that its neighbour has as well; smaller objects are whole in one
KEPT = 0.5  # part of an object from which it is one in a tile
LONGEST_NAME = 100  # characters of a file's name that its tiles have too

Tile = tuple[int, int, int, int]  # x0, y0, x1, y1


def tile_places(width: int, height: int, side: int, overlap: float = OVERLAP) -> list[Tile]:
    """Where the tiles of an image lie, (x0, y0, x1, y1) in pixels, row by row.

    All are side x side, or as large as the image where it is smaller; neighbours share at least
    `overlap` of their side. ValueError where side is below 1 or overlap not in [0, 0.9].
    """
    if side < 1 or not 0 <= overlap <= 0.9:
        expected = "a side of 1 pixel or more and an overlap in [0, 0.9]"
        raise ValueError(f"tiles need {expected}, got {side} and {overlap}")
    columns, rows = (_starts(length, side, overlap) for length in (width, height))
    return [(x, y, min(x + side, width), min(y + side, height)) for y in rows for x in columns]


def _starts(length: int, side: int, overlap: float) -> list[int]:
    """As few as cover the length, evenly spaced."""
    free = length - side
    if free <= 0:
        return [0]
    steps = -(-free // max(1, int(side * (1 - overlap))))
    return [round(i * free / steps) for i in range(steps + 1)]


def tile_dataset(
    source: Place, target: Place, side: int, overlap: float = OVERLAP, progress: bool = True
) -> str:
    """Write a data set whose images are the tiles of another's; one line says what it holds.

    source, target: the image folder and annotation file of a split. An object of which at least
    KEPT lies in a tile is one there, its box cut at the tile's end; one of which less does is a
    crowd, which training leaves out and evaluation does not judge, for it is neither an object nor
    background. Each image says whose tile it is ("tile_of", its id) and where it lies ("tile"). All
    tiles are kept, those without objects too. FileExistsError where the folder holds something, or
    the annotation file is there.
    """
    require_new(*target)
    dataset = CocoDataset(*source)
    tile_places(1, 1, side, overlap)  # refuses what makes no tiles
    require_new(target[0])  # reading may have taken long: another process may write there now
    with removed_on_error(target[0]):
        images, annotations = _cut_all(dataset, target[0], side, overlap, progress)
        kinds = {"images": images, "annotations": annotations, "categories": dataset.categories}
        write_json(target[1], {"info": dataset.info} | kinds)
    parts = sum(annotation["iscrowd"] for annotation in annotations)
    boxes = (
        f"{counted(len(annotations) - parts, 'box')}, and {parts} of crowds and of parts of objects"
    )
    return f"{counted(len(dataset), 'image')}, {counted(len(images), 'tile')}; {boxes}"


def _cut_all(
    dataset: CocoDataset, folder: Path, side: int, overlap: float, progress: bool
) -> tuple[list[dict], list[dict]]:
    """Write the tiles; their entries of "images" and "annotations"."""
    images, annotations = [], []
    ids = tqdm(dataset.image_ids, "tile", unit="image", leave=False, disable=not progress)
    for number, image_id in enumerate(ids, 1):
        picture = dataset.load_image(image_id)
        for tile in tile_places(*picture.size, side, overlap):
            name = _tile_name(dataset.coco.imgs[image_id]["file_name"], number, tile)
            _save(picture.crop(tile), folder / name)
            size = {"width": tile[2] - tile[0], "height": tile[3] - tile[1]}
            whose = {"tile_of": image_id, "tile": list(tile)}
            images.append({"id": len(images) + 1, "file_name": name} | size | whose)
            for annotation in _cut(dataset.coco.imgToAnns[image_id], tile):
                place = {"id": len(annotations) + 1, "image_id": images[-1]["id"]}
                annotations.append(annotation | place)
    return images, annotations


def _cut(annotations: list[dict], tile: Tile) -> Iterator[dict]:
    """What of an image's objects lies in a tile, in its pixels."""
    for annotation in annotations:
        x, y, width, height = annotation["bbox"]
        x0, y0 = max(x, tile[0]), max(y, tile[1])
        x1, y1 = min(x + width, tile[2]), min(y + height, tile[3])
        if x1 <= x0 or y1 <= y0:
            continue
        part = (x1 - x0) * (y1 - y0) / (width * height)
        yield {
            "category_id": annotation["category_id"],
            "bbox": [x0 - tile[0], y0 - tile[1], x1 - x0, y1 - y0],
            "area": annotation["area"] * part,
            "iscrowd": int(annotation["iscrowd"] or part < KEPT),
        }


def _tile_name(file_name: str, number: int, tile: Tile) -> str:
    """Of a picture's file, its number and the tile's corner: without folders, and no two alike."""
    path = PurePosixPath(plain_name(file_name))
    suffix = ".jpg" if path.suffix.lower() in (".jpg", ".jpeg", ".jfif", ".webp") else ".png"
    return f"{path.stem[:LONGEST_NAME]}_{number}_{tile[0]}_{tile[1]}{suffix}"


def _save(picture: Image.Image, path: Path) -> None:
    with writing(path):
        try:
            picture.save(path, quality=95)  # which PNG does without
        except ValueError as error:
            raise OSError(printable(error)) from None
