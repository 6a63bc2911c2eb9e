"""Checkers of chapter refinement, "Refinement and two stages"."""

import torch
from torchvision.ops import box_iou

from deformable_detr.exercises import checks, expect
from deformable_detr.models.heads import move


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


@checks("refinement.3")
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
        ("any overlap", lambda p, t, at=0.5: 1.0 if not len(t) else _any_overlap(p, t)),
        ("a proposal covers one box only", _one_to_one),
        ("precision", lambda p, t, at=0.5: (box_iou(p, t).amax(1) >= at).float().mean().item()),
        (
            "no case for no objects",
            lambda p, t, at=0.5: (box_iou(t, p).amax(1) >= at).float().mean().item(),
        ),
    ],
}
