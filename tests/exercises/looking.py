"""Checkers of chapter looking, "What does it look at?"."""

import torch

from deformable_detr.exercises import checks, expect


@checks("looking.1")
def check_share_inside(share_inside):
    points = torch.tensor([[0.2, 0.6], [0.7, 0.6], [0.3, 0.9]]).view(1, 1, 3, 2)
    weights = torch.tensor([0.5, 0.3, 0.2]).view(1, 1, 3)
    yield "one head, one level, three points"
    hint = "sum the weights of the points inside, do not count points"
    expect(float(share_inside(points, weights, (0.1, 0.1, 0.65, 0.65))), 0.5, hint)
    yield "x is compared with left and right, y with top and bottom"
    hint = "boxes are (left, top, right, bottom), points (x, y)"
    expect(float(share_inside(points, weights, (0.1, 0.5, 0.4, 1.0))), 0.7, hint)
    expect(float(share_inside(points, weights, (0.5, 0.1, 0.8, 0.4))), 0.0, hint)
    yield "edges are inside"
    corner = torch.tensor([0.25, 0.75]).view(1, 1, 1, 2)
    for box in ((0.25, 0.5, 0.5, 1.0), (0.0, 0.5, 0.25, 0.75)):
        expect(float(share_inside(corner, torch.ones(1, 1, 1), box)), 1.0, "at least, and at most")
    yield "a share of the whole: heads together have the weight M"
    locations = torch.rand(3, 2, 5, 2) * 1.4 - 0.2
    logits = torch.randn(3, 10).softmax(-1).view(3, 2, 5)
    box = (0.2, -0.1, 0.9, 0.7)
    low, high = torch.tensor(box).split(2)
    inside = ((locations >= low) & (locations <= high)).all(-1)
    hint = "weights sum to one in each head, so to M in all"
    expect(float(share_inside(locations, logits, box)), (logits * inside).sum().item() / 3, hint)
    expect(float(share_inside(locations, logits, (-9, -9, 9, 9))), 1.0, hint)


def _strictly(points, box):
    low, high = torch.tensor(box).split(2)
    return ((points > low) & (points < high)).all(-1)


def _inside(locations, box, swapped=False):
    low, high = torch.tensor(box).float().split(2)
    places = locations.flip(-1) if swapped else locations
    return ((places >= low) & (places <= high)).all(-1)


WRONG = {
    "looking.1": [
        ("points counted", lambda x, a, box: _inside(x, box).float().mean()),
        ("heads summed", lambda x, a, box: (a * _inside(x, box)).sum()),
        ("x and y swapped", lambda x, a, box: (a * _inside(x, box, True)).sum() / len(a)),
        ("edges are outside", lambda x, a, box: (a * _strictly(x, box)).sum() / len(a)),
    ],
}
