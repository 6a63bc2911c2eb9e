"""Classes are found by their names, wherever a model meets data of other classes."""

import dataclasses
import logging
import math

import pytest
import torch

from deformable_detr import Batch, DeformableDETR
from deformable_detr.inference.detector import Detector
from deformable_detr.models import DETRConfig, build_model
from deformable_detr.weights.classes import plain_categories, with_classes
from deformable_detr.weights.ours import save_model
from deformable_detr.weights.published import load_pretrained
from tests.conftest import TINY

NAMES = ["ant", "bee", "cat", "dog", "eel"]
PRIOR = -math.log(99)  # the logit of 0.01
SMALL = {"num_classes": 5, "backbone": "small", "embed_dim": 32, "num_heads": 2, "ffn_dim": 32}
CONFIGS = {
    "one stage": dataclasses.replace(TINY, num_classes=5),
    "two stages": dataclasses.replace(TINY, num_classes=5, two_stage=True),
    "no object": DETRConfig(**SMALL, num_queries=6, encoder_layers=1, decoder_layers=2),
}


def categories(*names, first=0):
    return [{"id": i, "name": name} for i, name in enumerate(names, first)]


def random_model(kind):
    torch.manual_seed(0)
    model = build_model(CONFIGS[kind]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@torch.no_grad()
def outputs(model):
    generator = torch.Generator().manual_seed(1)
    return model(Batch.from_images([torch.randn(3, 48, 64, generator=generator)]))


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_class_keeps_its_logit_wherever_it_goes(kind):
    model = random_model(kind)
    wanted = categories("eel", "fox", "ant", first=10)  # other ids, another order, one new
    other, report = with_classes(model, categories(*NAMES), wanted)
    before, after = outputs(model), outputs(other)
    kept = [0, 2, 3] if kind == "no object" else [0, 2]
    rows = [4, 0, 5] if kind == "no object" else [4, 0]
    torch.testing.assert_close(after.logits[..., kept], before.logits[..., rows])
    torch.testing.assert_close(after.boxes, before.boxes)
    assert other.config == dataclasses.replace(model.config, num_classes=3) and not other.training
    assert report.kept_classes == ["eel", "ant"] and report.new_classes == ["fox"]
    assert report.classes() == "classes kept: eel, ant\nclasses made anew: fox"
    new = other.class_heads[0].bias[1].item()
    assert new == pytest.approx(PRIOR) if kind != "no object" else abs(new) < 0.2  # torch's own
    if kind == "two stages":  # row 0 tells objects from background, whatever the classes
        torch.testing.assert_close(
            after.others["first"].logits[..., 0], before.others["first"].logits[..., 0]
        )


def test_the_same_names_in_another_order_move_and_ten_others_start_anew():
    """By row, the first would give wrong names with high scores, the second reuse what is not
    theirs."""
    model = random_model("one stage")
    moved, report = with_classes(model, categories(*NAMES), categories(*reversed(NAMES)))
    assert torch.equal(moved.class_heads[0].weight, model.class_heads[0].weight.flip(0))
    assert report.kept_classes == NAMES[::-1] and not report.new_classes
    others, report = with_classes(model, categories(*NAMES), categories(*"vwxyz"))
    assert (others.class_heads[0].bias == PRIOR).all() and report.new_classes == list("vwxyz")
    assert report.classes() == "classes made anew: v, w, x, y, z"
    assert "class_heads.0.weight: 0 of 5 rows kept: (5, 32) before, (5, 32) now" in str(report)
    assert report.kept and not any("class_head" in name for name in report.kept)


def test_nothing_changes_where_names_are_the_same():
    model = random_model("one stage")
    same, report = with_classes(model, categories(*NAMES), categories(*NAMES, first=3))
    assert same is model and report.kept == list(model.state_dict()) and not report.fresh


def test_of_several_classes_of_one_name_the_first_becomes_the_first():
    model = random_model("one stage")
    known = categories("N/A", "cat", "N/A", "dog", "eel")
    other, report = with_classes(model, known, categories("N/A", "N/A", "N/A", "cat"))
    weight = other.class_heads[0].weight
    assert torch.equal(weight[[0, 1, 3]], model.class_heads[0].weight[[0, 2, 1]])
    assert report.new_classes == ["N/A"]
    with pytest.raises(ValueError, match="the model has 5 classes, got 2 categories"):
        with_classes(model, known[:2], known)


def test_many_names_are_not_all_said():
    _, report = with_classes(random_model("one stage"), categories(*NAMES), plain_categories(91))
    assert report.classes() == (
        "classes kept: cat, dog\nclasses made anew: __background__, person, bicycle, car, "
        "motorcycle, airplane, bus, train, ... (89 in all)"
    )


@pytest.fixture
def file(tmp_path):
    model = random_model("one stage")
    save_model(model, tmp_path / "m.safetensors", categories(*NAMES))
    return model, tmp_path / "m.safetensors"


def test_loading_for_named_classes(file, caplog):
    model, path = file
    wanted = categories("dog", "fox", first=1)
    with caplog.at_level(logging.WARNING):
        loaded = load_pretrained(path, categories=wanted)
    assert loaded.categories == wanted
    head = loaded.model.class_heads[0]
    assert torch.equal(head.weight[0], model.class_heads[0].weight[3]) and head.bias[1] == PRIOR
    assert "classes kept: dog\nclasses made anew: fox" in caplog.text
    again = DeformableDETR.from_pretrained(path, categories=wanted)
    assert torch.equal(again.class_heads[0].weight[0], head.weight[0])


def test_loading_for_a_number_of_classes(file):
    """Whose names are unknown: the file's own, if they are as many, else nothing is kept."""
    model, path = file
    same = load_pretrained(path, num_classes=5)
    assert same.categories == categories(*NAMES) and not same.report.fresh
    torch.testing.assert_close(same.model.state_dict(), model.state_dict())
    for number in (3, 91):  # 91 would be COCO's, with cat and dog
        loaded = load_pretrained(path, num_classes=number)
        assert (loaded.model.class_heads[0].bias == PRIOR).all()
        assert loaded.categories == plain_categories(number)
        assert not loaded.report.kept_classes and len(loaded.report.new_classes) == number
    with pytest.raises(ValueError, match="got num_classes=3 and 2 categories"):
        load_pretrained(path, num_classes=3, categories=categories("dog", "fox"))


def test_a_detector_keeps_only_what_it_knows(file):
    detector = Detector(file[0], categories(*NAMES))
    fitting = detector.for_categories(categories("eel", "ant", first=7))
    assert torch.equal(fitting.model.class_heads[0].weight, file[0].class_heads[0].weight[[4, 0]])
    assert fitting.categories == categories("eel", "ant", first=7)
    with pytest.raises(ValueError, match="2 of the data's it has not, such as 'fox'"):
        detector.for_categories(categories("eel", "fox", "gnu"))
    assert detector.for_categories(categories(*NAMES)) is detector


def test_other_numbers_of_queries_keep_what_there_is():
    model = random_model("no object")
    for number in (4, 9):
        other, report = with_classes(model, categories(*NAMES), categories(*NAMES), number)
        rows = min(number, 6)
        assert torch.equal(other.query_embed.weight[:rows], model.query_embed.weight[:rows])
        assert other.config.num_queries == len(other.query_embed.weight) == number
        sizes = f"{rows} of {number} rows kept: (6, 32) before, ({number}, 32) now"
        assert report.fresh == {"query_embed.weight": sizes}


def test_precision_stays():
    model = random_model("two stages").double()
    other, _ = with_classes(model, categories(*NAMES), categories("bee"))
    assert {p.dtype for p in other.parameters()} == {torch.float64}
    assert torch.equal(other.class_heads[1].weight, model.class_heads[1].weight[[1]])
