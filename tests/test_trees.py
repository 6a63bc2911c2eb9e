"""The detector of trees is what its card says, on the data that are shipped."""

import json
from pathlib import Path

import pytest

from deformable_detr.data.coco import CocoDataset, find_split
from deformable_detr.data.tiles import tile_dataset
from deformable_detr.data.voc import convert_voc
from deformable_detr.evaluation.coco import evaluate
from deformable_detr.inference.detector import load_detector

DATA = Path(__file__).parents[1] / "data"


def test_the_card_tells_what_is_measured(tmp_path):
    convert_voc(DATA / "trees", tmp_path / "whole")
    place = tmp_path / "tiles", tmp_path / "tiles.json"
    tile_dataset(find_split(tmp_path / "whole", "val"), place, 128, progress=False)
    detector = load_detector(DATA / "checkpoints" / "trees.safetensors")
    assert (detector.transforms, detector.short_side) == ("coco", 128)
    assert [category["name"] for category in detector.categories] == ["tree"]
    found = evaluate(detector.model, CocoDataset(*place, detector.eval_transform()), progress=False)
    card = json.loads((DATA / "checkpoints" / "trees.json").read_text())
    # ranks of near scores may differ between processors
    assert found.ap50 == pytest.approx(card["val ap50"], abs=0.01)
    assert found.ap == pytest.approx(card["val ap"], abs=0.005)
