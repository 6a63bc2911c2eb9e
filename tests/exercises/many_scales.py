"""Checkers of chapter many_scales, "Many scales at once"."""

import math

import torch

from deformable_detr import MSDeformAttn
from deformable_detr.exercises import checks, expect


@checks("many_scales.1")
def check_level_weights(level_weights):
    raw = torch.randn(2, 5, 3 * 2 * 4)
    yield "shape and sign"
    weights = level_weights(raw, 3, 2, 4)
    expect(tuple(weights.shape), (2, 5, 3, 2, 4))
    expect(bool((weights > 0).all()), True)
    yield "a head's weights sum to one over all levels together"
    expect(weights.sum((-1, -2)), torch.ones(2, 5, 3), "one softmax over L * K, not over K")
    yield "heads come first, then levels, then points"
    expect(weights, raw.view(2, 5, 3, 8).softmax(-1).view(2, 5, 3, 2, 4))


@checks("many_scales.2")
def check_star_offsets(star_offsets):
    yield "four heads look right, down, left and up"
    four = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    expect(star_offsets(4, 1)[:, 0], four, "(dx, dy), beginning with 1 pixel to the right")
    yield "eight heads lie on a square, not on a circle"
    expect(star_offsets(8, 1)[1, 0], torch.tensor([1.0, 1.0]), "divide by the larger of both")
    yield "it is the library's initialisation"
    module = MSDeformAttn(16, num_levels=1, num_heads=8, num_points=5)
    bias = module.sampling_offsets.bias.detach().view(8, 5, 2)
    expect(star_offsets(8, 5), bias, "point k lies k pixels away, k = 1, 2, ...")


@checks("many_scales.3")
def check_token_reference(token_reference):
    one = torch.ones(2)
    yield "without padding it is the centre of the cell"
    expect(token_reference(0, 6, (5, 7), one, one), torch.tensor([6.5 / 7, 0.1]), "half a cell")
    yield "with padding, divide by one's own ratio and multiply by the other"
    own, other = torch.tensor([8 / 12, 5 / 8]), torch.tensor([2 / 3, 1.0])
    expect(token_reference(4, 7, (8, 12), own, other), torch.tensor([0.625, 0.9]))
    yield "on its own level the two cancel"
    expect(token_reference(2, 3, (8, 12), own, own), torch.tensor([3.5 / 12, 2.5 / 8]))


@checks("many_scales.4")
def check_points_in_pixels(points_in_pixels):
    weights = torch.rand(2, 3, 4).flatten(1).softmax(-1).view(2, 3, 4)
    locations, one = torch.rand(2, 3, 4, 2), torch.ones(3, 2)
    yield "a square image without padding"
    points, shares, levels = points_in_pixels(locations, weights, one, (64, 64))
    wanted = _points(locations, weights, one, (64, 64))
    expect(shares.sum(), torch.tensor(1.0), "divide the weights by the number of heads")
    expect(shares, wanted[1], "sorted, the largest first")
    expect(points, wanted[0], "points in the order of their weights")
    yield "an oblong image with padding"
    ratios = torch.tensor([[0.6, 0.7], [0.65, 0.8], [0.7, 1.0]])
    points, shares, levels = points_in_pixels(locations, weights, ratios, (50, 90))
    wanted = _points(locations, weights, ratios, (50, 90))
    expect(points, wanted[0], "divide by the level's ratio; x times the width")
    expect(levels, wanted[2], "the level of each point, in the same order")


def _points(locations, weights, ratios, size, swap=False, divide=True, heads=True, sort=True):
    size = torch.tensor(size if swap else size[::-1])
    points = (locations / ratios[:, None] if divide else locations) * size
    shares = weights / (len(weights) if heads else 1)
    levels = torch.arange(weights.shape[1])[:, None].expand_as(weights).flatten()
    order = shares.flatten().argsort(descending=True) if sort else torch.arange(levels.numel())
    return points.flatten(0, 2)[order], shares.flatten()[order], levels[order]


def _star(heads, points, first=1, square=True, swap=False):
    angle = torch.arange(heads) * 2 * math.pi / heads
    direction = torch.stack([angle.cos(), angle.sin()], -1)
    if square:
        direction = direction / direction.abs().amax(-1, keepdim=True)
    if swap:
        direction = direction.flip(-1)
    return direction[:, None] * torch.arange(first, first + points)[:, None]


def _place(row, column, shape, half=0.5, swap=False):
    height, width = reversed(shape) if swap else shape
    return torch.tensor([(column + half) / width, (row + half) / height])


WRONG = {
    "many_scales.1": [
        ("softmax over the points", lambda r, m, n, k: r.unflatten(-1, (m, n, k)).softmax(-1)),
        ("softmax over everything", lambda r, m, n, k: r.softmax(-1).unflatten(-1, (m, n, k))),
        (
            "levels before heads",
            lambda r, m, n, k: (
                r.unflatten(-1, (n, m, k))
                .transpose(2, 3)
                .flatten(3)
                .softmax(-1)
                .unflatten(-1, (n, k))
            ),
        ),
    ],
    "many_scales.2": [
        ("on a circle", lambda m, k: _star(m, k, square=False)),
        ("distances from zero", lambda m, k: _star(m, k, first=0)),
        ("dx and dy swapped", lambda m, k: _star(m, k, swap=True)),
    ],
    "many_scales.3": [
        ("not divided", lambda r, c, s, a, b: _place(r, c, s) * b),
        ("not multiplied", lambda r, c, s, a, b: _place(r, c, s) / a),
        ("ratios swapped", lambda r, c, s, a, b: _place(r, c, s) / b * a),
        ("no half cell", lambda r, c, s, a, b: _place(r, c, s, half=0) / a * b),
        ("H and W swapped", lambda r, c, s, a, b: _place(r, c, s, swap=True) / a * b),
    ],
    "many_scales.4": [
        ("H and W swapped", lambda *a: _points(*a, swap=True)),
        ("not divided by the ratio", lambda *a: _points(*a, divide=False)),
        ("weights of each head sum to one", lambda *a: _points(*a, heads=False)),
        ("not sorted", lambda *a: _points(*a, sort=False)),
    ],
}
