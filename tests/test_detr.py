"""DETR: its parts against independent arithmetic, and the same tools as every other detector."""

import dataclasses
import itertools
import math

import pytest
import torch

from deformable_detr import Batch, Output, Target, postprocess
from deformable_detr.losses import FocalScoring, HungarianMatcher, SetCriterion, SoftmaxScoring
from deformable_detr.models import DETR, DETRConfig
from tests.test_losses import giou

SMALL = DETRConfig(
    num_classes=4,
    num_queries=5,
    backbone="small",
    embed_dim=32,
    num_heads=2,
    encoder_layers=2,
    decoder_layers=2,
    ffn_dim=48,
    dropout=0.0,
)


def make_batch():
    torch.manual_seed(0)
    images = [torch.randn(3, 64, 80), torch.randn(3, 48, 96)]
    return Batch.from_images(images)


@pytest.mark.parametrize("dilation", [False, True])
def test_parameter_counts_are_the_official_ones(dilation):
    with torch.device("meta"):
        model = DETR(DETRConfig(dilation=dilation))
    assert sum(p.numel() for p in model.parameters()) == 41_524_768
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 41_302_368
    assert len(model.state_dict()) == 458


def test_every_layer_predicts_through_one_norm_and_one_head():
    model = DETR(SMALL).eval()
    output = model(make_batch())
    assert output.logits.shape == (2, 5, 5) and output.boxes.shape == (2, 5, 4)
    assert len(output.auxiliary) == 1 and output.references is None and not output.others
    tokens = model.tokens(make_batch())
    assert tokens.spatial_shapes == [(4, 6)]
    queries, _ = model.queries(model.encoder(tokens), None)
    assert not queries.content.any()
    first = model.decoder.layers[0](queries, model.encoder(tokens))
    expected = model.class_heads[0](model.decoder.norm(first))
    torch.testing.assert_close(output.auxiliary[0].logits, expected)


def test_padding_is_not_attended_to():
    model, batch = DETR(SMALL).eval(), make_batch()
    tokens = model.tokens(batch)
    noise = tokens.features.masked_fill(tokens.padding_mask[..., None], 50.0)
    spoilt = dataclasses.replace(tokens, features=noise)
    memory, again = model.encoder(tokens), model.encoder(spoilt)
    inside = ~tokens.padding_mask
    assert not inside.all()
    torch.testing.assert_close(again.features[inside], memory.features[inside])
    queries, _ = model.queries(memory, None)
    layers = [model.decoder(queries, x, [model.box_heads[0]] * 2) for x in (memory, again)]
    torch.testing.assert_close(layers[0][-1][1], layers[1][-1][1])


def test_positions_count_pixels_from_one():
    """DETR's code has no shift by half a pixel: the last valid pixel lies at 2 pi."""
    model = DETR(SMALL)
    mask = torch.zeros(1, 4, 6, dtype=torch.bool)
    code = model.neck.position(mask)[0]  # y before x
    assert code[0, :, 0].tolist() == pytest.approx(
        [math.sin(2 * math.pi * (i + 1) / (4 + 1e-6)) for i in range(4)], abs=1e-6
    )


def by_hand(logits, boxes, labels, objects):
    """The least total cost over all assignments, and DETR's three losses, in plain loops."""
    p = [[math.exp(x) for x in row] for row in logits]
    p = [[x / sum(row) for x in row] for row in p]

    def cost(q, o):
        l1 = sum(abs(a - b) for a, b in zip(boxes[q], objects[o], strict=True))
        return -p[q][labels[o]] + 5 * l1 - 2 * overlap(q, o)

    def overlap(q, o):
        corners = [
            [b[0] - b[2] / 2, b[1] - b[3] / 2, b[0] + b[2] / 2, b[1] + b[3] / 2]
            for b in (boxes[q], objects[o])
        ]
        return giou(*corners)

    best = min(
        itertools.permutations(range(len(p)), len(objects)),
        key=lambda queries: sum(cost(q, o) for o, q in enumerate(queries)),
    )
    nothing = len(p[0]) - 1
    wanted = [nothing] * len(p)
    for o, q in enumerate(best):
        wanted[q] = labels[o]
    weights = [0.1 if label == nothing else 1.0 for label in wanted]
    entropy = [-w * math.log(p[q][label]) for q, (w, label) in enumerate(zip(weights, wanted))]  # noqa: B905
    l1 = sum(
        sum(abs(a - b) for a, b in zip(boxes[q], objects[o], strict=True))
        for o, q in enumerate(best)
    )
    return (
        sum(entropy) / sum(weights),
        5 * l1 / len(objects),
        2 * sum(1 - overlap(q, o) for o, q in enumerate(best)) / len(objects),
    )


@pytest.mark.parametrize("seed", range(5))
def test_losses_are_those_of_plain_loops(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 4, generator=generator) * 2  # three classes, and no object
    boxes = torch.rand(4, 4, generator=generator) * 0.4 + 0.2
    objects = torch.rand(2, 4, generator=generator) * 0.4 + 0.2
    labels = torch.randint(3, (2,), generator=generator)
    output = Output(logits[None], boxes[None], scoring=SoftmaxScoring())
    losses = SetCriterion()(output, [Target(0, labels, objects, (10, 10))])
    expected = by_hand(*(x.tolist() for x in (logits, boxes, labels, objects)))
    for name, value in zip(("class", "box", "giou"), expected, strict=True):
        assert losses[f"loss_{name}"].item() == pytest.approx(value, rel=1e-4)


def test_an_image_without_objects_is_all_background():
    logits = torch.randn(1, 4, 4)
    output = Output(logits, torch.rand(1, 4, 4), scoring=SoftmaxScoring())
    losses = SetCriterion()(output, [Target(0, torch.tensor([]).long(), torch.zeros(0, 4), (9, 9))])
    expected = -logits.log_softmax(-1)[..., 3].mean()  # all have one weight
    torch.testing.assert_close(losses["loss_class"], expected)
    assert losses["loss_box"] == losses["loss_giou"] == 0


def test_the_no_object_class_is_no_label():
    output = Output(torch.randn(1, 4, 4), torch.rand(1, 4, 4), scoring=SoftmaxScoring())
    with pytest.raises(ValueError, match=r"labels must be in \[0, 3\), got \[3\]"):
        SetCriterion()(output, [Target(0, torch.tensor([3]), torch.rand(1, 4), (9, 9))])


def test_a_query_is_detected_once_by_its_best_class():
    logits = torch.tensor([[[2.0, 1.0, 9.0], [3.0, 0.0, 0.0], [0.0, 2.0, 0.0]]])
    output = Output(logits, torch.rand(1, 3, 4), scoring=SoftmaxScoring())
    (found,) = postprocess(output, [(10, 10)])
    p = logits[0].softmax(-1)
    assert found.queries.tolist() == [1, 2, 0] and found.labels.tolist() == [0, 1, 0]
    assert found.scores.tolist() == pytest.approx([p[1, 0].item(), p[2, 1].item(), p[0, 0].item()])
    assert len(postprocess(output, [(10, 10)], top_k=2)[0]) == 2


def test_focal_scoring_is_an_option():
    model = DETR(dataclasses.replace(SMALL, scoring="focal"))
    assert isinstance(model.scoring, FocalScoring) and model(make_batch()).logits.shape[-1] == 4
    torch.testing.assert_close(model.class_heads[0].bias, torch.full((4,), -math.log(99)))
    with pytest.raises(ValueError, match="scoring must be one of focal, softmax, got 'sigmoid'"):
        dataclasses.replace(SMALL, scoring="sigmoid")


def test_costs_go_to_the_cpu_once_for_each_set_of_predictions(monkeypatch):
    """Not once for each image: a GPU would wait each time. The meta device cannot be waited for;
    so a transfer is counted where it is made."""
    transfers = []
    matcher = HungarianMatcher()

    class Elsewhere(torch.Tensor):
        @property
        def device(self):
            return torch.device("cuda")

        def cpu(self):
            transfers.append(self.numel())
            return self.as_subclass(torch.Tensor)

    monkeypatch.setattr(
        matcher, "cost", lambda logits, *_: torch.rand(len(logits), 2).as_subclass(Elsewhere)
    )
    output = Output(torch.zeros(3, 4, 2), torch.rand(3, 4, 4))
    targets = [Target(i, torch.zeros(2).long(), torch.rand(2, 4), (9, 9)) for i in range(3)]
    matches = matcher(output, targets)
    assert transfers == [3 * 4 * 2] and all(len(queries) == 2 for queries, _ in matches)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="divisible by num_heads, got 32 and 3"):
        DETR(dataclasses.replace(SMALL, num_heads=3))
