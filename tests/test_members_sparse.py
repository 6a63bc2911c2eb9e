"""Sparse DETR: which tokens are updated, what the decoder has read, and what the scorer learns."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from deformable_detr.layers.attention import Sampling
from deformable_detr.layers.reading import tokens_read
from deformable_detr.losses import HungarianMatcher, SetCriterion
from deformable_detr.models import DINOConfig
from deformable_detr.models.dino import DINO
from deformable_detr.models.selection import TokenStage
from deformable_detr.models.sparse_detr import SparseDETR, SparseDETRConfig
from deformable_detr.models.sparse_encoder import SparselyEncoded, SparseOptions
from deformable_detr.models.two_stage import TwoStage
from deformable_detr.structures import Predictions
from tests.members import build, make_batch, output_of, padded_more, tiny

CONFIG = tiny("sparse_detr", rho=0.3)
FEW = tiny(
    "sparse_detr", rho=0.05
)  # fewer than are read at all, so that none is as good as another


def trained(config, kind=None):
    model = build(config, kind).train()
    model.backbone.eval()
    return model


@pytest.mark.parametrize(("losses", "parameters"), [(False, 41_157_210), (True, 41_937_205)])
def test_the_full_size_has_as_many_parameters_as_the_published_models(losses, parameters):
    with torch.device("meta"):
        model = SparseDETR(SparseDETRConfig(rho=0.1, encoder_losses=losses))
    assert sum(p.numel() for p in model.parameters()) == parameters


# The encoder


class Dense(TwoStage):
    """The same detector, whose encoder updates every token."""

    make_first_stage = SparseDETR.make_first_stage


def test_a_share_of_one_is_the_dense_encoder():
    sparse = build(dataclasses.replace(CONFIG, rho=1.0)).eval()
    dense, batch = build(CONFIG, Dense).eval(), make_batch(1, 1)
    missing, _ = dense.load_state_dict(sparse.state_dict(), strict=False)
    assert not missing
    # the order of queries in a layer differs, and with it that of some sums
    torch.testing.assert_close(sparse(batch).boxes, dense(batch).boxes, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sparse(batch).logits, dense(batch).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rho", [0.05, 0.3, 0.9])
def test_only_the_best_of_each_image_are_updated(rho):
    """One more than the share of those that are no padding, by score."""
    model = build(dataclasses.replace(CONFIG, rho=rho)).eval()
    tokens = model.tokens(make_batch(1, 1))
    memory, _ = model.encode(tokens)
    changed = (memory.features != tokens.features).any(-1)
    for image in range(2):
        inside = ~tokens.padding_mask[image]
        keep = min(int(inside.sum().item() * rho) + 1, int(inside.sum()))
        assert changed[image].sum() == keep and not changed[image][~inside].any()
        scores = memory.scores[image].masked_fill(~inside, -math.inf)
        assert changed[image][scores.topk(keep).indices].all()


def test_scores_are_those_of_plain_arithmetic():
    """Of the backbone's tokens with their positions, through the first stage's projection."""
    model = build(CONFIG).eval()
    tokens = model.tokens(make_batch(1, 1))
    memory, _ = model.encode(tokens)
    stage, scorer = model.first_stage, model.scorer
    for image in range(2):
        inside = ~tokens.padding_mask[image]
        x = (tokens.features + tokens.position)[image][inside]  # none of these maps has a rim
        x = scorer.features(stage.output_norm(stage.output(x)))
        x = torch.cat([x[:, :16], x[:, 16:].mean(0).expand(len(x), -1)], 1)
        torch.testing.assert_close(memory.scores[image][inside], scorer.score(x)[:, 0])


def test_padding_has_its_part_in_the_official_scores_only():
    batch = make_batch(1, 1)
    for padding in (False, True):
        model = build(dataclasses.replace(CONFIG, scored_padding=padding)).eval()
        tokens = model.tokens(batch)
        scores = []
        for each in (tokens, padded_more(tokens)):
            memory, _ = model.encode(each)
            scores.append(memory.scores[0][~each.padding_mask[0]])
        assert torch.allclose(*scores, atol=1e-5) != padding


# What the decoder has read


def read_by_loops(sampling, half_cell):
    """Each weight shared out among four tokens, in plain Python; half_cell: as Sparse DETR's code
    does it, from location times size without the half."""
    shapes = sampling.spatial_shapes
    starts = [sum(h * w for h, w in shapes[:level]) for level in range(len(shapes))]
    B, Q, M, L, K, _ = sampling.locations.shape
    total = torch.zeros(B, sum(h * w for h, w in shapes), dtype=torch.float64)
    for b, q, m, level, k in torch.cartesian_prod(*map(torch.arange, (B, Q, M, L, K))).tolist():
        (height, width), start = shapes[level], starts[level]
        x, y = sampling.locations[b, q, m, level, k].tolist()
        x, y = x * width, y * height
        if not half_cell:
            x, y = x - 0.5, y - 0.5
        for column in (math.floor(x), math.floor(x) + 1):
            for row in (math.floor(y), math.floor(y) + 1):
                if 0 <= column < width and 0 <= row < height:
                    share = (1 - abs(x - column)) * (1 - abs(y - row))
                    weight = sampling.weights[b, q, m, level, k].item()
                    total[b, start + row * width + column] += weight * share
    return total


@pytest.mark.parametrize("half_cell", [False, True])
def test_what_was_read_is_that_of_plain_loops(half_cell):
    torch.manual_seed(0)
    shapes, parts = [(5, 3), (2, 4)], []
    for Q in (3, 2):  # two layers
        locations = torch.rand(2, Q, 2, 2, 3, 2).double() * 1.4 - 0.2
        weights = torch.rand(2, Q, 2, 6).double().softmax(-1).view(2, Q, 2, 2, 3)
        parts.append(Sampling(locations, weights, shapes))
    expected = sum(read_by_loops(part, half_cell) for part in parts)
    torch.testing.assert_close(tokens_read(parts, half_cell), expected)


def test_what_is_read_of_the_middle_of_a_token_is_all_its_own():
    """The official drawing gives a quarter of it to each of four: half a cell is the difference."""
    location = torch.tensor([1.5 / 4, 2.5 / 5]).view(1, 1, 1, 1, 1, 2)  # column 1, row 2
    sampling = Sampling(location, torch.ones(1, 1, 1, 1, 1), [(5, 4)])
    right = tokens_read([sampling]).view(5, 4)
    assert right[2, 1] == 1 and right.sum() == 1
    official = tokens_read([sampling], half_cell=True).view(5, 4)
    assert official[2:4, 1:3].tolist() == [[0.25, 0.25], [0.25, 0.25]]


# Losses


def test_the_scorers_loss_by_hand(monkeypatch):
    """As many tokens as are updated, those read most, are called so; the mean over an image's own
    tokens, and over images."""
    model, batch = trained(FEW), make_batch(2, 1)
    seen, original = [], model.losses
    monkeypatch.setattr(model, "losses", lambda memory: seen.append(memory) or original(memory))
    losses = SetCriterion()(output_of(model, batch), batch.targets)
    (memory,) = seen
    assert len(memory.read) == 3 and memory.read[0].locations.shape[:3] == (2, 6, 2)
    expected = 0.0
    for image in range(2):
        read = sum(read_by_loops(each, False) for each in memory.read)[image].tolist()
        inside = [t for t in range(len(read)) if not memory.padding_mask[image, t]]
        keep = int(len(inside) * FEW.rho) + 1
        wanted = sorted(inside, key=lambda t: -read[t])[:keep]
        p = memory.scores[image].double().sigmoid().tolist()
        terms = [-math.log(p[t] if t in wanted else 1 - p[t]) for t in inside]
        expected += sum(terms) / len(terms) / 2
    assert losses["loss_scorer"].item() == pytest.approx(expected, rel=1e-4)


def test_the_official_loss_is_torchs_over_all_tokens():
    model, batch = trained(dataclasses.replace(FEW, scored_padding=True)), make_batch(2, 1)
    memory, _ = model.encode(model.tokens(batch))
    queries, _ = model.queries(memory, batch.targets)
    model.decoder(queries, memory, list(model.box_heads))
    scores = memory.scores.masked_fill(memory.padding_mask, memory.scores.min())
    read, target = tokens_read(memory.read), torch.zeros_like(scores)
    for image, keep in enumerate(memory.keep.tolist()):
        target[image, read[image].topk(keep).indices] = 1
    expected = F.multilabel_soft_margin_loss(scores, target)
    torch.testing.assert_close(model.losses(memory)["scorer"], expected)


def test_the_scorer_learns_from_its_own_loss_only():
    """The choice of tokens passes no gradient."""
    model, batch = trained(CONFIG), make_batch(2, 1)
    losses = SetCriterion()(output_of(model, batch), batch.targets)
    own = losses.pop("loss_scorer")
    sum(losses.values()).backward(retain_graph=True)
    assert all(p.grad is None for p in model.scorer.parameters())
    own.backward()
    assert all(p.grad.any() for p in model.scorer.parameters())
    # and nothing of it reaches the decoder, whose map it is
    model.zero_grad()
    SetCriterion()(output_of(model, batch), batch.targets)["loss_scorer"].backward()
    assert all(p.grad is None for p in model.decoder.parameters())


def test_the_encoders_layers_predict_by_their_own_heads():
    model, batch = trained(CONFIG), make_batch(2, 1)
    output = output_of(model, batch)
    found = output.others["encoder_0"]
    tokens = model.tokens(batch)
    assert {n for n in output.others if n.startswith("encoder")} == {"encoder_0"}  # of two layers
    keep = model.number_kept(tokens)
    assert keep[0] != keep[1] and found.counted.sum(1).tolist() == keep.tolist()
    # the first layer's content of the best token of all
    memory, _ = model.encode(tokens)
    best = memory.scores[0].argmax()
    located = dataclasses.replace(tokens, features=tokens.features + tokens.position)
    _, anchors = model.first_stage.prepare(located)
    first = model.encoder(
        tokens,
        [memory.scores.masked_fill(tokens.padding_mask, -math.inf).topk(int(keep.max())).indices]
        * 2,
        every_layer=True,
    )[0]
    content = first.features[0, best]
    torch.testing.assert_close(found.logits[0, 0], model.encoder_class_heads[0](content))
    box = (model.encoder_box_heads[0](content) + anchors[0, best]).sigmoid()
    torch.testing.assert_close(found.boxes[0, 0], box)
    assert not any(name.startswith("encoder") for name in model.eval()(batch).others)


def test_what_is_not_counted_is_not_matched():
    """Not even where it would be the best by far."""
    torch.manual_seed(0)
    target = make_batch(2).targets[0]
    boxes = torch.rand(1, 5, 4) * 0.3 + 0.1
    boxes[0, :2] = target.boxes
    counted = torch.tensor([[False, False, True, True, True]])
    logits = torch.randn(1, 5, 3)
    ((queries, objects),) = HungarianMatcher()(
        Predictions(logits, boxes, counted=counted), [target]
    )
    assert set(queries.tolist()) <= {2, 3, 4} and sorted(objects.tolist()) == [0, 1]
    # as if the others did not exist
    ((alone, same),) = HungarianMatcher()(Predictions(logits[:, 2:], boxes[:, 2:]), [target])
    assert torch.equal(alone + 2, queries) and torch.equal(same, objects)


# With another member, and bad input


@dataclasses.dataclass(frozen=True)
class BothConfig(SparseOptions, DINOConfig):
    """DINO with a sparse encoder."""


class Both(SparselyEncoded, DINO):
    """DINO with a sparse encoder: neither knows of the other."""

    config: BothConfig


def test_dino_with_a_sparse_encoder_takes_a_step():
    options = dataclasses.asdict(tiny("dino", denoising_pairs=4))
    model, batch = trained(BothConfig(**options, rho=0.3), Both), make_batch(3, 1)
    losses = SetCriterion()(output_of(model, batch), batch.targets)
    assert {"loss_scorer", "loss_class_denoising", "loss_box_encoder_0"} <= losses.keys()
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not isinstance(model.first_stage, TokenStage)
    assert model.eval()(batch).logits.shape[1] == 6


@pytest.mark.parametrize("rho", [0.0, -0.1, 1.01, math.nan])
def test_a_share_that_is_none_is_refused(rho):
    with pytest.raises(ValueError, match=rf"^rho must be in \(0, 1\], got {rho}$"):
        dataclasses.replace(CONFIG, rho=rho)
