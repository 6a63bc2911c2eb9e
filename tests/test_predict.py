"""Detections from whatever picture people have, in its pixels, with their data's own names."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from deformable_detr import Batch, DeformableDETR, Detections, Output
from deformable_detr.data.coco import CocoDataset
from deformable_detr.data.transforms import TO_TENSOR
from deformable_detr.evaluation.coco import predict_dataset
from deformable_detr.inference.detector import (
    Detector,
    load_detector,
    read_card,
    update_card,
)
from deformable_detr.inference.predict import predict, predict_each
from deformable_detr.inference.sources import Source
from deformable_detr.inference.views import View
from deformable_detr.models import DETRConfig, build_model
from deformable_detr.weights.classes import with_classes
from deformable_detr.weights.ours import load_model, save_model
from tests.conftest import TINY
from tests.finder import CATEGORIES, make_finder, picture


@pytest.fixture(scope="module")
def finder():
    return make_finder()


def test_every_kind_of_picture_in_one_list(finder, tmp_path):
    image = picture()
    image.save(tmp_path / "000000039769.png")
    inputs = [image, np.asarray(image), tmp_path / "000000039769.png", str(tmp_path)]
    inputs.append(picture((2, 3, 12, 40), colour=2, size=(33, 50)))
    found = predict(finder, inputs, batch_size=2)
    for each in found[:4]:
        assert each.boxes.tolist() == [[pytest.approx(x, abs=1e-4) for x in (6, 10, 30, 22)]]
        assert each.names == ["green"] and each.category_ids == [7] and each.labels.tolist() == [1]
        assert each.queries.tolist() == [1]
        assert each.scores.tolist() == [pytest.approx(torch.tensor(2.0).sigmoid().item())]
        assert each.size == (48, 64) and each.image.tobytes() == image.tobytes()
    assert found[2].path == found[3].path == tmp_path / "000000039769.png"
    assert found[4].names == ["blue"] and found[4].size == (50, 33)
    (single,) = predict(finder, image)
    assert torch.equal(single.boxes, found[0].boxes)


def test_coco_results(finder, tmp_path):
    for name in ("000000039769.png", "000000000007.png"):
        picture().save(tmp_path / name)
    found = predict(finder, tmp_path)
    for each, image_id in zip(found, (7, 39769), strict=True):
        (result,) = json.loads(json.dumps(each.to_coco()))
        assert result["image_id"] == image_id and result["category_id"] == 7
        assert result["bbox"] == [pytest.approx(x, abs=1e-4) for x in (6, 10, 24, 12)]
    (of_array,) = predict(finder, picture())
    assert of_array.to_coco(5)[0]["image_id"] == 5
    with pytest.raises(ValueError, match="came from no file needs an image_id"):
        of_array.to_coco()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("0007.png", "12.jpg"), [7, 12]),
        (("0007.png", "photo.png"), ["0007.png", "photo.png"]),
        (("7.jpg", "7.png"), ["7.jpg", "7.png"]),
        (("07.png", "7.png"), ["07.png", "7.png"]),
        (("a/7.png", "b/7.png"), ["a/7.png", "b/7.png"]),
        (("a/7.png", "7.png", "8.png"), ["a/7.png", "{}/7.png", "{}/8.png"]),
    ],
    ids=str,
)
def test_ids_are_all_numbers_or_all_texts_and_tell_files_apart(finder, tmp_path, names, expected):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture().save(tmp_path / name)
    found = predict(finder, [tmp_path / name for name in names])
    ids = [each.to_coco()[0]["image_id"] for each in found]
    assert ids == [x.format(tmp_path.name) if isinstance(x, str) else x for x in expected]
    assert len(set(ids)) == len(ids)


def test_detections_of_several_images_and_some_of_one():
    parts = [
        Detections(torch.rand(n), torch.arange(n), torch.rand(n, 4), -torch.arange(n))
        for n in (3, 0, 2)
    ]
    whole = Detections.cat(parts)
    assert len(whole) == 5 and whole.queries.tolist() == [0, -1, -2, 0, -1]
    for index in (slice(3, 5), torch.tensor([3, 4]), torch.arange(5) > 2):
        some = whole[index]
        assert torch.equal(some.boxes, parts[2].boxes) and torch.equal(some.labels, parts[2].labels)
    assert whole.to("meta").scores.device.type == "meta"


def test_the_same_as_evaluation(coco):
    """Through files, names and ids, what `evaluate` counts is what `predict` shows."""
    torch.manual_seed(0)
    model = DeformableDETR(TINY).train()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    dataset = CocoDataset(coco / "train", coco / "annotations" / "train.json")
    expected = predict_dataset(model, dataset, 3, progress=False)
    found = predict(
        Detector(model, dataset.categories, 0.0, "digits"), coco / "train", batch_size=3
    )
    results = [result for each in found for result in each.to_coco()]
    assert len(results) == len(expected) and model.training
    for one, other in zip(results, expected, strict=True):
        assert one["image_id"] == other["image_id"] and one["category_id"] == other["category_id"]
        assert one["bbox"] == pytest.approx(other["bbox"], abs=1e-3)


def test_threshold_and_top_k(finder):
    bare = predict(finder.model, picture(), transform=TO_TENSOR, threshold=0.0)[0]
    assert len(bare) == 6 and bare.names[0] == "class 1"
    assert len(predict(finder, picture(), threshold=0.0, top_k=4)[0]) == 4
    assert len(predict(finder, picture(), threshold=0.9)[0]) == 0
    nothing = predict(finder, picture(), threshold=0.9)[0]
    assert nothing.to_coco(1) == [] and nothing.draw().size[0] >= 64
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\], got 1.5"):
        predict(finder, picture(), threshold=1.5)
    with pytest.raises(ValueError, match="the model has 3 classes, got 1 category"):
        predict(finder.model, picture(), categories=CATEGORIES[:1])


class Wide(DeformableDETR):
    """Each box is three times as wide as the image."""

    def forward(self, batch):
        boxes = torch.tensor([0.5, 0.5, 3.0, 0.5]).repeat(len(batch), 6, 1)
        return Output(torch.zeros(len(batch), 6, 3), boxes)


@pytest.mark.parametrize("tiles", [None, 40])
def test_boxes_end_where_the_image_does(tiles):
    detector = Detector(Wide(TINY), CATEGORIES, transforms="digits")
    (found,) = predict(detector, picture(), tiles=tiles)
    assert len(found) and found.boxes[:, 0].min() == 0 and found.boxes[:, 2].max() == 64
    assert found.to_coco(1)[0]["bbox"][2] <= 64


def test_where_nothing_is_found_the_best_score_is_known(finder):
    for tiles in (None, 40):
        (found,) = predict(finder, picture(), threshold=0.9, tiles=tiles)
        assert len(found) == 0
        assert found.highest == pytest.approx(torch.tensor(2.0).sigmoid().item())


def test_suppression_on_request(finder):
    """Two boxes that overlap, each with three classes: suppression leaves one of each class."""
    for nms, count in ((None, 6), (0.9, 6), (0.0, 3)):
        found = predict(finder, picture(), threshold=0.0, nms=nms)[0]
        assert len(found) == count and found.names[0] == "green"
    with pytest.raises(ValueError, match=r"nms must be in \[0, 1\], or None for all boxes, got 2"):
        predict(finder, picture(), nms=2)


def test_the_file_keeps_threshold_and_transforms(tmp_path):
    path = tmp_path / "model.safetensors"
    model = DeformableDETR(TINY)
    save_model(model, path, CATEGORIES, {"command": "this one"})
    assert load_detector(path).threshold == 0.5 and load_detector(path).transforms == "digits"
    update_card(path, threshold=0.0, transforms="coco")
    assert read_card(path) == {"command": "this one", "threshold": 0.0, "transforms": "coco"}
    detector = load_detector(path)
    assert detector.threshold == 0 and detector.transforms == "coco"
    assert detector.short_side == 800
    update_card(path, short_side=96)
    assert load_detector(path).short_side == 96
    assert detector.categories == CATEGORIES
    for name, tensor in load_model(path)[0].state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    update_card(path, transforms="digits")
    (found,) = predict(path, picture())
    assert len(found) == 18  # a threshold of 0 keeps all of 6 queries and 3 classes
    wrongs = {"threshold": "high"}, {"threshold": 2}, {"transforms": "secret"}, {"short_side": 8}
    for wrong in wrongs:
        save_model(model, path, CATEGORIES, wrong)
        with pytest.raises(ValueError, match=next(iter(wrong))):
            load_detector(path)


def test_it_holds_a_batch_at_most(finder, tmp_path, monkeypatch):
    """Of a folder of many, images are read as they are needed."""
    for i in range(5):
        picture().save(tmp_path / f"{i}.png")
    read = []
    original = Source.read
    monkeypatch.setattr(Source, "read", lambda source: read.append(source) or original(source))
    each = predict_each(finder, tmp_path, batch_size=2)
    next(each)
    assert len(read) == 2
    assert len(list(each)) == 4 and len(read) == 5


def test_drawing(finder):
    (found,) = predict(finder, picture())
    drawn = found.draw()
    assert drawn.size == (64 * 8, 48 * 8)
    assert drawn.getpixel((6 * 8, 15 * 8)) == (0x56, 0xB4, 0xE9)  # the colour of label 1


# Classes


SMALL = {"num_classes": 5, "backbone": "small", "embed_dim": 32, "num_heads": 2, "ffn_dim": 32}
WITH_FIVE_CLASSES = {
    "one stage": dataclasses.replace(TINY, num_classes=5),
    "two stages": dataclasses.replace(TINY, num_classes=5, two_stage=True),
    "no object": DETRConfig(**SMALL, num_queries=6, encoder_layers=1, decoder_layers=2),
}


@pytest.mark.parametrize("kind", WITH_FIVE_CLASSES)
def test_a_model_of_some_classes_keeps_their_logits(kind):
    torch.manual_seed(0)
    model = build_model(WITH_FIVE_CLASSES[kind]).eval()
    for head in model.class_heads:
        torch.nn.init.normal_(head.weight)
    names = [{"id": i, "name": str(i)} for i in range(5)]
    few, _ = with_classes(model, names, [names[i] for i in (4, 0, 2)])
    batch = Batch.from_images([View(TO_TENSOR).of(picture())])
    with torch.no_grad():
        before, after = model(batch), few(batch)
    kept = [4, 0, 2, 5] if kind == "no object" else [4, 0, 2]
    torch.testing.assert_close(after.logits, before.logits[..., kept])
    torch.testing.assert_close(after.boxes, before.boxes)
    assert not few.training


def test_categories_are_found_by_their_names(tmp_path):
    """Whatever their order and ids; names that the model has not are no other classes."""
    torch.manual_seed(0)
    model = DeformableDETR(TINY).eval()
    for head in model.class_heads:
        torch.nn.init.normal_(head.weight)
    save_model(model, tmp_path / "a.safetensors", CATEGORIES, {"threshold": 0.0})
    detector = load_detector(tmp_path / "a.safetensors")
    wanted = [{"id": 1, "name": "blue"}, {"id": 2, "name": "red"}]
    (all_found,) = predict(detector, picture())
    scores = {}
    for query, name, score in zip(
        all_found.queries.tolist(), all_found.names, all_found.scores.tolist(), strict=True
    ):
        scores[query, name] = score
    for given in (detector, tmp_path / "a.safetensors"):
        (found,) = predict(given, picture(), categories=wanted)
        assert len(found) == 12 and set(found.names) == {"blue", "red"}
        ids = {"blue": 1, "red": 2}
        assert found.category_ids == [ids[name] for name in found.names]
        for query, name, score in zip(
            found.queries.tolist(), found.names, found.scores.tolist(), strict=True
        ):
            assert score == pytest.approx(scores[query, name], abs=1e-6)
    with pytest.raises(ValueError, match="such as 'pink'"):
        predict(detector, picture(), categories=[{"id": 3, "name": "pink"}])


def test_a_detector_for_the_datas_categories():
    names = ["N/A", "cat", "dog"]
    detector = Detector(DeformableDETR(TINY), [{"id": i, "name": n} for i, n in enumerate(names)])
    wanted = [{"id": 17, "name": "dog"}, {"id": 90, "name": "cat"}]
    fitting = detector.for_categories(wanted)
    assert fitting.categories == wanted and fitting.model.config.num_classes == 2
    head, old = fitting.model.class_heads[0], detector.model.class_heads[0]
    assert torch.equal(head.weight, old.weight[[2, 1]])
    with pytest.raises(ValueError, match="such as 'cow'"):
        detector.for_categories([*wanted, {"id": 1, "name": "cow"}])
