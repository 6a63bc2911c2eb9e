"""With the package supervision: its detections, its tiles, and the formats that it reads."""

import sys
import types

import numpy as np
import pytest
import torch

from deformable_detr.data.checks import check_dataset
from deformable_detr.data.coco import CocoDataset
from deformable_detr.data.places import find_split
from deformable_detr.inference.predict import predict
from tests.finder import make_finder, picture


@pytest.fixture(scope="module")
def finder():
    return make_finder()


def test_to_supervision(finder, monkeypatch):
    (found,) = predict(finder, picture())
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match="pip install supervision"):
        found.to_supervision()
    stand_in = types.SimpleNamespace(Detections=lambda **fields: fields)
    monkeypatch.setitem(sys.modules, "supervision", stand_in)
    fields = found.to_supervision()
    assert fields["xyxy"].tolist() == found.boxes.tolist()
    assert fields["class_id"].tolist() == [1]
    assert fields["confidence"].tolist() == found.scores.tolist()
    assert fields["data"]["class_name"].tolist() == ["green"]


def test_supervision_itself(finder):
    import supervision

    detections = predict(finder, [picture()])[0].to_supervision()
    assert isinstance(detections, supervision.Detections) and len(detections) == 1
    assert detections["class_name"].tolist() == ["green"]
    empty = predict(finder, picture(), threshold=1.0)[0].to_supervision()
    assert len(empty) == 0 and len(supervision.Detections.merge([detections, empty])) == 1


def test_tiles_of_a_large_image_by_supervision(finder):
    """As the README shows it: the boxes of each tile, moved to the tile's place."""
    import supervision

    tiles = picture(), picture((2, 3, 12, 40), colour=2)
    slicer = supervision.InferenceSlicer(
        lambda tile: predict(finder, tile)[0].to_supervision(), slice_wh=(64, 48), overlap_wh=0
    )
    found = slicer(np.concatenate([np.asarray(tile) for tile in tiles], 1))
    boxes = dict(zip(found["class_name"].tolist(), found.xyxy.tolist(), strict=True))
    assert boxes == {
        "green": pytest.approx([6, 10, 30, 22], abs=1e-4),
        "blue": pytest.approx([64 + 2, 3, 64 + 12, 40], abs=1e-4),
    }


@pytest.mark.parametrize("kind", ["yolo", "voc"])
def test_other_formats_by_supervision(kind, tmp_path):
    """The conversion that data/README.md shows: images, boxes and names arrive whole."""
    import supervision

    source, target = tmp_path / "theirs", tmp_path / "ours"
    for folder in ("images", "labels"):
        (source / folder).mkdir(parents=True)
    picture((6, 10, 30, 22)).save(source / "images" / "a.png")
    picture(size=(40, 30)).save(source / "images" / "b.png")  # nothing on it
    if kind == "yolo":
        (source / "data.yaml").write_text("nc: 2\nnames: [cat, dog]\n")
        (source / "labels" / "a.txt").write_text(f"1 {18 / 64} {16 / 48} {24 / 64} {12 / 48}\n")
        (source / "labels" / "b.txt").write_text("")
        data = supervision.DetectionDataset.from_yolo(
            str(source / "images"), str(source / "labels"), str(source / "data.yaml")
        )
    else:
        # counted from one, the last pixel included
        corners = "<xmin>7</xmin><ymin>11</ymin><xmax>30</xmax><ymax>22</ymax>"
        for name, boxes in (
            ("a", f"<object><name>dog</name><bndbox>{corners}</bndbox></object>"),
            ("b", ""),
        ):
            text = f"<annotation><filename>{name}.png</filename>{boxes}</annotation>"
            (source / "labels" / f"{name}.xml").write_text(text)
        data = supervision.DetectionDataset.from_pascal_voc(
            str(source / "images"), str(source / "labels")
        )
    data.as_coco(str(target / "train"), str(target / "annotations" / "train.json"))
    place = find_split(target, "train")
    assert not [fault for fault in check_dataset(*place) if fault.fatal]
    dataset = CocoDataset(*place)
    names = [category["name"] for category in dataset.categories]
    targets = [dataset[i][1] for i in range(2)]
    (found,) = [target for target in targets if len(target.labels)]
    assert found.original_size == (48, 64) and names[found.labels[0]] == "dog"
    expected = torch.tensor([[18 / 64, 16 / 48, 24 / 64, 12 / 48]])
    torch.testing.assert_close(found.boxes, expected, atol=1e-3, rtol=0)
