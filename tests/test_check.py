"""What `check` says of a whole data folder: the same that `train` goes by, in lines that nobody's
names can fake."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deformable_detr.cli import main
from deformable_detr.data.annotations import read_annotations
from deformable_detr.data.checks import check_annotations, check_dataset
from deformable_detr.data.coco import CocoDataset, find_split
from deformable_detr.data.faults import Fault, told
from deformable_detr.data.names import id_order, printable
from deformable_detr.data.split_checks import category_difference, check_data
from tests.conftest import save_annotations

TRAIN = ["--recipe", "digits", "--epochs", "1", "--set", "model.num_queries=6"]


def rewrite(root, change, split="train"):
    content = json.loads((root / "annotations" / f"{split}.json").read_text())
    change(content)
    save_annotations(root, content, split)


def rename_class(content):
    content["categories"][1]["name"] = "pink"


def swap_ids(content):
    """As where each split numbers its classes by first appearance."""
    first, second = content["categories"][:2]
    first["id"], second["id"] = second["id"], first["id"]


def drop_class(content):
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] != 20]
    content["categories"].pop(0)


REFUSED = {
    "no train split": lambda root: (root / "annotations" / "train.json").unlink(),
    "a class of another name": lambda root: rewrite(root, rename_class, "val"),
    "ids in another order": lambda root: rewrite(root, swap_ids, "val"),
    "a class less": lambda root: rewrite(root, drop_class, "val"),
    "two files for val": lambda root: shutil.copy(
        root / "annotations" / "val.json", root / "val" / "_annotations.coco.json"
    ),
    "a box of no category": lambda root: rewrite(
        root, lambda c: c["annotations"][0].update(category_id=5), "val"
    ),
    "crowds only": lambda root: rewrite(
        root, lambda c: [a.update(iscrowd=1) for a in c["annotations"]], "val"
    ),
    "a picture less": lambda root: (root / "val" / "101.png").unlink(),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_train_refuses_check_calls_fatal(coco, tmp_path, capsys, kind):
    REFUSED[kind](coco)
    code = main(["check", str(coco)])
    said = capsys.readouterr()
    assert {1: "FATAL: " in said.out, 2: "error: " in said.err}[code]
    assert main(["train", str(coco), "--output", str(tmp_path / "run"), *TRAIN]) == 2
    assert not (tmp_path / "run").exists()


def test_splits_and_their_pictures_that_are_missing_are_said(coco, capsys):
    (coco / "annotations" / "val.json").rename(coco / "annotations" / "elsewhere")
    assert main(["check", str(coco)]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "warning" in line)
    assert "/val has 4 pictures, but no annotation file: AP is not measured while training" in line
    assert "patience does nothing" in line
    (coco / "annotations" / "train.json").rename(coco / "annotations" / "val.json")
    assert main(["check", str(coco)]) == 1
    assert "FATAL: no train annotations in " in capsys.readouterr().out
    assert main(["check", str(coco), "--split", "val"]) == 1  # of whose 6 images it has 4


def test_splits_that_number_classes_by_themselves_always_show(coco):
    """Of two splits with the same classes by first appearance, those in another order."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        orders = [rng.permutation(4) for _ in range(2)]
        lists = [[{"id": i, "name": "abcd"[k]} for i, k in enumerate(order, 1)] for order in orders]
        text = category_difference(*lists)
        assert bool(text) == (orders[0] != orders[1]).any() and "\n" not in text
        assert not text or "deformable-detr convert" in text


def test_classes_with_boxes_in_one_split_only(coco):
    rewrite(coco, lambda c: c["annotations"].pop(2), "val")  # the only blue one
    rewrite(coco, lambda c: [a.update(category_id=20) for a in c["annotations"]], "train")
    faults = dict(check_data({s: find_split(coco, s) for s in ("train", "val")}))["between splits"]
    said = [fault.message for fault in faults if fault.kind == "class in one split"]
    assert said == [
        "1 class with boxes in train and none in val, so that their AP is not measured there: blue",
        "2 classes with boxes in val and none in train, so that their AP cannot be learned: "
        "green, red",
    ]


# Names


NASTY = "red\n\x1b[2Ktrain: 0 faults, 0 of them fatal\r\u202e"


def test_names_cannot_fake_a_line_or_reach_the_terminal(coco, capsys):
    def change(content):
        content["categories"][1]["name"] = NASTY
        content["categories"].append({"id": 8, "name": NASTY + "2"})
        content["images"][0]["file_name"] = NASTY + ".png"
        content["images"][1].update(id=NASTY, width=9)
        content["annotations"][1].update(image_id=NASTY, id=NASTY, bbox=[9, 9, -1, 3])
        content["annotations"][2].update(category_id=NASTY)

    for split in ("train", "val"):
        rewrite(coco, change, split)
    assert main(["check", str(coco)]) == 1
    main(["evaluate", str(coco)])
    main(["sheet", str(coco), "--output", str(coco / "sheet.png")])
    said = capsys.readouterr()
    text = said.out + said.err
    assert not {"\x1b", "\r", "\u202e"} & set(text)
    assert sum(line.startswith("train: 0 faults") for line in text.splitlines()) == 0
    assert r"red\n\x1b[2Ktrain: 0 faults, 0 of them fatal\r\u202e" in text


def test_what_is_printable():
    assert printable("Käse, 奶酪, पनीर and \u200c") == "Käse, 奶酪, पनीर and \u200c"
    assert printable("a\tb\x00\x9b\udc80\u2028") == r"a\tb\x00\x9b\udc80\u2028"
    assert printable("x" * 5000) == "x" * 100 + "..." + "x" * 100
    assert printable(7) == "7"
    assert str(Fault("kind", True, "a\nb")) == r"FATAL: a\nb"


@given(st.text(), st.integers(1, 50))
def test_a_printable_name_is_one_short_line(name, longest):
    text = printable(name, longest)
    assert len(text.splitlines()) <= 1 and len(text) <= 10 * (longest + 3)
    assert all(c.isprintable() or c in "\u200c\u200d" for c in text)


@given(st.lists(st.one_of(st.integers(), st.text(), st.tuples(st.integers()), st.none())))
def test_ids_of_any_kind_have_an_order(ids):
    ordered = sorted(ids, key=id_order)
    assert ordered == sorted(reversed(ordered), key=id_order)
    numbers = [key for key in ids if isinstance(key, int)]
    assert ordered[: len(numbers)] == sorted(numbers)


def test_of_many_faults_of_one_kind_one_line_stands_for_all(coco, capsys):
    faults = [Fault("a", True, f"annotation {i}") for i in range(11)] + [Fault("b", False, "last")]
    assert list(told(faults)) == ["FATAL: 11 x a, the first: annotation 0", "warning: last"]
    assert len(list(told(faults[1:]))) == 11

    def change(content):
        first = content["annotations"][0]
        content["annotations"] = [first | {"id": i, "category_id": 5} for i in range(612)]

    rewrite(coco, change)
    for options, count in (([], 1), (["--all"], 612)):
        assert main(["check", str(coco), *options]) == 1
        assert capsys.readouterr().out.count(": unknown category 5\n") == count


# Entries together


def one_box(content, **changes):
    return {"id": 2000, "image_id": 100, "category_id": 3, "bbox": [1, 1, 9, 9]} | changes


def split_up(content):
    """An entry for each box, as of a table with a row for each."""
    entry = content["images"][0] | {"id": 200}
    content["images"].append(entry)
    content["annotations"].append(one_box(content, image_id=200))


def twice(content):
    content["images"].append(content["images"][0] | {"id": 200, "file_name": "./100.png"})
    copies = [a for a in content["annotations"] if a["image_id"] == 100]
    content["annotations"] += [a | {"id": 2000, "image_id": 200} for a in copies]


def equal_areas(content):
    for i, a in enumerate(content["annotations"]):
        a.update(area=1.0, bbox=[1, 1, 9 + i, 9])


TOGETHER = {
    "one file, two ids": (
        *(
            split_up,
            True,
            "1 file under several ids, such as 100.png under 100, 200: each has",
        ),
    ),
    "one file, two ids, the same boxes": (*(twice, False, "under 100, 200, with the same boxes"),),
    "ignore": (
        lambda c: [a.update(ignore=1) for a in c["annotations"][:2]],
        *(False, "2 of 5 annotations say ignore, which neither training nor COCO's metrics read"),
    ),
    "area": (equal_areas, False, "all 5 areas are 1.0, though boxes differ"),
    "no box": (
        lambda c: [a.update(iscrowd=1) for a in c["annotations"]],
        *(True, "of 5 boxes all are crowds' (iscrowd: 1): there is nothing to learn"),
    ),
}


@pytest.mark.parametrize("kind", TOGETHER)
def test_what_only_shows_across_entries_is_one_line(coco, kind):
    change, fatal, message = TOGETHER[kind]
    rewrite(coco, change)
    faults = check_dataset(*find_split(coco, "train"))
    found = [fault for fault in faults if fault.kind != "unused category"]
    assert [fault.fatal for fault in found] == [fatal] and message in str(found[0])


def test_boxes_beyond_what_numbers_can_hold_are_none(coco):
    """An array of 32 bits would make infinity of them, or raise."""
    for number in (10**25, 1e39, -(2**40)):
        rewrite(coco, lambda c, n=number: c["annotations"][0].update(bbox=[0, 0, n, 5]))
        (fault,) = check_annotations(read_annotations(find_split(coco, "train")[1]))
        assert fault.kind == "bad box"
        with pytest.raises(ValueError, match="annotation 1000: bbox must be four finite numbers"):
            CocoDataset(*find_split(coco, "train"))
