"""Efficient DETR: tokens as queries, classes in the first stage, one head for both parts."""

import dataclasses

import pytest
import torch

from deformable_detr.losses import SetCriterion
from deformable_detr.models.efficient_detr import EfficientDETR, EfficientDETRConfig
from deformable_detr.structures import Predictions
from tests.members import build, make_batch, tiny

CONFIG = tiny("efficient_detr")


@pytest.mark.parametrize(
    ("shared", "parameters"),
    # the shape of others' code, and without its second head: 23,387 of classes, 132,612 of boxes
    [(False, 32_896_382), (True, 32_896_382 - 23_387 - 132_612)],
)
def test_the_full_size_has_as_many_parameters_as_the_published_shape(shared, parameters):
    config = EfficientDETRConfig(shared_head=shared)
    assert (config.encoder_layers, config.decoder_layers) == (3, 1)
    with torch.device("meta"):
        model = EfficientDETR(config)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_queries_are_the_chosen_tokens_with_their_gradient():
    model = build(CONFIG).eval()
    memory = model.encoder(model.tokens(make_batch(1, 1)))
    features = memory.features.detach().requires_grad_()
    queries, _ = model.queries(dataclasses.replace(memory, features=features), None)
    proposals = model.first_stage.propose(memory)
    usable = (proposals.boxes < 1).all(-1)
    scores = proposals.logits.max(-1).values.masked_fill(~usable, -torch.inf)
    for image in range(2):
        best = scores[image].topk(6).indices
        torch.testing.assert_close(queries.content[image], memory.features[image, best])
        torch.testing.assert_close(queries.references[image], proposals.boxes[image, best])
    assert not queries.references.requires_grad
    queries.content.sum().backward()
    expected = torch.zeros_like(features)
    for image in range(2):
        expected[image, scores[image].topk(6).indices] = 1
    assert torch.equal(features.grad, expected)


def test_one_head_is_trained_by_both_parts():
    model, batch = build(CONFIG).train(), make_batch(2, 1)
    assert not model.class_heads and not model.box_heads
    names = [name for name in model.state_dict() if "head" in name]
    assert names and all(name.startswith("first_stage.") for name in names)
    losses = SetCriterion()(model(batch), batch.targets)
    gradients = []
    for suffix in ("", "_first"):
        model.zero_grad()
        sum(losses[f"loss_{x}{suffix}"] for x in ("class", "box")).backward(retain_graph=True)
        stage = model.first_stage
        gradients.append([stage.class_head.weight.grad, stage.box_head.layers[-1].weight.grad])
    assert all(g.any() for part in gradients for g in part)


def test_with_two_heads_each_has_its_own():
    model, batch = build(dataclasses.replace(CONFIG, shared_head=False)).train(), make_batch(2, 1)
    losses = SetCriterion()(model(batch), batch.targets)
    (losses["loss_class"] + losses["loss_box"]).backward()
    assert model.class_heads[0].weight.grad.any()
    assert model.first_stage.class_head.weight.grad is None


def test_the_first_stage_learns_real_classes_at_all_tokens():
    model, batch = build(CONFIG).train(), make_batch(2, 1)
    output = model(batch)
    first = output.others["first"]
    assert first.logits.shape[1] == model.tokens(batch).features.shape[1]
    losses = SetCriterion()(output, batch.targets)
    alone = Predictions(first.logits, first.boxes)
    matches = SetCriterion().matcher(alone, batch.targets)
    wanted = torch.zeros_like(first.logits)
    for image, (tokens, objects) in enumerate(matches):
        wanted[image, tokens, batch.targets[image].labels[objects]] = 1
    p = first.logits.sigmoid()
    focal = wanted * -0.25 * (1 - p) ** 2 * p.log() + (1 - wanted) * -0.75 * p**2 * (1 - p).log()
    torch.testing.assert_close(losses["loss_class_first"], 2 * focal.sum() / 3)
