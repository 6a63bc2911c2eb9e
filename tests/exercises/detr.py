"""Checkers of chapter detr, "DETR, and why it is slow"."""

import torch
import torch.nn.functional as F

from deformable_detr.exercises import checks, expect
from deformable_detr.losses.scoring import SoftmaxScoring


@checks("detr.1")
def check_class_loss(class_loss):
    logits = torch.randn(2, 5, 4)
    full = torch.tensor([[0, 2, 1, 0, 2], [1, 1, 0, 2, 0]])
    yield "every query has an object"
    plain = F.cross_entropy(logits.flatten(0, 1), full.flatten())
    expect(class_loss(logits, full), plain, "the mean over queries of the cross-entropy")
    yield "most queries have none"
    labels = torch.tensor([[-1, 2, -1, -1, -1], [-1, -1, 0, -1, 1]])
    expected = SoftmaxScoring().loss(logits, labels, num_boxes=3)
    expect(class_loss(logits, labels), expected, "divide by the sum of the weights")
    yield "the weight is an argument"
    expected = SoftmaxScoring(no_object=0.4).loss(logits, labels, num_boxes=3)
    expect(class_loss(logits, labels, 0.4), expected)
    yield "an image without objects"
    nothing = torch.full((1, 5), -1)
    expected = SoftmaxScoring().loss(logits[:1], nothing, num_boxes=1)
    expect(class_loss(logits[:1], nothing), expected, "no object is the last logit")
    yield "labels stay as they were"
    expect(labels, torch.tensor([[-1, 2, -1, -1, -1], [-1, -1, 0, -1, 1]]))


@checks("detr.2")
def check_effective_keys(effective_keys):
    yield "equal weights: as many as there are keys"
    expect(effective_keys(torch.full((2, 3, 5, 7), 1 / 7)), 7.0, "natural logarithm and exp")
    yield "queries that look differently"
    scores = torch.tensor([0.1, 5.0]).view(1, 1, 2, 1) * torch.randn(1, 1, 2, 9)
    weights = scores.softmax(-1)
    expected = torch.special.entr(weights).sum(-1).exp().mean()
    expect(effective_keys(weights), expected, "exp for each query, then the mean")
    yield "padded keys have weight 0"
    padded = torch.cat([torch.full((1, 2, 4, 6), 1 / 6), torch.zeros(1, 2, 4, 3)], -1)
    expect(effective_keys(padded), 6.0, "0 times log 0 counts as 0")
    yield "one key has all"
    expect(effective_keys(F.one_hot(torch.tensor([[[2, 0]]]), 5).float()), 1.0)


def _pairs(*queries):
    return torch.tensor(queries), torch.arange(len(queries))


@checks("detr.3")
def check_instability(instability):
    yield "nothing changes"
    match = _pairs(3, 1, 4)
    expect(instability([match], [match]), 0.0)
    yield "two queries swap their objects"
    before = torch.tensor([1, 4, 6]), torch.tensor([0, 1, 2])
    now = torch.tensor([1, 4, 6]), torch.tensor([1, 0, 2])
    expect(instability([before], [now]), 2 / 3, "compare by object, not by place in the list")
    yield "the same match in another order"
    expect(instability([before], [tuple(x.flip(0) for x in before)]), 0.0, "sort by objects")
    yield "images with different numbers of objects"
    several = [_pairs(0, 1, 2, 3), _pairs(5)]
    later = [_pairs(0, 1, 2, 3), _pairs(6)]
    expect(instability(several, later), 1 / 5, "a share of all objects, not a mean of images")
    yield "an image without objects"
    none = torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    expect(instability([*several, none], [*later, none]), 1 / 5)


def _loss(logits, labels, no_object=0.1, first=False, divide="weights", weigh=True):
    classes = logits.shape[-1] - 1
    shifted = labels + 1 if first else labels
    wanted = shifted.where(labels >= 0, torch.tensor(0 if first else classes))
    loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
    weights = torch.where(labels.flatten() >= 0, 1.0, no_object if weigh else 1.0)
    by = {"weights": weights.sum(), "queries": len(loss), "objects": (labels >= 0).sum()}
    return (weights * loss).sum() / by[divide]


def _keys(exp_last=False, base2=False, clamp=True):
    def effective_keys(weights):
        log = torch.log2 if base2 else torch.log
        entropy = -(weights * log(weights.clamp(min=1e-30) if clamp else weights)).sum(-1)
        return entropy.mean().exp() if exp_last else entropy.exp().mean()

    return effective_keys


def _in_order(before, now):
    changed = [a != b for (a, _), (b, _) in zip(before, now, strict=True)]
    return torch.cat(changed).float().mean().item()


def _mean_of_images(before, now):
    shares = [
        (a[o.argsort()] != b[p.argsort()]).float().mean()
        for (a, o), (b, p) in zip(before, now, strict=True)
    ]
    return torch.stack(shares).mean().item()


def _as_sets(before, now):
    lost = sum(
        len(set(a.tolist()) - set(b.tolist())) for (a, _), (b, _) in zip(before, now, strict=True)
    )
    return lost / sum(len(a) for a, _ in before)


WRONG = {
    "detr.1": [
        ("divided by the number of queries", lambda *a: _loss(*a, divide="queries")),
        ("divided by the number of objects", lambda *a: _loss(*a, divide="objects")),
        ("no object weighs as much", lambda *a: _loss(*a, weigh=False)),
        ("no object is the first logit", lambda *a: _loss(*a, first=True)),
        ("always a weight of 0.1", lambda logits, labels, no_object=0.1: _loss(logits, labels)),
    ],
    "detr.2": [
        ("the exponential of the mean entropy", _keys(exp_last=True)),
        ("logarithms to base 2", _keys(base2=True)),
        ("0 times minus infinity", _keys(clamp=False)),
    ],
    "detr.3": [
        ("compared in the matcher's order", _in_order),
        ("only queries that were given up", _as_sets),
        ("a mean over images", _mean_of_images),
    ],
}
