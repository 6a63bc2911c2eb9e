"""Checkers of chapter training, "Training it"."""

import math

import numpy as np
import torch

from deformable_detr.exercises import checks, expect


@checks("training.1")
def check_judge(judge):
    yield "one detection, one object: at least the threshold is enough"
    expect(list(judge(torch.tensor([[0.5]]), 0.5)), [True], "COCO asks for IoU >= threshold")
    expect(list(judge(torch.tensor([[0.49]]), 0.5)), [False])
    yield "an object counts once"
    twice = torch.tensor([[0.9, 0.0], [0.8, 0.1]])
    expect(list(judge(twice, 0.5)), [True, False], "the second one is a duplicate")
    yield "the best score chooses first, not the best overlap"
    expect(list(judge(torch.tensor([[0.6], [0.9]]), 0.5)), [True, False], "rows come best first")
    yield "a detection that is not correct takes nothing"
    expect(list(judge(torch.tensor([[0.3], [0.9]]), 0.5)), [False, True], "its object stays free")
    yield "a detection may fall back on an object that is still free"
    crowd = torch.tensor([[0.9, 0.6], [0.8, 0.7], [0.7, 0.9]])
    expect(list(judge(crowd, 0.5)), [True, True, False], "its best is taken, the next is not")
    yield "of several free objects it takes the one that it overlaps most"
    expect(list(judge(torch.tensor([[0.6, 0.9], [0.7, 0.1]]), 0.5)), [True, True], "not the first")
    yield "no object, or no detection"
    expect(list(judge(torch.zeros(2, 0), 0.5)), [False, False])
    expect(list(judge(torch.zeros(0, 3), 0.5)), [])


def _average_precision(correct, objects, envelope=True, points=101, of_found=False):
    """As pycocotools computes it; the switches make wrong answers."""
    correct = np.asarray(correct, dtype=float)
    hits = correct.cumsum()
    precision = hits / np.arange(1, len(correct) + 1)
    recall = hits / (max(correct.sum(), 1) if of_found else objects)
    if envelope:
        precision = np.maximum.accumulate(precision[::-1])[::-1]
    index = np.searchsorted(recall, np.linspace(0, 1, points), side="left")
    return float(np.append(precision, 0.0)[index].mean())


@checks("training.2")
def check_average_precision(average_precision):
    yield "all found and nothing else: 1"
    expect(float(average_precision([True, True, True], 3)), 1.0)
    yield "two of three found: recall ends at two thirds"
    expect(
        float(average_precision([True, True], 3)),
        67 / 101,
        "recall is relative to the objects; at 0.00 to 0.66 precision is 1, beyond it is 0",
    )
    yield "the example of the text"
    given = float(average_precision([True, True, False, False, True], 3))
    expect(given, (67 + 34 * 0.6) / 101, "101 levels of recall, 0.00 to 1.00")
    yield "precision counts as the best that is still to come"
    given = float(average_precision([False, True, True, True], 3))
    expect(given, 0.75, "after the first mistake, precision rises to 3/4")
    yield "nothing found"
    expect(float(average_precision([], 7)), 0.0)
    yield "any list"
    generator = torch.Generator().manual_seed(0)
    for objects in (3, 7, 11):
        correct = (torch.rand(15, generator=generator) < 0.5).tolist()
        while sum(correct) > objects:
            correct[correct.index(True)] = False
        expect(float(average_precision(correct, objects)), _average_precision(correct, objects))


@checks("training.3")
def check_rate(rate):
    def wanted(step, total, warmup):
        rise = min(1, (step + 1) / warmup) if warmup else 1
        return rise * (0.01 + 0.99 * (1 + math.cos(math.pi * step / total)) / 2)

    yield "without warm-up: 1 at the start, 0.01 at the end, in between in the middle"
    for step in (0, 450, 900):
        expect(float(rate(step, 900, 0)), wanted(step, 900, 0), "0.01 + 0.99 * a half cosine")
    yield "the first step already moves the weights"
    expect(float(rate(0, 900, 50)), 1 / 50, "step 0 is the first of 50: 1/50, not 0")
    yield "warm-up and cosine multiply"
    for step in (24, 49, 50, 300):
        expect(float(rate(step, 900, 50)), wanted(step, 900, 50), "the cosine runs from step 0")


def _every_hit(overlap, threshold):
    return [bool((row >= threshold).any()) for row in overlap]


def _first_free(overlap, threshold):
    taken, correct = set(), []
    for row in overlap:
        free = [i for i, x in enumerate(row) if x >= threshold and i not in taken]
        taken.update(free[:1])
        correct.append(bool(free))
    return correct


def _no_fallback(overlap, threshold):
    taken, correct = set(), []
    for row in overlap:
        best = int(row.argmax()) if len(row) else -1
        correct.append(best >= 0 and bool(row[best] >= threshold) and best not in taken)
        taken |= {best} if correct[-1] else set()
    return correct


def _always_takes(overlap, threshold):
    free, correct = set(range(overlap.shape[1])), []
    for row in overlap:
        best = max(free, key=lambda i: float(row[i]), default=-1)
        correct.append(best >= 0 and bool(row[best] >= threshold))
        free.discard(best)
    return correct


def _objects_choose(overlap, threshold):
    correct = [False] * len(overlap)
    for column in overlap.T if len(overlap) else ():
        if column.max() >= threshold:
            correct[int(column.argmax())] = True
    return correct


WRONG = {
    "training.1": [
        ("duplicates count", _every_hit),
        ("no second choice", _no_fallback),
        ("the first free object", _first_free),
        ("a loose detection takes its object", _always_takes),
        ("objects choose their detections", _objects_choose),
    ],
    "training.2": [
        ("recall of what was found", lambda c, n: _average_precision(c, n, of_found=True)),
        ("no envelope", lambda c, n: _average_precision(c, n, envelope=False)),
        ("11 points, as in PASCAL VOC", lambda c, n: _average_precision(c, n, points=11)),
    ],
    "training.3": [
        ("the first step has rate zero", lambda s, n, w: min(1, s / w) if w else _cosine(s, n)),
        ("ends at zero", lambda s, n, w: (_cosine(s, n) - 0.01) / 0.99),
        ("the cosine starts after the warm-up", lambda s, n, w: _late(s, n, w)),
    ],
}


def _cosine(step, total):
    return 0.01 + 0.99 * (1 + math.cos(math.pi * step / total)) / 2


def _late(step, total, warmup):
    return (step + 1) / warmup if step < warmup else _cosine(step - warmup, total - warmup)
