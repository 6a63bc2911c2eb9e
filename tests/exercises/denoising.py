"""Checkers of chapter denoising, "Denoising: DN-DETR and DINO"."""

import torch

from deformable_detr.exercises import checks, expect
from deformable_detr.models.denoising import denoising_mask, move_edges, shift
from deformable_detr.models.heads import move


def _objects(*shape):
    """Labels of ten classes, and boxes that no noise below 1 takes out of the picture."""
    centres, sides = torch.rand(*shape, 2) * 0.2 + 0.4, torch.rand(*shape, 2) * 0.15 + 0.1
    return torch.randint(10, shape), torch.cat([centres, sides], -1)


@checks("denoising.1")
def check_noised(noised):
    labels, boxes = _objects(3, 5)
    changed, others = torch.rand(3, 5), torch.randint(10, (3, 5))
    moves = 2 * torch.rand(3, 5, 4) - 1
    yield "nothing moves where the numbers are 0"
    found = noised(labels, boxes, torch.ones(3, 5), others, torch.zeros(3, 5, 4))
    expect(len(found), 2, "labels and boxes")
    expect(found[0], labels, "no number is below label_noise here")
    expect(found[1], boxes, "0 means: stay")
    yield "centres by half sides, sides by whole ones"
    _, moved = noised(labels, boxes, changed, others, moves)
    expect(moved, shift(boxes, moves, 0.4), "reach: w / 2, h / 2, w, h")
    _, moved = noised(labels, boxes, changed, others, moves, box_noise=0.7)
    expect(moved, shift(boxes, moves, 0.7), "box_noise is given")
    yield "the boxes stay in [0, 1]"
    low = boxes * torch.tensor([0.1, 0.1, 1.0, 1.0])
    expect(noised(labels, low, changed, others, moves, box_noise=3.0)[1], shift(low, moves, 3.0))
    yield "labels change where the number is below label_noise"
    for label_noise in (0.2, 0.6):
        found, _ = noised(labels, boxes, changed, others, moves, label_noise=label_noise)
        expect(found, others.where(changed < label_noise, labels), "others where changed is low")


@checks("denoising.2")
def check_attention_mask(attention_mask):
    cpu = torch.device("cpu")
    found = attention_mask(2, 6, 4)
    yield "its shape, and True means forbidden"
    expect(tuple(found.shape), (10, 10), "size + learned, squared")
    expect(str(found.dtype), "torch.bool")
    expect(bool(found.diagonal().any()), False, "everybody may look at itself")
    yield "learned queries do not see noised ones"
    expect(found[6:, :6].all(), True, "rows look, columns are looked at")
    yield "noised ones see their own group and no other"
    expect(found[:6, :6], denoising_mask(2, 6, 4, cpu)[:6, :6], "group 0 is places 0, 1, 2")
    yield "everybody sees the learned queries"
    expect(found[:, 6:].any(), False, "nothing is forbidden in these columns")
    yield "three groups, and one"
    for groups, size, learned in ((3, 6, 5), (1, 4, 2)):
        mask = denoising_mask(groups, size, learned, cpu)
        expect(attention_mask(groups, size, learned), mask)


@checks("denoising.3")
def check_near_and_far(near_and_far):
    _, boxes = _objects(7)
    moves = 2 * torch.rand(2, 7, 4) - 1
    further = moves + torch.tensor([0.0, 1.0]).view(2, 1, 1) * torch.where(moves < 0, -1.0, 1.0)

    def expected(boxes, scale=1.0):
        return move_edges(boxes.expand(2, 7, 4), further, scale)

    yield "near copies"
    found = near_and_far(boxes, moves)
    expect(tuple(found.shape), (2, 7, 4), "both, near first")
    expect(found[0], expected(boxes)[0], "each edge by moves x half a side")
    yield "far copies"
    outwards = moves.abs() * torch.tensor([-1.0, -1.0, 1.0, 1.0])
    given = near_and_far(boxes / 2 + 0.25, outwards, 0.5)[1]
    wanted = move_edges(boxes / 2 + 0.25, outwards[1] + outwards[1].sign(), 0.5)
    expect(given, wanted, "the same direction, by 1 + |moves|, times scale")
    yield "edges that crossed change places"
    expect(found[1, :, 2:].min() >= 0, True, "minimum and maximum of each pair")
    expect(found[1], expected(boxes)[1], "crossed edges change places")
    yield "edges stay in [0, 1]"
    _, large = _objects(7)
    large = large * torch.tensor([1.0, 1.0, 3.0, 3.0])
    expect(near_and_far(large, moves), expected(large), "clamp the edges, not centre and sides")


@checks("denoising.4")
def check_look_forward_twice(look_forward_twice):
    weights = [torch.full((), w, requires_grad=True) for w in (0.3, -0.5, 0.8, 0.4)]
    heads = [lambda reference, w=w: w * (reference + 1) for w in weights]
    reference = torch.rand(5, 4) * 0.6 + 0.2
    yield "the boxes"
    expected, start = [], reference
    for head in heads:
        start = move(start, head(start)).detach()
        expected.append(start)
    given = look_forward_twice(reference, heads)
    expect(len(given), 4, "one box set for each head")
    expect(torch.stack(list(given)), torch.stack(expected), "the values are those of refinement")
    yield "a loss reaches its own head and the one before, no other"
    for layer, boxes in enumerate(given):
        assert boxes.requires_grad, f"the boxes of layer {layer} carry no gradient"
        found = torch.autograd.grad(boxes.sum(), weights, allow_unused=True, retain_graph=True)
        reached = [i for i, gradient in enumerate(found) if gradient is not None]
        expect(
            reached,
            list(range(max(0, layer - 1), layer + 1)),
            "start: from the detached reference, itself not detached",
        )
    yield "heads look around what is cut off"
    seen = []

    def watched(head):
        return lambda reference: seen.append(reference.requires_grad) or head(reference)

    look_forward_twice(reference, [watched(head) for head in heads])
    expect(seen, [False] * 4, "detach what a head is given")


# Wrong answers, by the misconception that makes them


def _noised(reach=None, clamp=True, swap=False):
    def answer(labels, boxes, changed, others, moves, label_noise=0.2, box_noise=0.4):
        picked = changed >= label_noise if swap else changed < label_noise
        sides = boxes[..., 2:]
        parts = torch.cat([sides / 2, sides], -1) if reach is None else reach(sides)
        moved = boxes + moves * parts * box_noise
        return torch.where(picked, others, labels), moved.clamp(0, 1) if clamp else moved

    return answer


def _mask(transpose=False, symmetric=False, groups_apart=True):
    def answer(groups, size, total):
        mask = denoising_mask(groups if groups_apart else 1, size, total, torch.device("cpu"))
        if symmetric:
            mask = mask | mask.T
        return mask.T if transpose else mask

    return answer


def _pair(sort=True, add=None, half=0.5):
    def answer(boxes, moves, scale=1.0):
        sign = torch.where(moves[1] < 0, -1.0, 1.0)
        far = moves[1] + sign if add is None else add(moves[1])
        both = torch.stack([moves[0], far])
        return move_edges(boxes.expand(2, *boxes.shape), both, 2 * half * scale, sort)

    return answer


def _twice(once=False, through=False, reference_cut=True):
    def answer(reference, heads):
        boxes, start = [], reference
        for head in heads:
            delta = head(reference)
            boxes.append(move(start, delta))
            start = boxes[-1] if through else move(reference, delta)
            reference = start.detach() if reference_cut else start
            start = start.detach() if once else start
        return boxes

    return answer


WRONG = {
    "denoising.1": [
        ("centres by whole sides", _noised(reach=lambda sides: torch.cat([sides, sides], -1))),
        ("sides by half sides", _noised(reach=lambda sides: torch.cat([sides, sides], -1) / 2)),
        ("not clamped", _noised(clamp=False)),
        ("most labels change", _noised(swap=True)),
    ],
    "denoising.2": [
        ("columns look", _mask(transpose=True)),
        ("noised queries may not see the learned ones", _mask(symmetric=True)),
        ("groups see each other", _mask(groups_apart=False)),
        ("True means allowed", lambda *sizes: ~_mask()(*sizes)),
    ],
    "denoising.3": [
        ("whole sides", _pair(half=1.0)),
        ("always to the right and below", _pair(add=lambda moves: moves + 1)),
        ("far copies twice as far", _pair(add=lambda moves: 2 * moves)),
        ("crossed edges stay crossed", _pair(sort=False)),
    ],
    "denoising.4": [
        ("looked forward once", _twice(once=True)),
        ("through all layers", _twice(through=True)),
        ("heads look around what is not cut", _twice(reference_cut=False)),
    ],
}
