"""A data set of large images, cut into one of tiles."""

import json

import numpy as np
import pytest
from PIL import Image

from deformable_detr.cli import main
from deformable_detr.data import tiles
from deformable_detr.data.checks import check_dataset
from deformable_detr.data.coco import CocoDataset
from deformable_detr.data.places import find_split
from deformable_detr.data.tiles import tile_dataset
from deformable_detr.files import removed_on_error
from tests.conftest import save_annotations, write_coco


@pytest.fixture
def large(tmp_path):
    """One image of 150 x 100 with three objects and a crowd, one of 40 x 30 with nothing."""
    root = tmp_path / "large"
    content = write_coco(root, images=0)
    content["images"] = [
        {"id": "a", "file_name": "deep/a.jpg", "width": 150, "height": 100},
        {"id": "b", "file_name": "b.png", "width": 40, "height": 30},
    ]
    boxes = [[10, 10, 20, 10], [90, 40, 20, 20], [60, 80, 90, 10], [120, 0, 30, 30]]
    content["annotations"] = [
        {"id": i, "image_id": "a", "category_id": 3, "bbox": box, "area": box[2] * box[3] / 2}
        for i, box in enumerate(boxes)
    ]
    content["annotations"][3]["iscrowd"] = 1
    rng = np.random.default_rng(0)
    (root / "train" / "deep").mkdir()
    for image in content["images"]:
        pixels = rng.integers(0, 255, (image["height"], image["width"], 3), np.uint8)
        Image.fromarray(pixels).save(root / "train" / image["file_name"])
    save_annotations(root, content)
    return root


def test_boxes_and_pictures_are_those_of_the_image(large, tmp_path):
    target = tmp_path / "tiles" / "train", tmp_path / "tiles" / "annotations" / "train.json"
    said = tile_dataset(find_split(large, "train"), target, side=100, overlap=0.5, progress=False)
    assert said.startswith("2 images, 3 tiles; 4 boxes, and 2 of crowds")
    assert not [fault for fault in check_dataset(*target) if fault.fatal]
    cut, before = CocoDataset(*target), CocoDataset(*find_split(large, "train"))
    assert [c["name"] for c in cut.categories] == [c["name"] for c in before.categories]
    for entry in cut.coco.dataset["images"]:
        x0, y0, x1, y1 = entry["tile"]
        whole = np.asarray(before.load_image(entry["tile_of"]))[y0:y1, x0:x1].astype(int)
        seen = np.asarray(cut.load_image(entry["id"])).astype(int)
        assert seen.shape == whole.shape == (entry["height"], entry["width"], 3)
        # JPEG at its best quality is near
        assert np.abs(seen - whole).mean() < (8 if entry["tile_of"] == "a" else 1e-9)
    # tiles at 0 and at 50; of the third object 40 and 90 of 90 pixels are in them
    found = [(a["image_id"], a["bbox"], a["area"], a["iscrowd"]) for a in cut.coco.anns.values()]
    assert found == [
        (1, [10, 10, 20, 10], 100, 0),
        (1, [90, 40, 10, 20], 100, 0),
        (1, [60, 80, 40, 10], 200, 1),
        (2, [40, 40, 20, 20], 200, 0),
        (2, [10, 80, 90, 10], 450, 0),
        (2, [70, 0, 30, 30], 450, 1),
    ]
    labels = [cut[i][1].labels.tolist() for i in range(3)]
    assert labels == [[0, 0], [0, 0], []]


def test_names_with_folders_do_not_leave_the_target(large, tmp_path):
    """And no two tiles have one name, though their pictures do."""
    content = json.loads((large / "annotations" / "train.json").read_text())
    content["images"][0]["file_name"] = "../train/deep/a.jpg"
    content["images"].append(content["images"][0] | {"id": "c", "file_name": "deep/../deep/a.jpg"})
    save_annotations(large, content)
    target = tmp_path / "new" / "train", tmp_path / "new" / "train.json"
    tile_dataset(find_split(large, "train"), target, side=100, progress=False)
    names = [image["file_name"] for image in json.loads(target[1].read_text())["images"]]
    assert len(set(names)) == len(names) == len(list(target[0].iterdir())) == 5
    assert all("/" not in name for name in names)


def test_a_broken_picture_leaves_nothing_behind(large, tmp_path, capsys):
    (large / "train" / "b.png").write_bytes(b"no picture")  # the second one
    arguments = ["tile", str(large), "--side", "64", "--output"]
    assert main([*arguments, str(tmp_path / "new" / "tiles")]) == 2
    assert "cannot read image" in (error := capsys.readouterr().err.strip().splitlines()[-1])
    assert error.endswith(f"all faults: deformable-detr check {large}")
    assert not (tmp_path / "new").exists()
    (tmp_path / "there").mkdir()
    assert main([*arguments, str(tmp_path / "there")]) == 2
    assert not list((tmp_path / "there").iterdir())


def test_an_empty_folder_is_empty_again_after_a_failure(tmp_path):
    """Files lie in it directly, and folders; the failure itself is what is raised."""
    with pytest.raises(ZeroDivisionError), removed_on_error(tmp_path):
        (tmp_path / "tile.png").write_bytes(b"1")
        (tmp_path / "deep").mkdir()
        (tmp_path / "deep" / "tile.png").write_bytes(b"1")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_what_another_process_writes_stays(large, tmp_path, capsys, monkeypatch):
    """Which began while this one read the annotations, with tiles of another side."""
    other = tmp_path / "tiles" / "train" / "a_1_0_0.jpg"

    def read(*place):
        other.parent.mkdir(exist_ok=True)
        other.write_bytes(b"theirs")
        return CocoDataset(*place)

    monkeypatch.setattr(tiles, "CocoDataset", read)
    arguments = ["tile", str(large), "--side", "64", "--output", str(tmp_path / "tiles")]
    for _ in range(2):  # at the same time, and later
        assert main(arguments) == 2
        assert "train is there already: give another" in capsys.readouterr().err
        assert other.read_bytes() == b"theirs" and len(list(other.parent.iterdir())) == 1


def test_on_the_command_line(large, tmp_path, capsys):
    arguments = ["tile", str(large), "--output", str(tmp_path / "tiles")]
    assert main([*arguments, "--side", "64"]) == 0
    assert "train: 2 images, 7 tiles" in capsys.readouterr().out
    assert main(["check", str(tmp_path / "tiles"), "--split", "train"]) == 0
    for wrong, message in (
        ([*arguments, "--side", "64"], "is there already: give another"),
        (["tile", str(large), "--output", str(tmp_path / "x"), "--side", "0"], "need a side of"),
        (["tile", str(tmp_path), "--output", str(tmp_path / "x"), "--side", "9"], "no train"),
    ):
        capsys.readouterr()
        assert main(wrong) == 2
        error = capsys.readouterr().err.strip()
        assert message in error and "\n" not in error
