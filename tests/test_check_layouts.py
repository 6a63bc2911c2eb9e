"""Data as other tools write it: read where it has one reading, else refused in one line."""

import json
import shutil

import pytest
import torch

from deformable_detr.cli import main
from deformable_detr.data.annotations import polygon_points, read_annotations
from deformable_detr.data.checks import check_dataset
from deformable_detr.data.coco import CocoDataset, find_split, has_split
from deformable_detr.data.places import Pictures, all_splits, training_splits, without_val
from deformable_detr.evaluation.coco import predict_dataset, score
from deformable_detr.models import build_model
from tests.conftest import TINY, save_annotations


def rewrite(root, change, split="train"):
    content = json.loads((root / "annotations" / f"{split}.json").read_text())
    change(content)
    save_annotations(root, content, split)


def load(root, split="train"):
    return CocoDataset(*find_split(root, split))


def move(root, layout):
    """The same data, as others lay it out."""
    for split, name in (("train", "train"), ("val", "valid")):
        boxes = root / "annotations" / f"{split}.json"
        if layout == "roboflow":
            boxes.rename(root / split / "_annotations.coco.json")
            (root / split).rename(root / name)
        elif layout == "valid":
            (root / split).rename(root / name)
            boxes.rename(root / "annotations" / f"{name}.json")
        elif layout == "instances":
            boxes.rename(root / "annotations" / f"instances_{split}.json")
        elif layout == "images/train":
            (root / "images").mkdir(exist_ok=True)
            (root / split).rename(root / "images" / split)
        elif layout == "images":  # of all splits, in one folder
            shutil.copytree(root / split, root / "images", dirs_exist_ok=True)
            shutil.rmtree(root / split)
        elif layout == "2017":
            (root / split).rename(root / f"{split}2017")
            boxes.rename(root / "annotations" / f"instances_{split}2017.json")


@pytest.mark.parametrize("name", ["valid", "validation", "val"])
def test_a_split_may_be_asked_for_by_any_of_its_names(coco, name):
    assert find_split(coco, name) == find_split(coco, "val")
    shutil.copytree(coco / "val", coco / "valid")
    (coco / "annotations" / "val.json").rename(coco / "annotations" / "valid.json")
    assert find_split(coco, name)[1] == coco / "annotations" / "valid.json"
    with pytest.raises(FileNotFoundError, match="no dev annotations in"):
        find_split(coco, "dev")


LAYOUTS = ["roboflow", "valid", "instances", "images/train", "images", "2017"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_that_are_known(coco, layout):
    before = [load(coco, split)[i][1] for split in ("train", "val") for i in (0, 1)]
    move(coco, layout)
    after = [load(coco, split)[i][1] for split in ("train", "val") for i in (0, 1)]
    for one, other in zip(before, after, strict=True):
        assert one.image_id == other.image_id and torch.equal(one.boxes, other.boxes)
    assert set(training_splits(coco)) == set(all_splits(coco)) == {"train", "val"}
    assert without_val(coco) == ""


def test_two_readings_are_refused(coco, capsys):
    shutil.copytree(coco / "val", coco / "valid")
    shutil.copy(coco / "annotations" / "val.json", coco / "valid" / "_annotations.coco.json")
    with pytest.raises(ValueError, match=r"2 annotation files for val, expected one: .* and "):
        find_split(coco, "val")
    assert has_split(coco, "val")
    assert main(["check", str(coco)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_where_nothing_is_found_the_remedy_is_said(tmp_path):
    for make, message in (
        (lambda: None, r"no train annotations in .*: expected .*train\.json or .*"),
        (lambda: (tmp_path / "labels.json").write_text("{}"), "; there is labels.json"),
        (lambda: (tmp_path / "a.xml").write_text(""), "deformable-detr convert .* NEW"),
    ):
        make()
        with pytest.raises(FileNotFoundError, match=message) as error:
            find_split(tmp_path, "train")
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        find_split(tmp_path / "no", "train")


NAMES = {
    "a folder of the data": "train/{}",
    "folders that are not here": "home/somebody/pictures/{}",
    "backslashes": "train\\{}",
    "a drive": "C:\\pictures\\{}",
    "a root": "/pictures/somebody/{}",
}


@pytest.mark.parametrize("kind", NAMES)
def test_file_names_with_folders_in_front(coco, kind):
    rewrite(
        coco,
        lambda c: [i.update(file_name=NAMES[kind].format(i["file_name"])) for i in c["images"]],
    )
    assert check_dataset(*find_split(coco, "train")) == []
    assert load(coco)[3][0].shape == (3, 48, 64)


def test_a_name_that_two_files_have_is_not_shortened(coco):
    """a/1.png and b/1.png are two pictures; 1.png is neither."""
    shutil.copy(coco / "train" / "100.png", coco / "train" / "1.png")
    pictures = Pictures(coco / "train", [{"file_name": name} for name in ("a/1.png", "b/1.png")])
    assert pictures.path("a/1.png") == coco / "train" / "a" / "1.png"
    (coco / "train" / "a").mkdir()
    shutil.copy(coco / "train" / "100.png", coco / "train" / "a" / "1.png")
    assert pictures.path("a\\1.png") == coco / "train" / "a" / "1.png"
    once = Pictures(coco / "train", [{"file_name": "c/1.png"}] * 2)  # one file under two ids
    assert once.path("c/1.png") == coco / "train" / "1.png"


@pytest.mark.parametrize("given", ["missing", "empty", "null", "flat"])
def test_boxes_surround_polygons(coco, given):
    before = read_annotations(find_split(coco, "train")[1])["annotations"]

    def change(content):
        for a in content["annotations"]:
            x, y, w, h = a["bbox"]
            first, second = (
                [x, y, x + w, y + 1, x + 2, y + 3],
                [x + 1, y + h, x + 2, y, x + 3, y + 2],
            )
            a["segmentation"] = [first, second] if given != "flat" else first + second
            a["bbox"] = {"empty": [], "null": None}.get(given)
            if given in ("missing", "flat"):
                del a["bbox"]

    rewrite(coco, change)
    after = read_annotations(find_split(coco, "train")[1])["annotations"]
    assert [a["bbox"] for a in after] == [a["bbox"] for a in before]
    assert check_dataset(*find_split(coco, "train")) == []


@pytest.mark.parametrize(
    "segmentation",
    [None, [], {"size": [4, 4], "counts": "x"}, [[1, 2, 3, 4]], [[1, 2, 3, 4, 5, "6"]], "x", [[]]],
    ids=repr,
)
def test_what_is_no_polygon_gives_no_box(coco, segmentation):
    assert polygon_points(segmentation) == []

    def change(content):
        del content["annotations"][1]["bbox"]
        content["annotations"][1]["segmentation"] = segmentation

    rewrite(coco, change)
    with pytest.raises(ValueError, match=r"\[1\] has no bbox, and no polygons to take it from"):
        load(coco)


def to_text(content):
    for image in content["images"]:
        image["id"] = str(image["id"])
    for category in content["categories"]:
        category["id"] = str(category["id"])


def to_floats(content):
    for a in content["annotations"]:
        a["image_id"], a["category_id"] = float(a["image_id"]), float(a["category_id"])


def mix(content):
    """Half of the ids are text."""
    for item in (*content["images"][::2], *content["categories"][::2]):
        item["id"] = f"x{item['id']}"
    for a in content["annotations"]:
        for key, kind in (("image_id", "images"), ("category_id", "categories")):
            known = {item["id"] for item in content[kind]}
            a[key] = a[key] if a[key] in known else f"x{a[key]}"


@pytest.mark.parametrize("change", [to_text, to_floats, mix], ids=lambda f: f.__name__)
def test_ids_may_be_text_or_both_and_come_back_as_they_are(coco, change):
    """From the file to the metrics: sorted, in targets, in results. A perfect detector has AP 1."""
    rewrite(coco, change)
    assert check_dataset(*find_split(coco, "train")) == []
    dataset = load(coco)
    ids = [image["id"] for image in dataset.coco.dataset["images"]]
    assert sorted(map(str, dataset.image_ids)) == sorted(map(str, ids))
    assert [dataset[i][1].image_id for i in range(len(dataset))] == dataset.image_ids
    perfect = [
        {k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 1.0}
        for a in dataset.coco.dataset["annotations"]
    ]
    assert score(perfect, dataset).ap == 1
    found = predict_dataset(build_model(TINY), dataset, progress=False)
    assert {result["image_id"] for result in found} == set(ids)
    assert {r["category_id"] for r in found} <= {c["id"] for c in dataset.categories}


def test_an_image_id_that_reads_as_two_is_a_fault(coco):
    """7 and "7" are two ids to us, and one to whatever reads our results."""
    rewrite(coco, lambda c: c["images"][5].update(id="100"))
    faults = {fault.kind: str(fault) for fault in check_dataset(*find_split(coco, "train"))}
    assert faults["duplicate id"] == "FATAL: images: id 100 is used 2 times"
    assert len(load(coco)) == 6
