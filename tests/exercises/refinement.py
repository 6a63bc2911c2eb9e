"""Checkers of chapter refinement, "Refinement and two stages"."""

import torch
from torchvision.ops import box_iou

from deformable_detr.exercises import checks, expect
from deformable_detr.losses.scoring import FocalScoring
from deformable_detr.models.heads import move
from deformable_detr.models.selection import FirstStage, token_anchors
from deformable_detr.structures import Tokens


@checks("refinement.1")
def check_moved_box(moved_box):
    delta = torch.randn(3, 2, 4)
    yield "a box"
    boxes = torch.rand(3, 2, 4) * 0.8 + 0.1
    expect(moved_box(boxes, delta), move(boxes, delta), "add before the sigmoid, not after")
    yield "a point"
    points = torch.rand(3, 2, 2) * 0.8 + 0.1
    expect(moved_box(points, delta), move(points, delta), "zeros behind the inverse sigmoid")


@checks("refinement.2")
def check_refine(refine):
    weights = [torch.full((), w, requires_grad=True) for w in (0.3, -0.5, 0.8)]
    heads = [lambda reference, w=w: w * (reference + 1) for w in weights]
    reference = torch.rand(5, 4) * 0.6 + 0.2
    yield "the boxes"
    expected, start = [], reference
    for head in heads:
        start = move(start, head(start)).detach()
        expected.append(start)
    given = refine(reference, heads)
    expect(len(given), 3, "one box set for each head")
    expect(torch.stack(list(given)), torch.stack(expected), "each head starts from the last box")
    yield "each loss trains its own head, and no other"
    for layer, boxes in enumerate(given):
        assert boxes.requires_grad, f"the boxes of layer {layer} carry no gradient"
        found = torch.autograd.grad(boxes.sum(), weights, allow_unused=True, retain_graph=True)
        trained = [i for i, gradient in enumerate(found) if gradient is not None]
        expect(trained, [layer], "detach what is handed on, and only that")


def _first_stage() -> FirstStage:
    """One in which no weight is zero."""
    stage = FirstStage(24, 3, FocalScoring(), anchor_size=0.1)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return stage


def _memory(padded: int) -> Tokens:
    """Tokens of maps of 6 x 8 and 3 x 4; of the first, columns from `padded` on are padding."""
    shapes, ratios = [(6, 8), (3, 4)], torch.ones(2, 2, 2)
    fine = torch.zeros(2, 6, 8, dtype=torch.bool)
    fine[:, :, padded:] = True
    padding = torch.cat([fine.flatten(1), torch.zeros(2, 12, dtype=torch.bool)], 1)
    features = torch.randn(2, 60, 24)
    return Tokens(features, torch.zeros_like(features), padding, shapes, ratios)


@checks("refinement.3")
def check_select(select):
    stage = _first_stage()

    def given_and_expected(memory):
        anchors, usable = token_anchors(memory, stage.anchor_size)
        given = select(stage, memory.features, anchors, usable, 5)
        queries, proposals = stage(memory, 5)
        return given, (proposals.logits, proposals.boxes, queries.references)

    given, expected = given_and_expected(_memory(padded=8))
    yield "logits and boxes, where all tokens are usable"
    expect(given[0], expected[0], "output, output_norm, class_head", atol=1e-4)
    expect(given[1], expected[1], "the box head's answer is added before the sigmoid", atol=1e-4)
    yield "tokens that are not usable are blank, and their boxes are (1, 1, 1, 1)"
    blanked, as_expected = given_and_expected(_memory(padded=6))
    expect(blanked[0], as_expected[0], "features become 0 before the projection", atol=1e-4)
    expect(
        blanked[1], as_expected[1], "their anchors become infinity before the sigmoid", atol=1e-4
    )
    yield "the tokens of best logit 0, best first"
    expect(given[2], expected[2], "topk of logits[..., 0], in each image by itself", atol=1e-4)
    yield "boxes carry a gradient, references do not"
    expect(bool(given[1].requires_grad), True, "the first stage's own loss needs it")
    expect(bool(given[2].requires_grad), False, "detach what is handed on")


@checks("refinement.4")
def check_recall(recall):
    truth = torch.tensor([[0.1, 0.1, 0.3, 0.3], [0.5, 0.5, 0.9, 0.9], [0.0, 0.6, 0.2, 0.8]])
    yield "every box has its proposal"
    expect(recall(truth, truth), 1.0, "the maximum over proposals, for each true box")
    yield "many proposals on one object"
    proposals = truth[:1] + torch.randn(9, 4) * 0.005
    assert (box_iou(truth, proposals).amax(1) > 0.5).tolist() == [True, False, False]
    expect(recall(proposals, truth), 1 / 3, "a share of the true boxes, not of the proposals")
    expect(recall(proposals, truth[1:]), 0.0)
    several = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.9]])
    expect(recall(several[:1], several), 1.0, "one proposal may cover several boxes")
    yield "the threshold"
    whole, half = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[0.0, 0.0, 1.0, 0.5]])
    expect(recall(whole / 2, whole), 0.0, "an overlap of 0.25 is too little")
    expect(recall(half, whole), 1.0, "at least: 0.5 is enough")
    expect(recall(half, whole, 0.75), 0.0, "the threshold is an argument")
    yield "an image without objects"
    expect(recall(proposals, torch.zeros(0, 4)), 1.0, "nothing to miss")


def _any_overlap(proposals, truth):
    return (box_iou(truth, proposals).amax(1) > 0).float().mean().item()


def _one_to_one(proposals, truth, at=0.5):
    free, found = set(range(len(proposals))), 0
    for row in box_iou(truth, proposals):
        best = max(free, key=lambda i: float(row[i]), default=None)
        if best is not None and row[best] >= at:
            found += 1
            free.discard(best)
    return found / len(truth) if len(truth) else 1.0


def _refine(detach_result, detach_next):
    def refine(reference, heads):
        boxes = []
        for head in heads:
            box = move(reference, head(reference))
            boxes.append(box.detach() if detach_result else box)
            reference = box.detach() if detach_next else box
        return boxes

    return refine


def _zero_reference(reference, delta):
    if reference.shape[-1] == 2:
        reference = torch.cat([reference, torch.full_like(reference, 1e-5)], -1)
    return move(reference, delta)


def _select(blank=True, infinite=True, late=False, before=True, score=None, detach=(False, True)):
    """The selection with one thing wrong."""

    def select(stage, features, anchors, usable, num_queries):
        unusable = ~usable.unsqueeze(-1)
        if blank and not late:
            features = features.masked_fill(unusable, 0)
        features = stage.output_norm(stage.output(features))
        if late:
            features = features.masked_fill(unusable, 0)
        logits, delta = stage.class_head(features), stage.box_head(features)
        start = anchors.logit(eps=1e-5)
        start = start.masked_fill(unusable, torch.inf) if infinite else start
        boxes = (start + delta).sigmoid() if before else anchors + delta
        chosen = (score or (lambda logits: logits[..., 0]))(logits).topk(num_queries, 1).indices
        references = boxes.gather(1, chosen.unsqueeze(-1).expand(-1, -1, 4))
        pair = boxes, references
        return logits, *(x.detach() if cut else x for x, cut in zip(pair, detach, strict=True))

    return select


def _same_tokens_in_all(stage, features, anchors, usable, num_queries):
    logits, boxes, _ = _select()(stage, features, anchors, usable, num_queries)
    chosen = logits[0, :, 0].topk(num_queries).indices
    return logits, boxes, boxes[:, chosen].detach()


WRONG = {
    "refinement.1": [
        ("added after the sigmoid", lambda reference, delta: reference + delta[..., :4].sigmoid()),
        ("a point of size zero", _zero_reference),
    ],
    "refinement.2": [
        ("no detach", _refine(False, False)),
        ("the results detached too", _refine(True, True)),
        ("always the first reference", lambda r, heads: [move(r, head(r)) for head in heads]),
    ],
    "refinement.3": [
        ("added after the sigmoid", _select(before=False)),
        ("features not blanked", _select(blank=False)),
        ("features blanked behind the norm", _select(late=True)),
        ("anchors not set to infinity", _select(infinite=False)),
        ("the best class of all", _select(score=lambda logits: logits.amax(-1))),
        ("the tokens of the first image for all", _same_tokens_in_all),
        ("references with gradient", _select(detach=(False, False))),
        ("all boxes detached", _select(detach=(True, True))),
    ],
    "refinement.4": [
        ("any overlap", lambda p, t, at=0.5: 1.0 if not len(t) else _any_overlap(p, t)),
        ("a proposal covers one box only", _one_to_one),
        ("precision", lambda p, t, at=0.5: (box_iou(p, t).amax(1) >= at).float().mean().item()),
        (
            "no case for no objects",
            lambda p, t, at=0.5: (box_iou(t, p).amax(1) >= at).float().mean().item(),
        ),
    ],
}
