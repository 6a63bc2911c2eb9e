"""Boxes that were drawn twice, and images with more of them than can be found."""

import json
import math

import numpy as np
import pytest

from deformable_detr.data import duplicates
from deformable_detr.data.annotations import read_annotations
from deformable_detr.data.checks import check_annotations
from deformable_detr.data.coco import CocoDataset, find_split
from deformable_detr.data.crowding import crowding, highest_ap
from deformable_detr.data.duplicates import duplicate_boxes
from deformable_detr.evaluation.coco import score
from deformable_detr.models import build_model
from deformable_detr.training.config import TrainConfig
from deformable_detr.training.doctor import Diagnosis
from deformable_detr.training.doctor import check_data as check_data_of
from deformable_detr.training.remarks import at_the_start
from deformable_detr.training.setup import Training
from tests.conftest import TINY, save_annotations, write_coco


def brute_force(boxes, groups):
    overlap = duplicates._overlap
    return {
        j
        for j in range(len(boxes))
        if any(
            groups[i] == groups[j] and overlap(boxes[i : i + 1], boxes[j : j + 1]) > 0.95
            for i in range(j)
        )
    }


@pytest.mark.parametrize("seed", range(20))
def test_boxes_drawn_twice_are_found_at_any_size_and_place(seed):
    rng = np.random.default_rng(seed)
    base = rng.uniform(0, 100, (8, 4))
    base[:, 2:] = base[:, :2] + rng.lognormal(2, 2, (8, 2))
    boxes = base[rng.integers(0, 8, 30)]
    boxes = boxes + np.tile(boxes[:, 2:] - boxes[:, :2], 2) * rng.normal(0, 0.008, (30, 4))
    groups = rng.integers(0, 2, 30)
    found = dict(duplicate_boxes(boxes, groups))
    every = brute_force(boxes, groups)
    assert set(found) <= every and every
    for later, earlier in found.items():
        assert earlier < later and groups[earlier] == groups[later]
    left = [i for i in range(30) if i not in found]  # of which none is another's double
    assert not brute_force(boxes[left], groups[left])


PLACES = {
    "apart": lambda rng, n: rng.uniform(0, 30_000, (n, 2)),
    "in a column": lambda rng, n: np.stack([np.zeros(n), np.arange(n) * 7.0], 1),
    "all the same": lambda rng, n: np.zeros((n, 2)),
}


@pytest.mark.parametrize("kind", PLACES)
def test_boxes_of_one_class_are_compared_a_few_times_each(monkeypatch, kind):
    """Not each with each, which for 20,000 are 200 million."""
    compared = []
    overlap = duplicates._overlap

    def count(one, other):
        compared.append(len(one))
        return overlap(one, other)

    monkeypatch.setattr(duplicates, "_overlap", count)
    places = PLACES[kind](np.random.default_rng(0), 20_000)
    found = dict(duplicate_boxes(np.hstack([places, places + 20]), np.zeros(20_000, int)))
    assert sum(compared) <= 30 * 20_000
    assert (len(found) == 19_999) == (kind == "all the same")


# More objects than can be found


def crowd(root, counts):
    """Images with as many small objects, of the classes 3 and 7."""
    write_coco(root, images=len(counts))

    def change(content):
        content["annotations"] = []
        for image, of_class in zip(content["images"], counts, strict=True):
            for category_id, count in of_class.items():
                for i in range(count):
                    box = [i % 20 * 3, i // 20 * 3, 2, 2]
                    one = {"image_id": image["id"], "category_id": category_id, "bbox": box}
                    content["annotations"].append(one | {"id": len(content["annotations"]) + 1})

    path = root / "annotations" / "train.json"
    content = json.loads(path.read_text())
    change(content)
    save_annotations(root, content)
    return find_split(root, "train")


def test_more_objects_than_queries_or_than_cocos_hundred_are_said_with_numbers(tmp_path):
    place = crowd(tmp_path, [{3: 259}, {3: 101, 7: 90}, {7: 100}])
    content = read_annotations(place[1])
    assert crowding(content, num_queries=300, top_k=300) == [
        "2 images, of which 100 is the fullest, have up to 259 objects of one class: COCO's "
        "metrics count 100 detections of a class in an image, so that AP is "
        f"{highest_ap(content):.3f} at most, even where all are found"
    ]
    queries, _ = crowding(content, num_queries=200)
    assert queries == (
        "image 100 has 259 objects, more than the 200 queries of the model (model.num_queries): "
        "the rest cannot be found"
    )
    kept, _ = crowding(content, num_queries=300)
    assert (
        "2 images, of which 100 is the fullest, have up to 259 objects, more than the 100" in kept
    )
    assert [f.kind for f in check_annotations(content)].count("crowded image") == 2
    assert crowding(read_annotations(crowd(tmp_path / "b", [{3: 100}])[1])) == []


def test_doctor_and_train_say_so_of_the_models_own_queries(tmp_path):
    data = CocoDataset(*crowd(tmp_path, [{3: 7}, {3: 6}]))
    diagnosis = Diagnosis()
    check_data_of(diagnosis, data, TINY.num_queries, end=math.inf)
    said = [finding.text for finding in diagnosis.findings if "queries" in finding.text]
    expected = "image 100 has 7 objects, more than the 6 queries of the model"
    assert len(said) == 1 and said[0].startswith(expected)
    config = TrainConfig(epochs=1, batch_size=2)
    training = Training(build_model(TINY), data, None, tmp_path / "run", config, progress=False)
    assert any(line.startswith(f"train: {expected}") for line in at_the_start(training))


@pytest.mark.parametrize("counts", [[{3: 259}], [{3: 250, 7: 40}, {3: 20}], [{7: 3}]], ids=str)
def test_the_highest_ap_is_that_of_a_detector_that_finds_everything(tmp_path, counts):
    """Recall 1.000 and AP 0.386 on one page."""
    dataset = CocoDataset(*crowd(tmp_path, counts))
    content = dataset.coco.dataset
    perfect = [
        {k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 1.0}
        for a in content["annotations"]
    ]
    assert score(perfect, dataset).ap == pytest.approx(highest_ap(content), abs=1e-9)
    assert (counts == [{3: 259}]) == (f"{highest_ap(content):.3f}" == "0.386")
