"""Rows of studies whose detectors are changed, and what is looked at in them, by known answers."""

import dataclasses
import importlib
import sys
from pathlib import Path

import pytest
import torch

from deformable_detr.inference.postprocess import postprocess
from deformable_detr.layers.attention import Sampling
from deformable_detr.structures import Batch, Target
from deformable_detr.training.batches import load_batches
from deformable_detr.training.recipe import load_recipe
from tests.conftest import write_coco

FOLDER = Path(__file__).parents[1] / "experiments"
BACKBONES = {"base": "backbone", "FPN on the maps": "backbone.backbone"}


@pytest.fixture
def study(monkeypatch):
    """Imports one as `python experiments/name.py` would find it."""
    monkeypatch.syspath_prepend(FOLDER)
    before = set(sys.modules)
    yield importlib.import_module
    for name in {path.stem for path in FOLDER.glob("*.py")} - before:
        sys.modules.pop(name, None)


@pytest.fixture
def squares(study, monkeypatch, tmp_path):
    """A few images for the studies that train, in place of the digits."""
    for split, images in (("train", 6), ("val", 3), ("test", 3)):
        write_coco(tmp_path / "data", split, images)
    for name in ("detectors", "points", "faster_rcnn"):
        monkeypatch.setattr(study(name), "DATA", tmp_path / "data")
    return tmp_path / "data"


def changed(study, name):
    """The base of the ablations, or one of its rows, and what makes a new one."""
    return study("ablations").STUDY.configurations[name].build(0).eval()


@torch.no_grad()
def test_fpn_brings_the_coarse_map_to_the_finer_one(study):
    """What is above the finer map matters to its tokens; without the pyramid it does not."""
    batch = Batch.from_images([torch.rand(3, 128, 96)])
    for name, matters in (("base", False), ("FPN on the maps", True)):
        model = changed(study, name)
        before = model.tokens(batch)
        assert before.spatial_shapes == [(16, 12), (8, 6)]
        for parameter in model.get_submodule(BACKBONES[name]).blocks[-1].parameters():
            parameter.mul_(2)
        differs = (model.tokens(batch).features - before.features).abs().amax((0, 2)) > 1e-4
        assert differs[: 16 * 12].any() == matters and differs[16 * 12 :].all()


@torch.no_grad()
def test_weights_per_level_compete_within_a_level_only(study):
    base, alone = (changed(study, name) for name in ("base", "weights per level"))
    query, reference = torch.randn(2, 7, 64), torch.rand(2, 7, 2, 2)
    shapes, weights = [(8, 6), (4, 3)], []
    for model in (base, alone):
        attention = model.encoder.layers[0].attention
        torch.manual_seed(0)
        torch.nn.init.normal_(attention.attention_weights.weight)
        weights.append(attention.sampling(query, reference, shapes).weights)
    together, alone = weights
    assert (together.sum(-1) - 0.5).abs().max() > 0.1
    assert torch.allclose(alone.sum(-1), torch.tensor(0.5))
    assert torch.allclose(alone * 2, together / together.sum(-1, keepdim=True))


@torch.no_grad()
def test_the_dilated_map_has_the_old_one_at_every_other_place(study):
    dense = study("dense")
    detr, dc5 = (dense.STUDY.configurations[n].build(0).eval() for n in ("DETR", "DETR-DC5"))
    images = torch.randn(2, 3, 96, 128)
    (*_, coarse), (*_, fine) = detr.backbone(images), dc5.backbone(images)
    assert fine.shape[-2:] == (12, 16) and dc5.backbone.strides == [4, 8, 8]
    assert torch.allclose(fine[:, :, ::2, ::2], coarse, atol=1e-5)
    assert (fine[:, :, 1::2, 1::2] - coarse).abs().max() > 0.1
    assert dc5.tokens(Batch.from_images(list(images))).spatial_shapes == [(12, 16)]


def test_dense_rows_share_detr_and_differ_in_their_scoring(study):
    configurations = study("dense").STUDY.configurations
    heads = {n: c.build(0).class_heads[0] for n, c in configurations.items()}
    assert heads["DETR"].out_features == 11 == heads["DETR, focal loss"].out_features + 1
    places = [study("study").Place(study(name).STUDY, "DETR", 0) for name in ("dense", "detr")]
    assert places[0].folder == places[1].folder
    for name, each in study("dense_rates").STUDY.configurations.items():
        backbone = each.build(0).backbone
        assert (backbone.strides[-1] == 8) == name.startswith("DETR-DC5")


def test_what_training_finds_the_points_at(study):
    """Before training: the star, which no query has changed, and equal weights on both maps."""
    points = study("points")
    model = points.STUDY.configurations[points.CONFIGURATION].build(0)
    box = torch.tensor([[0.5, 0.5, 0.25, 0.25]])
    batch = Batch.from_images(
        [torch.rand(3, 128, 128)], [Target(0, torch.tensor([3]), box, (128, 128))]
    )
    found = points.look(model, batch)
    for part in ("encoder", "decoder"):
        for name, value in (("direction", 1), ("own", 0), ("level_0", 0.5), ("level_1", 0.5)):
            assert found[f"{part}_medium_{name}"] == pytest.approx(value, abs=1e-4)
    assert found["encoder_all_length"] == pytest.approx(2.5 * 12)  # 1 to 4 cells of 8 or 16 pixels
    assert found["encoder_all_length"] == found["encoder_medium_length"]
    with torch.no_grad():
        for layer in model.encoder.layers:
            layer.attention.sampling_offsets.bias.mul_(-1)
    assert points.look(model, batch)["encoder_all_direction"] == pytest.approx(-1)


def test_distances_of_points_from_an_objects_edge(study):
    """By hand: one head, one map of 10 x 10 cells, two points, of which one lies on the edge."""
    figures = study("points").figures
    locations = torch.tensor([[0.5, 0.5], [0.7, 0.5]]).view(1, 1, 1, 1, 2, 2)
    sampling = Sampling(locations, torch.tensor([0.25, 0.75]).view(1, 1, 1, 1, 2), [(10, 10)])
    box = torch.tensor([[0.5, 0.5, 0.4, 0.2]])
    one = torch.tensor([0])
    found = figures(sampling, one, one, torch.tensor([[0.5, 0.5]]), box)
    assert found["edge"].item() == pytest.approx(0.25)  # of the point in the middle: 1
    assert found["border"].item() == pytest.approx(0.75)
    assert found["length"].item() == pytest.approx(0.75 * 0.2 * 128)
    assert found["level_0"].item() == 1
    cells = figures(sampling, one, one, torch.tensor([[0.5, 0.5, 0.2, 0.2]]), box)
    assert torch.equal(cells["length"], found["length"])


def test_tokens_of_one_object_and_no_other(study):
    points = study("points")
    boxes = torch.tensor([[0.25, 0.5, 0.5, 1.0], [0.5, 0.25, 1.0, 0.5]])
    image, token, box = points.tokens_inside([Target(0, torch.zeros(2), boxes, (8, 8))] * 2, 2, 2)
    assert image.tolist() == [0, 0, 1, 1] and token.tolist() == [2, 1, 2, 1]
    assert torch.equal(box, boxes.repeat(2, 1))


def test_points_are_followed_over_a_training(study, squares, monkeypatch, tmp_path):
    """One that is killed after its second look goes on from there, and has seen the same."""
    points = study("points")
    detector = dataclasses.replace(
        points.STUDY.configurations[points.CONFIGURATION], steps=4, evaluations=2
    )
    rows = points.follow(detector, 0, tmp_path / "whole")
    assert {row["at"] for row in rows} == {0, 2, 4}
    look, calls = points.look, []

    def killed_at_the_third(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return look(*arguments)

    monkeypatch.setattr(points, "look", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        points.follow(detector, 0, tmp_path / "killed")
    assert points.follow(detector, 0, tmp_path / "killed") == rows and len(calls) == 4
    lengths = [row["value"] for row in rows if row["metric"] == "decoder_all_length"]
    assert len(set(lengths)) == 3


def test_anchors_find_what_they_are_shown(study):
    """Detections come back as torchvision has them, padded by boxes that nobody counts."""
    rival = study("faster_rcnn")
    torch.manual_seed(0)
    model = rival.Anchors(10).eval()
    box = torch.tensor([[0.5, 0.5, 0.25, 0.5]])
    targets = [Target(0, torch.tensor([3]), box, (128, 128))]
    batch = Batch.from_images([torch.randn(3, 128, 128)], targets)
    model.network.forward = lambda images, objects=None: [
        {
            "boxes": torch.tensor([[48.0, 32.0, 80.0, 96.0]]),
            "labels": torch.tensor([4]),
            "scores": torch.tensor([0.75]),
        }
    ]
    (found,) = postprocess(model(batch), [(128, 128)], rival.FOUND)
    assert found.scores[0].item() == pytest.approx(0.75) and found.labels[0] == 3
    assert torch.allclose(found.boxes[0], torch.tensor([48.0, 32.0, 80.0, 96.0]))
    assert len(found) == rival.FOUND and found.scores[1:].max() < 1e-20
    assert found.boxes[1:].abs().max() == 0


def test_faster_rcnn_is_trained_on_what_the_others_see(study, squares, monkeypatch, tmp_path):
    rival, detectors = study("faster_rcnn"), study("detectors")
    seen = []
    forward = rival.Anchors.forward

    def watched(self, batch):
        seen.extend(t.image_id for t in batch.targets if self.training)
        return forward(self, batch)

    monkeypatch.setattr(rival.Anchors, "forward", watched)
    rows = rival.train_anchors(rival.Anchored(1e-3, steps=2, evaluations=2), 0, tmp_path)
    found = {(row["split"], row["at"], row["metric"]): row["value"] for row in rows}
    assert {("val", 1, "ap"), ("val", 2, "object_ap"), ("test", 2, "ap_small")} <= found.keys()
    assert found["model", 2, "multiply_adds"] > 10**8
    draws = detectors.Draws(*detectors.find_split(squares, "train"))
    draws.length = 8
    config = load_recipe("digits").changed(["train.seed=0"]).train
    batches = load_batches(draws, config, range(2), 1, 0, 1)
    assert seen == [t.image_id for (batch,) in batches for t in batch.targets]
