"""Crowns of trees from the air, in Pascal VOC's format: `python data/make_trees.py FOLDER`.

FOLDER is the unpacked wheel of deepforest (`pip download --no-deps deepforest`, then unzip): two
aerial pictures of Yellowstone with a box around every crown. One is cut in two, train and val, so
that no tree is in both; the other, 13 km from there, is test.
"""

import argparse
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from PIL import Image

DATA = Path(__file__).resolve().parent
SCENES = {
    "west": "2019_YELL_2_528000_4978000_image_crop2",
    "east": "2019_YELL_2_541000_4977000_image_crop",
}
CUTS = {  # split: scene, left and right edge as parts of its width
    "train": ("west", 0.0, 0.75),
    "val": ("west", 0.75, 1.0),
    "test": ("east", 0.0, 1.0),
}
QUALITY = 92  # of the JPEG files; the scenes are 18 MB as PNG


def boxes_inside(annotation: ElementTree.Element, left: int, right: int) -> list[list[int]]:
    """The boxes that lie at least by half between two columns, cut there; xyxy in the piece."""
    found = []
    for box in annotation.iter("bndbox"):
        x0, y0, x1, y1 = (int(box.findtext(name)) for name in ("xmin", "ymin", "xmax", "ymax"))
        inside = min(x1, right) - max(x0, left)
        if inside >= (x1 - x0) / 2:
            found.append([max(x0, left) - left, y0, min(x1, right) - left, y1])
    return found


def write_annotation(path: Path, picture: Path, size: tuple[int, int], boxes: list) -> None:
    """One XML file as VOC has it."""
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "filename").text = picture.name
    element = ElementTree.SubElement(root, "size")
    for name, value in zip(("width", "height", "depth"), (*size, 3), strict=True):
        ElementTree.SubElement(element, name).text = str(value)
    for corners in boxes:
        item = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(item, "name").text = "tree"
        box = ElementTree.SubElement(item, "bndbox")
        for name, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True):
            ElementTree.SubElement(box, name).text = str(value)
    ElementTree.indent(root)
    path.write_text(ElementTree.tostring(root, encoding="unicode") + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Write data/trees/{train,val,test}: a picture and an XML file each."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    source = parser.parse_args(arguments).folder / "deepforest" / "data"
    for split, (scene, start, end) in CUTS.items():
        picture = Image.open(source / f"{SCENES[scene]}.png").convert("RGB")
        annotation = ElementTree.parse(source / f"{SCENES[scene]}.xml").getroot()
        left, right = round(start * picture.width), round(end * picture.width)
        piece = picture.crop((left, 0, right, picture.height))
        folder = DATA / "trees" / split
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{scene}_{split}.jpg"
        piece.save(file, quality=QUALITY, subsampling=0)
        boxes = boxes_inside(annotation, left, right)
        write_annotation(file.with_suffix(".xml"), file, piece.size, boxes)
        print(f"{split}: {piece.width} x {piece.height}, {len(boxes)} trees")
    return 0


if __name__ == "__main__":
    sys.exit(main())
