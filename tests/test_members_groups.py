"""Group DETR: each group is a model of its own that shares all weights, and the loss their mean."""

import dataclasses

import pytest
import torch

from deformable_detr import postprocess
from deformable_detr.losses import SetCriterion
from deformable_detr.models import MODELS
from deformable_detr.models.dn_detr import DNDETR, DNDETRConfig
from deformable_detr.models.groups import Grouped, GroupOptions
from tests.members import build, make_batch, output_of, tiny

on_both = pytest.mark.parametrize("name", ["group_detr", "dense_group_detr"])
K, N = 3, 6


def pair(name):
    """A model with three groups, and one without, whose only group is any of those three."""
    whole = build(tiny(name, groups=K)).train()
    single = build(tiny(name, groups=1)).train()
    whole.backbone.eval()
    single.backbone.eval()
    return whole, single


def take(single, whole, group):
    """Give the single model the whole's weights and one group of its queries."""
    state = whole.state_dict()
    table = state["query_embed.weight"]
    single.load_state_dict(state | {"query_embed.weight": table[group * N : (group + 1) * N]})


@on_both
def test_each_group_says_what_it_would_say_alone(name):
    (whole, single), batch = pair(name), make_batch(2, 3)
    output = output_of(whole, batch)
    assert output.groups == K and output.logits.shape[1] == K * N
    for group in range(K):
        take(single, whole, group)
        alone, part = output_of(single, batch), slice(group * N, (group + 1) * N)
        torch.testing.assert_close(output.logits[:, part], alone.logits)
        torch.testing.assert_close(output.boxes[:, part], alone.boxes)


@on_both
def test_the_loss_is_the_mean_of_the_groups(name):
    (whole, single), batch = pair(name), make_batch(2, 3)
    criterion = SetCriterion()
    losses = criterion(output_of(whole, batch), batch.targets)
    parts = []
    for group in range(K):
        take(single, whole, group)
        parts.append(criterion(output_of(single, batch), batch.targets))
    for key, term in losses.items():
        mean = sum(part[key] for part in parts) / K
        # softmax's class loss is a mean over queries, weighted by class: as many in each group
        torch.testing.assert_close(term, mean, rtol=1e-4, atol=1e-6, msg=key)


@on_both
def test_every_object_is_found_once_in_each_group(name):
    (whole, _), batch = pair(name), make_batch(2, 3)
    output = output_of(whole, batch)
    matches = SetCriterion().matcher(output, batch.targets, output.scoring)
    for (queries, objects), target in zip(matches, batch.targets, strict=True):
        for group in range(K):
            own = objects[queries // N == group]
            assert sorted(own.tolist()) == list(range(len(target.labels)))


@on_both
def test_the_first_group_alone_is_left_after_training(name):
    (whole, single), batch = pair(name), make_batch(1, 1)
    take(single, whole, 0)
    found, alone = whole.eval()(batch), single.eval()(batch)
    assert found.groups == 1 and found.logits.shape[1] == N
    torch.testing.assert_close(found.boxes, alone.boxes)


@on_both
def test_detections_of_several_groups_are_refused(name):
    (whole, _), batch = pair(name), make_batch(2)
    with pytest.raises(
        ValueError, match=r"^detections are those of one group .*, got 3, .* first$"
    ):
        postprocess(output_of(whole, batch), [(64, 80)])
    without = output_of(whole, dataclasses.replace(batch, targets=None))  # nothing to train on
    assert len(postprocess(without, [(64, 80)])[0]) > 0


@on_both
def test_groups_cost_a_table_of_queries(name):
    kind, model = MODELS[name]
    counts = {}
    for groups in (1, 11):
        with torch.device("meta"):
            counts[groups] = sum(p.numel() for p in model(kind(groups=groups)).parameters())
    config = kind()
    assert config.groups == 11
    width = 512 if name == "group_detr" else 256  # contents and positions, or positions
    assert counts[11] - counts[1] == 10 * config.num_queries * width


@dataclasses.dataclass(frozen=True)
class BothConfig(GroupOptions, DNDETRConfig):
    """Denoising and groups."""


class Both(Grouped, DNDETR):
    """Denoising and groups: neither knows of the other."""

    config: BothConfig


def test_denoising_with_groups():
    """Noised objects are no group's; each group answers as it would alone, and all is trained."""
    options = dataclasses.asdict(tiny("dn_detr", denoising_groups=2))
    model, batch = build(BothConfig(**options, groups=K), Both).train(), make_batch(3, 1)
    model.backbone.eval()
    output = output_of(model, batch)
    assert output.groups == K and output.logits.shape[1] == K * N
    assert output.others["denoising"].groups == 2
    single = build(DNDETRConfig(**options)).train()
    single.backbone.eval()
    plain = dataclasses.replace(batch, targets=None)
    for group in range(K):
        part = slice(group * N, (group + 1) * N)
        tables = {key: x[part] for key, x in model.state_dict().items() if x.shape[:1] == (K * N,)}
        assert tables.keys() == {"content_embed.weight", "anchors.weight"}
        single.load_state_dict(model.state_dict() | tables)
        torch.testing.assert_close(output.boxes[:, part], output_of(single, plain).boxes)
    losses = SetCriterion()(output, batch.targets)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.eval()(batch).logits.shape[1] == N


def test_there_is_at_least_one_group():
    with pytest.raises(ValueError, match=r"must be at least 1: \{'groups': 0\}"):
        tiny("group_detr", groups=0)
