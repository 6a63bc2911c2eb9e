"""Pascal VOC's XML files, of all splits at once, as COCO's format."""

import json
import random
from pathlib import Path

import pytest
from PIL import Image

from deformable_detr.cli import main
from deformable_detr.data.checks import check_dataset
from deformable_detr.data.coco import CocoDataset, find_split
from deformable_detr.data.places import training_splits
from deformable_detr.data.split_checks import check_data
from deformable_detr.data.voc import convert_voc, find_voc, read_xml

NAMES = ("zebra", "cat", "dog", "bird")
BOX = {"xmin": 7, "ymin": 11, "xmax": 30, "ymax": 22}  # counted from one, the last pixel included


def xml(*names, box=BOX, difficult=0, size=(64, 48)):
    corners = "".join(f"<{side}>{value}</{side}>" for side, value in box.items())
    objects = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult>"
        f"<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
        f"<bndbox>{corners}</bndbox></object>"
        for name in names
    )
    width, height = size
    sizes = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation><filename>of another machine.jpg</filename>{sizes}{objects}</annotation>"


def write_pair(pictures, files, stem, *names, **options):
    for folder in (pictures, files):
        folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 48), "white").save(pictures / f"{stem}.png")
    (files / f"{stem}.xml").write_text(xml(*names, **options))


def write_voc(root, layout, names):
    """names: by split, those of the objects of each picture."""
    for split, of_split in names.items():
        folder = {
            "beside": (root / split,) * 2,
            "apart": (root / split / "images", root / split / "annotations"),
            "voc": (root / "JPEGImages", root / "Annotations"),
        }[layout]
        stems = [f"{split}_{i}" for i in range(len(of_split))]
        for stem, of_picture in zip(stems, of_split, strict=True):
            write_pair(*folder, stem, *of_picture)
        if layout == "voc":
            lists = root / "ImageSets" / "Main"
            lists.mkdir(parents=True, exist_ok=True)
            (lists / f"{split}.txt").write_text("\n".join(stems))
            (lists / f"cat_{split}.txt").write_text("".join(f"{stem}  1\n" for stem in stems))
            masks = root / "SegmentationClass"
            masks.mkdir(exist_ok=True)
            Image.new("L", (64, 48)).save(masks / f"{stems[0]}.png")


@pytest.mark.parametrize("layout", ["beside", "apart", "voc"])
def test_all_splits_have_one_order_of_classes(tmp_path, layout):
    """Numbered in each split by first appearance they would be 1 dog, and 1 bird."""
    val = "val" if layout == "voc" else "valid"
    names = {"train": [["dog"], ["cat", "zebra"], []], val: [["bird", "dog"]], "test": [["zebra"]]}
    write_voc(tmp_path / "voc", layout, names)
    lines = convert_voc(tmp_path / "voc", tmp_path / "coco")
    assert lines == [
        "train: 3 images, 3 boxes",
        "val: 1 image, 2 boxes",
        "test: 1 image, 1 box",
        "4 classes, in all splits: bird, cat, dog, zebra",
    ]
    dataset = CocoDataset(*find_split(tmp_path / "coco", "train"))
    assert dataset.categories == [
        {"id": i, "name": name} for i, name in enumerate(sorted(NAMES), 1)
    ]
    target = dataset[0][1]
    assert target.original_size == (48, 64) and target.labels.tolist() == [2]
    assert dataset.coco.imgToAnns[1][0]["bbox"] == [6, 10, 24, 12]
    for _, faults in check_data(training_splits(tmp_path / "coco")):
        assert not [fault for fault in faults if fault.fatal]


def test_any_splits_agree(tmp_path):
    rng = random.Random(0)
    for trial in range(20):
        names = {s: [rng.choices(NAMES, k=2) for _ in range(2)] for s in ("train", "val")}
        write_voc(tmp_path / f"{trial}", "beside", names)
        convert_voc(tmp_path / f"{trial}", tmp_path / f"coco{trial}")
        first, second = (
            json.loads((tmp_path / f"coco{trial}" / "annotations" / f"{s}.json").read_text())
            for s in names
        )
        assert first["categories"] == second["categories"]


def test_what_belongs_to_nothing_is_said_and_left_out(tmp_path, capsys):
    """A picture without an XML file may show nothing, or be left to do: nobody knows."""
    source = tmp_path / "voc"
    write_voc(source, "beside", {"train": [["dog"]]})
    write_pair(source / "train", source / "train", "hard", "dog", difficult=1)
    Image.new("RGB", (8, 8)).save(source / "train" / "alone.png")
    (source / "train" / "lost.xml").write_text(xml("cat"))
    assert main(["convert", str(source), str(tmp_path / "coco")]) == 0
    text = capsys.readouterr().out
    assert "train: 2 images, 2 boxes, 1 of them difficult, which become crowds\n" in text
    assert "train: 1 picture without an XML file left out: alone.png; " in text
    assert "train: 1 XML file without a picture left out: lost.xml\n" in text
    assert "1 class, in all splits: dog\n" in text
    assert sorted(p.name for p in (tmp_path / "coco" / "train").iterdir()) == [
        *("hard.png", "train_0.png")
    ]
    assert check_dataset(*find_split(tmp_path / "coco", "train")) == []


def test_of_two_pictures_of_one_name_the_xml_file_says_which_is_meant(tmp_path, capsys):
    source = tmp_path / "voc"
    write_voc(source, "beside", {"train": [["dog"], ["cat"]]})
    Image.new("RGB", (64, 48), "black").save(source / "train" / "train_0.tif")
    file = source / "train" / "train_0.xml"
    file.write_text(file.read_text().replace("of another machine.jpg", " train_0.tif "))
    assert main(["convert", str(source), str(tmp_path / "coco")]) == 0
    content = json.loads((tmp_path / "coco" / "annotations" / "train.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["train_0.tif", "train_1.png"]
    assert not (tmp_path / "coco" / "train" / "train_0.png").exists()
    assert "1 picture without an XML file left out: train_0.png" in capsys.readouterr().out


WRONG = {
    "<annotation>": "is not XML: ",
    xml("dog", box=BOX | {"xmin": "left"}): "bndbox/xmin must be a number, got 'left'",
    xml("dog", box=BOX | {"xmax": "nan"}): "bndbox/xmax must be a number, got 'nan'",
    xml("dog", box={"xmin": 1}): "bndbox/ymin must be a number, got ''",
    xml("  "): "an object has no name",
}


@pytest.mark.parametrize("text", WRONG, ids=WRONG.values())
def test_what_is_wrong_in_an_xml_file_is_one_line(tmp_path, capsys, text):
    write_voc(tmp_path / "voc", "beside", {"train": [["dog"]]})
    (tmp_path / "voc" / "train" / "train_0.xml").write_text(text)
    assert main(["convert", str(tmp_path / "voc"), str(tmp_path / "coco")]) == 2
    error = capsys.readouterr().err
    assert WRONG[text] in error and "train_0.xml" in error and error.count("\n") == 1
    assert not (tmp_path / "coco").exists()


def test_corners_may_be_swapped_and_sizes_unknown(tmp_path):
    path = tmp_path / "x.xml"
    path.write_text(xml("dog", box=dict(zip(BOX, (30, 22, 7.5, 0), strict=True)), size=(0, 0)))
    (box,) = read_xml(path)["boxes"]
    assert box["bbox"] == [6.5, 0, 23.5, 22] and read_xml(path)["size"] is None


def test_a_list_from_windows_with_spaces_in_names(tmp_path):
    write_voc(tmp_path, "voc", {"train": [["dog"]]})
    write_pair(tmp_path / "JPEGImages", tmp_path / "Annotations", "große katze 2", "cat")
    listed = tmp_path / "ImageSets" / "Main" / "train.txt"
    listed.write_bytes("\ufefftrain_0\r\ngroße katze 2\r\n".encode())
    pairs = find_voc(tmp_path)["train"].pairs
    assert [picture.stem for picture, _ in pairs] == ["große katze 2", "train_0"]


def test_folders_that_cannot_be_converted(tmp_path, capsys):
    write_voc(tmp_path / "voc", "beside", {"train": [["dog"]], "val": [["dog"]]})
    for source, target, message in (
        ("voc", "voc", "is there already: give another folder"),
        ("no", "coco", "there is no folder"),
        ("empty", "coco", "no picture with an XML file of its name"),
        ("both", "coco", "are both val, expected one"),
        ("same", "coco", "have one name, so that it is not clear which belong together"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        for name in ("val", "valid"):
            (tmp_path / "both" / name).mkdir(parents=True, exist_ok=True)
        for name in ("a", "b"):
            write_pair(tmp_path / "same" / name, tmp_path / "same" / name, "1", "dog")
        assert main(["convert", str(tmp_path / source), str(tmp_path / target)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "coco").exists()


def test_the_shipped_trees_are_whole(tmp_path):
    said = convert_voc(Path(__file__).parents[1] / "data" / "trees", tmp_path / "trees")
    assert [line.split(", ")[1] for line in said[:3]] == ["366 boxes", "209 boxes", "279 boxes"]
    for split in ("train", "val", "test"):
        faults = check_dataset(*find_split(tmp_path / "trees", split))
        assert not [fault for fault in faults if fault.fatal]
