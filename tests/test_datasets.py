"""Reading COCO format, transforms with boxes, and the list of faults."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from deformable_detr.boxes import cxcywh_to_xyxy
from deformable_detr.data.annotations import read_annotations
from deformable_detr.data.checks import check_dataset, label_histogram, summary
from deformable_detr.data.coco import CocoDataset, collate, find_split
from deformable_detr.data.split_checks import check_splits
from deformable_detr.evaluation.coco import score
from tests.conftest import save_annotations, write_coco


def load(root, split="train", **options):
    return CocoDataset(*find_split(root, split), **options)


def edit(root, change):
    path = root / "annotations" / "train.json"
    content = json.loads(path.read_text())
    change(content)
    save_annotations(root, content)


def test_reads_any_category_ids_and_keeps_images_without_boxes(coco):
    dataset = load(coco)
    assert len(dataset) == 6
    assert [c["id"] for c in dataset.categories] == [3, 7, 20]
    image, target = dataset[2]
    assert image.shape == (3, 48, 64) and target.original_size == (48, 64)
    assert target.labels.tolist() == [2] and target.image_id == 102
    x, y, w, h = dataset.coco.imgToAnns[102][0]["bbox"]
    pixels = cxcywh_to_xyxy(target.boxes)[0] * torch.tensor([64, 48, 64, 48])
    torch.testing.assert_close(pixels, torch.tensor([x, y, x + w, y + h]).float())
    assert dataset[5][1].boxes.shape == (0, 4) and dataset[5][1].labels.dtype == torch.int64


def test_crowds_are_left_out_and_boxes_cut_or_dropped(coco):
    def change(content):
        for annotation, box in zip(
            content["annotations"],
            ([-10, 5, 20, 16], [60, 40, 50, 50], [70, 5, 5, 5], [0, 0, 0, 5], [1, 1, 9, 9]),
            strict=True,
        ):
            annotation["image_id"], annotation["bbox"] = 100, box
        content["annotations"][4]["iscrowd"] = 1

    edit(coco, change)
    boxes = cxcywh_to_xyxy(load(coco)[0][1].boxes) * torch.tensor([64, 48, 64, 48])
    torch.testing.assert_close(boxes, torch.tensor([[0.0, 5, 10, 21], [60, 40, 64, 48]]))


@pytest.mark.parametrize("kind", ["16 bits", "turned"])
def test_training_reads_pictures_as_prediction_does(tmp_path, kind):
    pixels = np.array([[0, 300, 40_000, 65_535]] * 3, np.uint16)
    path = tmp_path / "x.png"
    if kind == "16 bits":
        Image.fromarray(pixels).save(path)
    else:
        exif = Image.Exif()
        exif[0x0112] = 3  # upside down
        Image.fromarray((pixels >> 8).astype(np.uint8)).convert("RGB").save(path, exif=exif)
    content = {"images": [{"id": 1, "file_name": "x.png"}], "annotations": [], "categories": []}
    (tmp_path / "x.json").write_text(json.dumps(content))
    seen = np.asarray(CocoDataset(tmp_path, tmp_path / "x.json").load_image(1))[0, :, 0].tolist()
    assert seen == [0, 1, 156, 255][:: -1 if kind == "turned" else 1]


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("images", None, "images must be a list, got NoneType"),
        ("images", {"file_name": 3}, r"images\[0\] has the file_name 3"),
        ("annotations", {"image_id": [1]}, r"annotations\[0\] has the image_id \[1\]"),
        ("categories", {"id": [1]}, r"categories\[0\] has the id \[1\], expected a whole"),
        ("images", {"id": 1.5}, r"images\[0\] has the id 1.5, expected a whole number or text"),
        ("annotations", {"iscrowd": "0"}, r"the iscrowd '0', expected 0, 1, true, false or null"),
        ("annotations", {"area": "12"}, "the area '12', expected a finite number or null"),
        ("annotations", {"area": math.inf}, "the area inf, expected a finite number or null"),
        ("images", {"width": "64"}, r"images\[0\] has the width '64', expected a finite number"),
        ("annotations", {"bbox": [1, 2, 10**400, 3]}, "annotation 1000: bbox must be four finite"),
    ],
)
def test_values_of_another_type_are_named(coco, kind, values, message):
    def change(content):
        if values is None:
            content[kind] = None
        else:
            content[kind][0].update(values)

    edit(coco, change)
    with pytest.raises(ValueError, match=message):
        load(coco)


@pytest.mark.parametrize("given", [None, [1, 2, 3], [9, 9], [1, math.inf], "12"], ids=str)
def test_area_thresholds_must_be_two_that_rise(coco, given):
    edit(coco, lambda c: c.update(info={"area_thresholds": given}))
    with pytest.raises(ValueError, match="must be two rising numbers above 0, got") as error:
        load(coco)
    assert "\n" not in str(error.value)


def test_what_cannot_be_a_box_to_learn_from_is_none(coco):
    def change(content):
        for annotation in content["annotations"]:
            annotation["iscrowd"] = 1
        content["annotations"][0].update(iscrowd=0, bbox=[3, 3, 0, 5])

    edit(coco, change)
    kinds = {fault.kind: fault.fatal for fault in check_dataset(*find_split(coco, "train"))}
    assert kinds == {"no box": True, "empty box": False, "unused category": False}


def test_an_area_may_exceed_its_box_by_rounding_only(coco):
    edit(coco, lambda c: c["annotations"][0].update(area=21 * 17))
    assert check_dataset(*find_split(coco, "train")) == []
    edit(coco, lambda c: c["annotations"][0].update(area=21 * 17 + 1))
    (fault,) = check_dataset(*find_split(coco, "train"))
    assert str(fault).startswith("warning: annotation 1000: area 358 of a box of 20 x 16")


def test_the_summary_counts_what_is_no_fault(coco):
    edit(coco, lambda c: c["annotations"][3].update(iscrowd=1))
    (coco / "train" / "more").mkdir()
    for name in ("more/a.jpg", "b.PNG", "notes.txt"):
        (coco / "train" / name).write_bytes(b"")
    images_dir, path = find_split(coco, "train")
    assert check_dataset(images_dir, path) == []
    assert summary(images_dir, read_annotations(path)) == (
        "6 images, 1 of them without boxes; 4 boxes, and 1 of crowds, which training leaves out; "
        "2 pictures in the folder that no entry names"
    )


def test_a_crowd_flag_may_be_null(coco):
    edit(coco, lambda c: (c["annotations"][0].update(iscrowd=None), c.update(info=None)))
    dataset = CocoDataset(*find_split(coco, "train"))
    assert score([], dataset).ap == 0


def test_collate_pads(coco):
    dataset = load(coco)
    small = dataset[0][0][:, :30, :40]
    batch = collate([dataset[1], (small, dataset[0][1])])
    assert batch.images.shape == (2, 3, 48, 64) and batch.sizes.tolist() == [[48, 64], [30, 40]]
    assert batch.targets[1].image_id == 100


def test_both_layouts_are_found_and_a_missing_one_is_explained(tmp_path):
    folder = tmp_path / "annotations"
    folder.mkdir()
    (folder / "instances_val2017.json").write_text("{}")
    assert find_split(tmp_path, "val")[0] == tmp_path / "val2017"
    with pytest.raises(FileNotFoundError, match=r"expected .*train.json or .*instances_train2017"):
        find_split(tmp_path, "train")


def again(content, box, **changes):
    """A copy of annotation 1001 with another box."""
    content["annotations"].append(content["annotations"][1] | {"id": 1009, "bbox": box} | changes)


FAULTS = {
    "unknown category": (lambda c: c["annotations"][1].update(category_id=8), True, 1001),
    "empty box": (lambda c: c["annotations"][2].update(bbox=[3, 3, 0, 5]), False, 1002),
    "box outside": (lambda c: c["annotations"][0].update(bbox=[90, 3, 4, 5], area=9), True, 1000),
    "box cut": (lambda c: c["annotations"][0].update(bbox=[60, 3, 14, 5], area=9), False, 1000),
    "area": (lambda c: c["annotations"][4].update(area=0), False, 1004),
    "bad box": (lambda c: c["annotations"][3].update(bbox=[1, 2, float("nan"), 3]), True, 1003),
    "unknown image": (lambda c: c["annotations"][3].update(image_id=5), True, 1003),
    "missing image": (lambda c: c["images"][0].update(file_name="no.png"), True, None),
    "image size": (lambda c: c["images"][0].update(width=65), True, None),
    "duplicate box": (lambda c: again(c, c["annotations"][1]["bbox"]), False, 1009),
    "unused category": (lambda c: c["categories"].append({"id": 1, "name": "x"}), False, None),
    "duplicate name": (lambda c: c["categories"][0].update(name="red"), True, None),
    "duplicate id": (lambda c: c["annotations"][1].update(id=1000), True, None),
    "no image": (lambda c: c.update(images=[], annotations=[]), True, None),
    "no box": (lambda c: c.update(annotations=[]), True, None),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_every_fault_is_listed_by_its_id(coco, kind):
    change, fatal, annotation_id = FAULTS[kind]
    edit(coco, change)
    (fault,) = check_dataset(*find_split(coco, "train"))
    assert (fault.kind, fault.fatal, fault.annotation_id) == (kind, fatal, annotation_id)
    assert str(annotation_id or "") in str(fault) and "\n" not in str(fault)


def test_a_box_of_negative_size_is_fatal(coco):
    edit(coco, lambda c: c["annotations"][2].update(bbox=[9, 9, -3, 5]))
    (fault,) = check_dataset(*find_split(coco, "train"))
    assert (fault.kind, fault.fatal, fault.annotation_id) == ("empty box", True, 1002)
    assert "of no size: x, y, w, h = [9, 9, -3, 5]; are its corners swapped?" in str(fault)


def test_only_nearly_the_same_box_of_the_same_category_is_a_duplicate(coco):
    def change(content):
        x, y, w, h = content["annotations"][1]["bbox"]
        again(content, [x + 0.3, y, w, h])  # IoU 0.97
        again(content, [x + 2, y, w, h], id=1010)  # 0.82
        again(content, [x, y, w, h], id=1011, category_id=3)

    edit(coco, change)
    (fault,) = check_dataset(*find_split(coco, "train"))
    assert fault.annotation_id == 1009 and "annotation 1001" in str(fault)


def test_corners_in_place_of_sizes_are_seen(coco):
    def change(content):
        for annotation in content["annotations"]:
            annotation["bbox"] = [20, 10, 40, 26]  # x1, y1, x2, y2
        content["annotations"][2]["bbox"] = [40, 10, 60, 26]

    edit(coco, change)
    faults = check_dataset(*find_split(coco, "train"))
    (fault,) = (fault for fault in faults if fault.kind == "box format")
    assert fault.fatal and "1 of 5 boxes leave their images" in str(fault)
    assert "are these corners x1, y1, x2, y2?" in str(fault)


def test_relative_boxes_are_seen(coco):
    def change(content):
        for annotation in content["annotations"]:
            annotation.update(bbox=[0.2, 0.1, 0.3, 0.3], area=None)

    edit(coco, change)
    (fault,) = check_dataset(*find_split(coco, "train"))
    assert fault.fatal and "first annotation 1000 with [0.2, 0.1, 0.3, 0.3]" in str(fault)


def test_a_picture_turned_after_annotation_is_said_so(coco):
    edit(coco, lambda c: c["images"][5].update(width=48, height=64))
    (fault,) = check_dataset(*find_split(coco, "train"))
    assert fault.image_id == 105 and str(fault).endswith("was it turned when it was annotated?")


def test_sizes_need_not_be_stated(coco):
    edit(coco, lambda c: [c["images"][0].pop(key) for key in ("width", "height")])
    (fault,) = check_dataset(*find_split(coco, "train"))
    text = "warning: width and height are not stated: 1 of 6 images, such as image 100"
    assert str(fault) == text


def test_a_byte_order_mark_and_names_in_utf8(coco):
    path = coco / "annotations" / "train.json"
    text = path.read_text().replace('"red"', '"r\u00f6d"')
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    dataset = CocoDataset(*find_split(coco, "train"))
    assert dataset.categories[0]["name"] == "r\u00f6d"


def test_a_size_that_is_not_stated_hides_no_other_fault(coco):
    def change(content):
        content["images"][0].update(width=None, height=None)
        content["annotations"][0]["bbox"] = [9, 9, -1, 5]

    edit(coco, change)
    kinds = [fault.kind for fault in check_dataset(*find_split(coco, "train"))]
    assert kinds == ["image size", "empty box"]


def test_the_label_histogram_leaves_crowds_out(coco):
    content = json.loads((coco / "annotations" / "train.json").read_text())
    content["annotations"][3]["iscrowd"] = 1
    assert label_histogram(content) == {"red": 1, "green": 2, "blue": 1}


def test_pictures_in_two_splits_are_found_whatever_their_names(tmp_path):
    write_coco(tmp_path)
    write_coco(tmp_path, "val", images=4)
    splits = {split: find_split(tmp_path, split) for split in ("train", "val")}
    faults = check_splits(splits)  # drawn by the same generator; val's last has no square
    assert [f.image_id for f in faults] == [100, 101, 102, 105]
    assert "image 100 of train and image 100 of val" in str(faults[0]) and not faults[0].fatal
    assert "image 105 of train and image 103 of val" in str(faults[3])
    for split, shade in (("train", 0), ("val", 9)):
        for i, path in enumerate(sorted((tmp_path / split).iterdir())):
            Image.new("RGB", (64, 48), (shade, i, 0)).save(path)
    assert check_splits(splits) == []


def test_a_corrupt_image_is_a_fault_and_an_error(coco):
    path = coco / "train" / "102.png"
    path.write_bytes(path.read_bytes()[:60])
    (fault,) = check_dataset(*find_split(coco, "train"))
    assert fault.kind == "corrupt image" and fault.fatal and fault.image_id == 102
    with pytest.raises(ValueError, match=r"cannot read image .*102.png"):
        load(coco)[2]


def test_good_data_has_no_faults(coco):
    assert check_dataset(*find_split(coco, "train")) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("9" * 5000, "is not JSON"),
        ("[]", "is not a COCO"),
        ('{"images": []}', "no annotations, categ"),
    ],
)
def test_other_files_are_refused(coco, text, message):
    (coco / "annotations" / "train.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(coco)


def test_what_cannot_be_read_is_refused_with_its_file_and_ids(coco):
    def change(content):
        for annotation in content["annotations"]:
            annotation["category_id"] = 8
        content["annotations"][1].update(category_id=7, bbox=[1, 2, float("nan"), 3])

    edit(coco, change)
    with pytest.raises(ValueError, match=r"train\.json: annotation 1000: unknown cat") as error:
        load(coco)
    assert "annotation 1001: bbox must be four finite numbers" in str(error.value)
    assert str(error.value).endswith("and 2 more") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "key", "message"),
    [
        ("images", "file_name", r"images\[1\] has no file_name"),
        ("annotations", "bbox", r"annotations\[1\] has no bbox"),
        ("categories", "name", r"categories\[1\] has no name"),
    ],
)
def test_a_missing_key_is_named(coco, kind, key, message):
    edit(coco, lambda c: c[kind][1].pop(key))
    for read in (load, lambda root: check_dataset(*find_split(root, "train"))):
        with pytest.raises(ValueError, match=message):
            read(coco)


def test_area_and_crowd_flag_may_be_left_out(coco):
    """COCO metrics need both, and many annotation tools write neither."""

    def change(content):
        for annotation in content["annotations"]:
            del annotation["area"], annotation["iscrowd"]

    edit(coco, change)
    dataset = load(coco)
    found = [
        {k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.9}
        for a in dataset.coco.anns.values()
    ]
    assert score(found, dataset).ap == 1 and score(found, dataset).ap_small == 1


def test_write_coco_is_what_the_tests_say(tmp_path):
    content = write_coco(tmp_path / "x")
    assert len(content["annotations"]) == 5
