"""DINO: pairs from given random numbers, what is judged, which head learns from which layer, and
what is selected."""

import dataclasses
import math

import pytest
import torch

from deformable_detr.losses import SetCriterion
from deformable_detr.models import denoising
from deformable_detr.models.decoder import RefiningDecoder
from deformable_detr.models.dino import DINO, DINOConfig
from deformable_detr.models.heads import move
from deformable_detr.training.recipe import load_recipe
from tests.members import build, make_batch, output_of, padded_more, tiny
from tests.test_losses import focal, giou

CONFIG = tiny("dino", denoising_pairs=6)


def trained(config, kind=None):
    model = build(config, kind).train()
    model.backbone.eval()
    return model


def test_the_full_size_has_as_many_parameters_as_the_published_model():
    with torch.device("meta"):
        model = DINO(DINOConfig())
    assert sum(p.numel() for p in model.parameters()) == 46_893_182
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 46_670_782


# Pairs


def by_loops(targets, groups, rows, draws, config):
    """Content, boxes and owners of every place, in plain Python, as DINO describes it: all near
    copies of a group, then all far ones. draws: as `denoising.draw` returns them."""
    most = max(len(target.labels) for target in targets)
    changed, others, moves = draws
    content, boxes, owners = [], [], []
    for i, target in enumerate(targets):
        content.append([])
        boxes.append([])
        owners.append([])
        for g in range(groups):
            for far in (0, 1):
                for n in range(most):
                    if n >= len(target.labels):
                        content[i].append([0.0] * len(rows[0]))
                        boxes[i].append([0.5] * 4)
                        owners[i].append("empty")
                        continue
                    label = target.labels[n].item()
                    if changed[i, g, far, n] < config.label_noise:
                        label = others[i, g, far, n].item()
                    content[i].append(rows[label].tolist())
                    x, y, w, h = target.boxes[n].tolist()
                    edges = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
                    for e in range(4):
                        r = moves[i, g, far, n, e].item()
                        sign, size = (-1 if r < 0 else 1), abs(r) + far
                        edges[e] += sign * size * (w, h)[e % 2] / 2 * config.box_noise
                        edges[e] = min(max(edges[e], 0.0), 1.0)
                    a, b, c, d = edges
                    if not config.crossed_edges:
                        a, b, c, d = min(a, c), min(b, d), max(a, c), max(b, d)
                    boxes[i].append([(a + c) / 2, (b + d) / 2, c - a, d - b])
                    owners[i].append("far" if far else n)
    return torch.tensor(content), torch.tensor(boxes), owners


@pytest.mark.parametrize("crossed", [False, True])
def test_pairs_are_those_of_plain_loops(monkeypatch, crossed):
    model, batch = trained(dataclasses.replace(CONFIG, crossed_edges=crossed)), make_batch(3, 1, 2)
    seen, original = [], denoising.draw
    monkeypatch.setattr(denoising, "draw", lambda *args: seen.append(original(*args)) or seen[-1])
    queries, _ = model.queries(model.encoder(model.tokens(batch)), batch.targets)
    size = queries.denoising.size
    assert size == 2 * 2 * 3 and queries.content.shape == (3, size + 6, 32)  # 6 // 3 groups
    draws = seen[0]
    content, boxes, owners = by_loops(
        batch.targets, 2, model.label_embed.weight, draws, model.config
    )
    torch.testing.assert_close(queries.content[:, :size], content)
    torch.testing.assert_close(queries.references[:, :size], boxes)
    assert (boxes[..., 2:] < 0).any() == crossed
    for i, (places, objects) in enumerate(queries.denoising.matches):
        found = dict(zip(places.tolist(), objects.tolist(), strict=True))
        assert found == {k: n for k, n in enumerate(owners[i]) if isinstance(n, int)}
        assert queries.denoising.counted[i].tolist() == [n != "empty" for n in owners[i]]


def test_near_copies_are_near_and_far_ones_far():
    """Every edge moves by less than a half side, or by once to twice as much."""
    torch.manual_seed(0)
    boxes = torch.rand(200, 4) * 0.1 + torch.tensor([0.45, 0.45, 0.1, 0.1])  # nothing is cut off
    copies, draws = boxes.expand(1, 1, 2, 200, 4), 2 * torch.rand(1, 1, 2, 200, 4) - 1
    for crossed in (False, True):
        model = trained(dataclasses.replace(CONFIG, crossed_edges=crossed))
        noised = model.noise(copies, draws)[0, 0]
        before, near, far = (edges_of(each) for each in (boxes, *noised))
        half = boxes[:, 2:].repeat(1, 2) / 2
        near, far = (near - before).abs() / half, (far - before).abs() / half
        assert near.max() < 1 and near.max() > 0.95 and near.min() < 0.05
        if crossed:
            assert far.min() > 1 - 1e-4 and far.max() < 2 + 1e-4 and far.max() > 1.95
        assert (noised[1, :, 2:] < 0).any() == crossed


def edges_of(boxes):
    return torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], -1)


@pytest.mark.parametrize(("pairs", "objects", "groups"), [(6, 2, 3), (6, 4, 1), (6, 9, 1)])
def test_as_many_groups_as_there_are_pairs_for(pairs, objects, groups):
    """Also where one image has more objects than pairs: then there is one group."""
    model, batch = trained(dataclasses.replace(CONFIG, denoising_pairs=pairs)), make_batch(objects)
    output = model(batch)
    assert output.others["denoising"].groups == groups
    assert output.others["denoising"].logits.shape[1] == groups * 2 * objects
    assert all(term.isfinite() for term in SetCriterion()(output, batch.targets).values())


def test_without_pairs_there_is_no_denoising():
    model, batch = trained(dataclasses.replace(CONFIG, denoising_pairs=0)), make_batch(2)
    assert not any("denoising" in name for name in model(batch).others)


def test_nothing_leaks_from_denoising_to_matching():
    model, batch = trained(CONFIG), make_batch(3, 1)
    plain = output_of(model, dataclasses.replace(batch, targets=None))
    for seed in range(3):
        output = output_of(model, batch, seed=seed)
        torch.testing.assert_close(output.logits, plain.logits)
        torch.testing.assert_close(output.boxes, plain.boxes)


@pytest.mark.parametrize("empty_places", [False, True])
def test_losses_by_hand(empty_places):
    """Near copies have their class, far ones none; empty places are left out, or have none too."""
    model, batch = trained(dataclasses.replace(CONFIG, empty_places=empty_places)), make_batch(3, 1)
    output = output_of(model, batch)
    losses = SetCriterion()(output, batch.targets)
    found = output.others["denoising"]
    p, boxes = found.logits.sigmoid(), found.boxes
    class_loss = l1 = overlap = 0.0
    for i, target in enumerate(batch.targets):
        for g in range(2):
            for far in (0, 1):
                for n in range(3):
                    k = (g * 2 + far) * 3 + n
                    exists = n < len(target.labels)
                    if not exists and not empty_places:
                        continue
                    label = target.labels[n].item() if exists and not far else None
                    class_loss += sum(focal(p[i, k, c].item(), c == label) for c in range(3))
                    if label is None:
                        continue
                    pair = boxes[i, k].tolist(), target.boxes[n].tolist()
                    l1 += sum(abs(a - b) for a, b in zip(*pair, strict=True))
                    corners = ([x - w / 2, y - h / 2, x + w / 2, y + h / 2] for x, y, w, h in pair)
                    overlap += 1 - giou(*corners)
    total = 2 * (3 + 1)  # of both groups
    expected = {"class": class_loss, "box": 5 * l1, "giou": 2 * overlap}
    for name, value in expected.items():
        found = losses[f"loss_{name}_denoising"].item()
        assert found == pytest.approx(value / total, rel=1e-4)


# Look forward twice


class SeparateHeads(DINO):
    """A box head for each layer, so that one sees which of them learns."""

    def number_of_heads(self):
        return self.config.decoder_layers


class LookingOnce(SeparateHeads):
    """With the decoder of plain refinement."""

    def make_decoder(self, layers):
        decoder = super().make_decoder(layers)
        decoder.next_references = lambda *args: RefiningDecoder.next_references(decoder, *args)
        return decoder


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(SeparateHeads, [False, True, True]), (LookingOnce, [False, False, True])],
)
def test_which_heads_learn_from_the_last_layers_boxes(kind, expected):
    model, batch = trained(CONFIG, kind), make_batch(2)
    output_of(model, batch).boxes.sum().backward()
    reached = [h.layers[-1].weight.grad is not None and bool(h.layers[-1].weight.grad.any())
               for h in model.box_heads]  # fmt: skip
    assert reached == expected


def test_a_layer_looks_around_what_the_last_one_said():
    """By default the very boxes that the loss is of; in the official reading, those of its content
    before the norm."""
    batch = make_batch(2, 1)
    for raw in (False, True):
        model = build(dataclasses.replace(CONFIG, raw_references=raw)).eval()
        before = []
        for layer in model.decoder.layers:
            layer.register_forward_hook(lambda _, __, content, seen=before: seen.append(content))
        output = model(batch)
        layers = [*output.auxiliary, output]
        for i in range(2):
            same = torch.allclose(layers[i + 1].references, layers[i].boxes, atol=1e-6)
            assert same != raw
            if raw:
                delta = model.box_heads[0](before[i])
                expected = move(layers[i].references, delta, 1e-3)
                torch.testing.assert_close(layers[i + 1].references, expected)
        # the loss' boxes start from where the last layer's step led, with its gradient
        delta = model.box_heads[0](model.decoder.norm(before[2]))
        start = layers[2].references
        torch.testing.assert_close(output.boxes, move(start, delta, 1e-3))


# Selection


def test_contents_are_learned_and_places_are_the_images():
    model = build(CONFIG).eval()
    memory = model.encoder(model.tokens(make_batch(1, 1)))
    queries, sets = model.queries(memory, None)
    assert torch.equal(queries.content[0], model.first_stage.content.weight)
    assert torch.equal(queries.content[0], queries.content[1])
    assert not torch.equal(queries.references[0], queries.references[1])
    assert queries.position is None and not queries.references.requires_grad
    assert sets["first"].boxes.requires_grad


def test_in_pure_selection_contents_are_the_projected_tokens():
    model = build(dataclasses.replace(CONFIG, pure_selection=True)).eval()
    assert model.first_stage.content is None
    memory = model.encoder(model.tokens(make_batch(1, 1)))
    queries, _ = model.queries(memory, None)
    assert not queries.content.requires_grad
    projected, _ = model.first_stage.prepare(memory)
    for image in range(2):
        for content, box in zip(queries.content[image], queries.references[image], strict=True):
            token = (projected[image] - content).abs().sum(-1).argmin()
            torch.testing.assert_close(projected[image, token], content)
            proposals = model.first_stage.propose(memory)
            torch.testing.assert_close(proposals.boxes[image, token], box)


def test_the_first_stage_learns_classes_and_from_the_chosen_only():
    model, batch = trained(CONFIG), make_batch(2, 1)
    output = output_of(model, batch)
    first = output.others["first"]
    assert first.logits.shape == (2, 6, 3) and not first.class_agnostic
    torch.testing.assert_close(first.boxes, output.auxiliary[0].references)
    memory = model.encoder(model.tokens(batch))
    scores = model.first_stage.propose(memory).logits.max(-1).values
    usable = (model.first_stage.propose(memory).boxes < 1).all(-1)
    best = scores.masked_fill(~usable, -math.inf).topk(6).values
    torch.testing.assert_close(first.logits.max(-1).values, best)


def test_unusable_tokens_are_never_chosen_before_usable_ones():
    model = build(CONFIG).eval()
    with torch.no_grad():  # blank tokens have the highest score of all
        model.first_stage.output_norm.bias.copy_(model.first_stage.class_head.weight[0] * 100)
    memory = model.encoder(model.tokens(make_batch(1, 1)))
    queries, _ = model.queries(memory, None)
    assert (queries.references < 1).all()


def test_an_image_with_fewer_tokens_than_queries():
    model = build(dataclasses.replace(CONFIG, num_queries=500)).eval()
    output = model(make_batch(1))
    assert output.logits.shape[1] == model.tokens(make_batch(1)).features.shape[1] < 500


# Places


def test_places_are_coded_at_temperature_20_from_the_first_pixel_on():
    model = build(CONFIG)
    code = model.neck.position(torch.zeros(1, 4, 6, dtype=torch.bool))[0]  # y before x
    for k in range(8):
        expected = [math.sin(2 * math.pi * (i + 1) / 4 / 20 ** (2 * k / 16)) for i in range(4)]
        assert code[2 * k, :, 0].tolist() == pytest.approx(expected, abs=1e-5)


def test_outputs_depend_on_padding_in_the_official_reading_only():
    batch = make_batch(1, 1)
    for padded_codes in (False, True):
        model = build(dataclasses.replace(CONFIG, padded_codes=padded_codes)).eval()
        tokens = model.tokens(batch)
        answers = [output_of(model, batch, x).boxes for x in (tokens, padded_more(tokens))]
        assert torch.allclose(*answers, atol=1e-4) != padded_codes


def test_detections_are_the_best_300():
    recipe = load_recipe("digits-dino")
    assert recipe.train.top_k == 300 and recipe.model["name"] == "dino"


def test_options_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"must be at least 0: \{'denoising_pairs': -2\}"):
        dataclasses.replace(CONFIG, denoising_pairs=-2)
