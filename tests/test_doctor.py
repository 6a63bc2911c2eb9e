"""The self-test before training: quiet about what is sound, and clear about what is not."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from deformable_detr import DeformableDETR
from deformable_detr.data.coco import CocoDataset, find_split
from deformable_detr.data.transforms import TO_TENSOR, digits_train_transform
from deformable_detr.models import build_model
from deformable_detr.training import overfit
from deformable_detr.training.config import TrainConfig
from deformable_detr.training.doctor import doctor, duration
from deformable_detr.training.recipe import load_recipe
from tests.conftest import TINY, save_annotations


def load(coco, transform=TO_TENSOR):
    return CocoDataset(*find_split(coco, "train"), transform)


def model_of(**changes):
    torch.manual_seed(0)
    return DeformableDETR(dataclasses.replace(TINY, **changes))


def examine(coco, model=None, steps=3, transform=TO_TENSOR, seconds=math.inf, **options):
    """However loaded the machine is, all steps are made."""
    data = load(coco, transform)
    return doctor(model or model_of(), data, steps, progress=False, seconds=seconds, **options)


def texts(diagnosis, level):
    return [finding.text for finding in diagnosis.findings if finding.level == level]


def edit(coco, change):
    path = coco / "annotations" / "train.json"
    content = json.loads(path.read_text())
    change(content)
    save_annotations(coco, content)


def test_sound_data_and_a_sound_model_are_ready_to_train(coco):
    model = model_of()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    found = examine(coco, model, 110, digits_train_transform())
    assert found.healthy and not texts(found, "warning"), found.table()
    assert len(found.losses) == 110 and found.losses[-1] < overfit.LOSS_FALLS_TO * found.losses[0]
    assert found.ap >= overfit.AP_REACHES
    assert found.table().endswith("\nready to train: 0 fatal, 0 warnings")
    assert "5 annotations and 6 of 6 images checked" in found.table()
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_sound_detr_is_ready_to_train():
    """Dense attention takes longer to place boxes: what is expected of all must leave it time."""
    recipe, samples = load_recipe("digits-detr"), Path(__file__).parents[1] / "data" / "samples"
    data = CocoDataset(samples, samples / "annotations.json", recipe.train_transform())
    torch.manual_seed(0)
    model = build_model(recipe.model_config(10))
    found = doctor(model, data, overfit.ENOUGH_STEPS, progress=False, seconds=math.inf)
    assert found.healthy and not texts(found, "warning"), found.table()
    assert "gradients reach backbone, box_heads, class_heads, decoder, encoder" in found.table()


def test_faults_of_the_data_are_counted_by_kind_with_an_example(coco):
    def change(content):
        for annotation in content["annotations"][:2]:
            annotation["bbox"] = [90, 3, 4, 5]

    edit(coco, change)
    found = examine(coco)
    (fatal,) = texts(found, "fatal")
    assert fatal.startswith(
        "2 x box outside, the first: annotation 1000: box [90, 3, 4, 5] lies outside"
    )
    assert [text.split(":")[0] for text in texts(found, "warning")] == ["2 x area, the first"]
    assert not found.losses and found.table().endswith("do not train yet: 2 fatal, 2 warnings")


def test_unused_categories_are_named(coco):
    edit(coco, lambda c: c["categories"].append({"id": 9, "name": "mauve"}))
    found = examine(coco, model_of(num_classes=4))
    assert any("1 of 4 categories have no box: mauve" in text for text in texts(found, "warning"))


def test_another_number_of_classes_is_fatal(coco):
    assert texts(examine(coco, model_of(num_classes=4)), "fatal") == [
        "the model has 4 classes, the data 3 categories"
    ]


def test_data_without_any_box_is_fatal(coco):
    edit(coco, lambda c: c.update(annotations=[]))
    assert texts(examine(coco), "fatal") == ["no image has a box: there is nothing to learn"]


def test_a_model_with_fewer_queries_than_objects_is_warned_of(coco):
    def change(content):
        content["annotations"] += [
            a | {"id": a["id"] + 100 * i} for a in content["annotations"] for i in range(1, 8)
        ]

    edit(coco, change)
    assert any("the 6 queries of the model" in text for text in texts(examine(coco), "warning"))


def test_a_part_without_gradient_is_fatal(coco):
    model = model_of()
    for projection in model.neck.input_proj:
        projection.register_forward_hook(lambda module, inputs, output: output.detach())
    (text,) = texts(examine(coco, model), "fatal")
    assert text == "no gradient reaches ['backbone']"


def test_infinity_and_nan_are_fatal_and_traced(coco):
    model = model_of()
    with torch.no_grad():
        model.encoder.layers[0].ffn.linear2.bias.fill_(torch.inf)
    (text,) = texts(examine(coco, model), "fatal")
    assert "not finite at step 1: first in encoder.layers.0.ffn.linear2 (Linear), whose" in text


def test_a_model_that_cannot_learn_is_fatal_after_enough_steps(coco, monkeypatch):
    monkeypatch.setattr(overfit, "RATE", 1e-9)
    monkeypatch.setattr(overfit, "ENOUGH_STEPS", 3)
    loss, ap = texts(examine(coco), "fatal")
    assert loss.startswith("loss from ") and ap.startswith("AP 0.")


def test_when_time_is_short_few_steps_are_judged_mildly(coco):
    found = examine(coco, steps=100, seconds=0)
    assert found.healthy and len(found.losses) == 1
    assert "in 1 step on one batch (expected: to 40% or less, after 100" in "".join(
        texts(found, "warning")
    )
    assert "1 of 6 images checked" in found.table()


def test_images_that_cannot_be_read_are_counted(coco):
    for name in ("101", "103", "104"):
        (coco / "train" / f"{name}.png").write_bytes(b"no picture")
    found = examine(coco)
    (text,) = texts(found, "fatal")
    assert text.startswith("3 x corrupt image, the first: image 10")
    assert found.table().endswith("do not train yet: 3 fatal, 0 warnings")


def test_an_image_of_the_batch_that_nobody_had_looked_at(coco, monkeypatch):
    monkeypatch.setattr("deformable_detr.training.doctor.picture_faults", lambda *_: [])
    for path in (coco / "train").iterdir():
        path.write_bytes(b"no picture")
    (text,) = texts(examine(coco, seconds=0), "fatal")
    assert text.startswith("cannot read image")


def test_it_needs_a_step(coco):
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        examine(coco, steps=0)


def test_the_time_that_a_training_takes(coco, monkeypatch):
    """From the time of a step on the batch, whatever the machine does meanwhile."""
    real = overfit.overfit

    def timed(diagnosis, *given):
        real(diagnosis, *given)
        diagnosis.step_seconds = 80.0  # of 4 images

    monkeypatch.setattr("deformable_detr.training.doctor.overfit", timed)
    config = TrainConfig(epochs=9, batch_size=2, accumulate=3, evaluate_every=3, num_workers=1)
    found = examine(coco, config=config, val_images=12)
    (text,) = (text for text in texts(found, "ok") if text.startswith("training takes"))
    # 9 x 120 s, and 3 x 12 images of which each takes a third of 20 s
    assert text == (
        "training takes about 22 minutes: 9 epochs of 1 step, about 120 s each, and 3 evaluations"
    )
    assert not any(t.startswith("training takes") for t in texts(examine(coco), "ok"))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(50, "50 seconds"), (600, "10 minutes"), (7200, "2 hours"), (200_000, "2.3 days")],
)
def test_a_time_has_the_unit_that_suits_it(seconds, text):
    assert duration(seconds) == text
