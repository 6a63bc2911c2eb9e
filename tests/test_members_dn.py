"""DN-DETR: noised objects from given random numbers, who may look at whom, losses by hand."""

import dataclasses
import math

import pytest
import torch

from deformable_detr.losses import SetCriterion
from deformable_detr.models import denoising
from deformable_detr.models.dn_detr import DNDETR, DNDETRConfig
from deformable_detr.structures import Tokens
from tests.members import build, make_batch, output_of, padded_more, tiny, without_gradient
from tests.test_losses import focal, giou

CONFIG = tiny("dn_detr", denoising_groups=2)


def test_the_full_size_has_as_many_parameters_as_the_published_model():
    with torch.device("meta"):
        model = DNDETR(DNDETRConfig())
    assert sum(p.numel() for p in model.parameters()) == 47_429_154
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 47_206_754


# Noised objects


def by_loops(targets, groups, rows, draws, config):
    """Content, boxes and owners of every place, in plain Python, as DN-DETR describes it.

    rows: the table of classes. draws: as `denoising.draw` returns them.
    """
    most = max(len(target.labels) for target in targets)
    changed, others, moves = draws
    content, boxes, owners = [], [], []
    for i, target in enumerate(targets):
        content.append([])
        boxes.append([])
        owners.append([])
        for g in range(groups):
            for n in range(most):
                if n >= len(target.labels):
                    content[i].append([0.0] * (len(rows[0]) + 1))
                    boxes[i].append([0.5] * 4)
                    owners[i].append(None)
                    continue
                label = target.labels[n].item()
                if changed[i, g, 0, n] < config.label_noise:
                    label = others[i, g, 0, n].item()
                content[i].append([*rows[label].tolist(), 1.0])
                x, y, w, h = target.boxes[n].tolist()
                a, b, c, d = moves[i, g, 0, n].tolist()
                s = config.box_noise
                moved = x + a * w / 2 * s, y + b * h / 2 * s, w + c * w * s, h + d * h * s
                boxes[i].append([min(max(number, 0.0), 1.0) for number in moved])
                owners[i].append(n)
    return torch.tensor(content), torch.tensor(boxes), owners


def test_noised_objects_are_those_of_plain_loops(monkeypatch):
    model, batch = build(dataclasses.replace(CONFIG, box_noise=3.0)), make_batch(3, 1, 2)
    seen = []
    original = denoising.draw

    def draw(*args):
        seen.append(original(*args))
        return seen[-1]

    monkeypatch.setattr(denoising, "draw", draw)
    queries, _ = model.queries(model.tokens(batch), batch.targets)
    assert queries.content.shape == (3, 2 * 3 + 6, 32) and queries.denoising.size == 6
    expected = by_loops(batch.targets, 2, model.label_embed.weight, seen[0], model.config)
    content, boxes, owners = expected
    torch.testing.assert_close(queries.content[:, :6], content)
    torch.testing.assert_close(queries.references[:, :6], boxes)
    assert (boxes == 1).any() or (boxes == 0).any()  # some were cut off
    known = queries.denoising
    assert known.groups == 2
    for i, (places, objects) in enumerate(known.matches):
        found = dict(zip(places.tolist(), objects.tolist(), strict=True))
        assert found == {k: n for k, n in enumerate(owners[i]) if n is not None}
        assert known.counted[i].tolist() == [n is not None for n in owners[i]]
        assert queries.padding_mask[i].tolist() == [n is None for n in owners[i]] + [False] * 6
    # those that are matched come after, with 0 in the last channel
    matching = queries.content[:, 6:]
    assert torch.equal(matching[0, :, :-1], model.content_embed.weight)
    assert not matching[..., -1].any()
    torch.testing.assert_close(queries.references[1, 6:], model.anchors.weight.sigmoid())


def test_noise_stays_within_its_bounds():
    """A noised centre stays within its object up to a scale of 1; sides grow to 1 + scale."""
    torch.manual_seed(0)
    boxes = torch.rand(1000, 4) * 0.2 + 0.4
    for scale in (0.0, 0.4, 1.0):
        noised = denoising.shift(boxes, 2 * torch.rand(1000, 4) - 1, scale)
        centre = (noised[:, :2] - boxes[:, :2]).abs() / boxes[:, 2:] * 2
        sides = (noised[:, 2:] / boxes[:, 2:] - 1).abs()
        for moved in (centre, sides):
            assert moved.max() <= scale + 1e-5 and moved.max() >= 0.95 * scale


def test_a_fifth_of_the_labels_is_drawn_anew(monkeypatch):
    """With each class as likely, so that some stay what they were."""
    model, batch = build(dataclasses.replace(CONFIG, denoising_groups=500)), make_batch(4)
    given = []
    monkeypatch.setattr(
        model, "describe", lambda labels: given.append(labels) or torch.zeros(*labels.shape, 32)
    )
    model.queries(model.tokens(batch), batch.targets)
    changed = (given[0] != batch.targets[0].labels).float().mean().item()
    # 2,000 labels: six standard errors
    assert changed == pytest.approx(0.2 * 2 / 3, abs=6 * (0.13 * 0.87 / 2000) ** 0.5)


# The mask


def test_who_may_look_at_whom():
    """Two groups of two, then three: the four rules, block by block."""
    mask = denoising.denoising_mask(2, 4, 3, torch.device("cpu"))
    expected = torch.tensor(
        [
            [0, 0, 1, 1, 0, 0, 0],
            [0, 0, 1, 1, 0, 0, 0],
            [1, 1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0, 0],
            [1, 1, 1, 1, 0, 0, 0],
            [1, 1, 1, 1, 0, 0, 0],
            [1, 1, 1, 1, 0, 0, 0],
        ]
    ).bool()
    assert torch.equal(mask, expected)


def test_nothing_leaks_from_denoising_to_matching(monkeypatch):
    """The matching queries answer as without the others; without the mask they do not."""
    model, batch = build(CONFIG).train(), make_batch(3, 1)
    model.backbone.eval()
    plain = output_of(model, dataclasses.replace(batch, targets=None))
    for seed in range(3):
        output = output_of(model, batch, seed=seed)
        torch.testing.assert_close(output.logits, plain.logits)
        torch.testing.assert_close(output.boxes, plain.boxes)
    monkeypatch.setattr(
        denoising, "denoising_mask", lambda g, s, t, _: torch.zeros(s + t, s + t).bool()
    )
    leaking = output_of(model, batch)
    assert (leaking.logits - plain.logits).abs().max() > 1e-2


def test_one_group_does_not_know_the_other(monkeypatch):
    """Its answers stay when the other's noise changes."""
    model, batch = build(CONFIG).train(), make_batch(2, 2)
    model.backbone.eval()
    original, answers = denoising.draw, []
    for other in (0.1, 0.9):

        def draw(labels, classes, other=other):
            changed, others, moves = original(labels, classes)
            moves[:, 1] = other
            return changed, others, moves

        monkeypatch.setattr(denoising, "draw", draw)
        answers.append(output_of(model, batch).others["denoising"].boxes)
    torch.testing.assert_close(answers[0][:, :2], answers[1][:, :2])
    assert not torch.allclose(answers[0][:, 2:], answers[1][:, 2:])


def denoised(model, batch, monkeypatch):
    """What becomes of the first image's noised objects, with the same noise in any batch."""

    def draw(labels, classes):
        moves = torch.linspace(-1, 1, 12)[: labels.shape[-1] * 4].view(-1, 4)
        moves = moves.expand(*labels.shape, 4)
        return torch.ones(labels.shape), labels, moves

    monkeypatch.setattr(denoising, "draw", draw)
    output = output_of(model, batch)
    places, _ = output.others["denoising"].matches[0]
    return output.others["denoising"].boxes[0, places]


def test_an_image_does_not_depend_on_how_many_objects_others_have(monkeypatch):
    """Its empty places are looked at by nobody; in the official code they are."""
    few = make_batch(1, 1)
    many = dataclasses.replace(few, targets=[few.targets[0], make_batch(1, 3).targets[1]])
    for empty_places in (False, True):
        model = build(dataclasses.replace(CONFIG, empty_places=empty_places)).train()
        model.backbone.eval()
        answers = [denoised(model, batch, monkeypatch) for batch in (few, many)]
        assert torch.allclose(*answers, atol=1e-5) != empty_places


# Losses


def test_losses_by_hand():
    """Classes, L1 and GIoU of the true object at every place that has one, in plain loops."""
    model, batch = build(CONFIG).train(), make_batch(3, 1)
    model.backbone.eval()
    output = output_of(model, batch)
    losses = SetCriterion()(output, batch.targets)
    for suffix in ("denoising", "denoising_0", "denoising_1"):
        found = output.others[suffix]
        p, boxes = found.logits.sigmoid(), found.boxes
        class_loss = l1 = overlap = 0.0
        for i, target in enumerate(batch.targets):
            for g in range(2):
                for n in range(len(target.labels)):
                    k = g * 3 + n
                    for c in range(3):
                        class_loss += focal(p[i, k, c].item(), c == target.labels[n].item())
                    pair = boxes[i, k].tolist(), target.boxes[n].tolist()
                    l1 += sum(abs(a - b) for a, b in zip(*pair, strict=True))
                    corners = ([x - w / 2, y - h / 2, x + w / 2, y + h / 2] for x, y, w, h in pair)
                    overlap += 1 - giou(*corners)
        total = 2 * (3 + 1)  # of both groups
        expected = {"class": class_loss, "box": 5 * l1, "giou": 2 * overlap}
        for name, value in expected.items():
            found = losses[f"loss_{name}_{suffix}"].item()
            assert found == pytest.approx(value / total, rel=1e-4)
    assert {name for name in losses if name.startswith("loss_class")} == {
        f"loss_class{x}" for x in ("", "_0", "_1", "_denoising", "_denoising_0", "_denoising_1")
    }


def test_the_class_loss_has_half_the_weight_of_its_cost():
    scoring = build(CONFIG).scoring
    assert scoring.loss_weight == 1 and scoring.cost_weight == 2


@pytest.mark.parametrize("groups", [0, 2])
@pytest.mark.parametrize("counts", [(0, 0), (2, 0)])
def test_every_parameter_has_a_gradient_also_without_objects(groups, counts):
    model = build(dataclasses.replace(CONFIG, denoising_groups=groups)).train()
    batch = make_batch(*counts)
    output = model(batch)
    assert ("denoising" in output.others) == bool(groups and any(counts))
    losses = SetCriterion()(output, batch.targets)
    assert not without_gradient(model, losses)
    assert all(p.grad.isfinite().all() for p in model.parameters())


# Positions of boxes


def test_positions_are_the_code_of_y_x_and_sides():
    """DAB-DETR's, with 10,000 and 2 pi, of each number by itself; scaled from the second layer."""
    model = build(CONFIG).eval()
    tokens = model.tokens(make_batch(1, 1))
    queries, _ = model.queries(tokens, None)
    C, boxes = 32, queries.references
    code = []
    for number in (1, 0, 2, 3):
        for k in range(C // 4):
            phase = boxes[..., number] * 2 * math.pi / 10_000 ** (2 * k / (C // 2))
            code += [phase.sin(), phase.cos()]
    expected = model.decoder.place(torch.stack(code, -1))
    torch.testing.assert_close(model.decoder.position(queries, tokens, 0), expected)
    scale = model.decoder.scale(queries.content)
    torch.testing.assert_close(model.decoder.position(queries, tokens, 1), expected * scale)


def test_outputs_do_not_depend_on_padding_but_by_the_official_reading():
    batch = make_batch(1, 1)
    for padded_codes in (False, True):
        model = build(dataclasses.replace(CONFIG, padded_codes=padded_codes)).eval()
        tokens: Tokens = model.tokens(batch)
        answers = [output_of(model, batch, x).boxes for x in (tokens, padded_more(tokens))]
        assert torch.allclose(*answers, atol=1e-4) != padded_codes


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_noise": 1.2}, r"label_noise must be in \[0, 1\], got 1.2"),
        ({"box_noise": -0.1}, "box_noise must be at least 0, got -0.1"),
        ({"box_noise": math.nan}, "box_noise must be at least 0, got nan"),
        ({"denoising_groups": -1}, "must be at least 0: {'denoising_groups': -1}"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **options)


def test_a_label_beyond_the_table_is_named():
    model, batch = build(CONFIG).train(), make_batch(2, 1)
    batch.targets[1].labels[0] = 3
    with pytest.raises(ValueError, match=r"^image 1: labels must be in \[0, 3\), got \[3\]$"):
        model(batch)
