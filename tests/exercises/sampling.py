"""Checkers of chapter sampling, "Sampling between pixels"."""

import math

import torch
import torch.nn.functional as F
from torchvision.ops import roi_align

from deformable_detr.exercises import checks, expect
from deformable_detr.layers.sampling import bilinear_sample, pixel_to_normalised

VALUES = torch.tensor([[10.0, 20.0], [50.0, 80.0]])


@checks("sampling.1")
def check_blend(blend):
    yield "each corner gives back its own value"
    for y in (0, 1):
        for x in (0, 1):
            expect(blend(VALUES, float(x), float(y)), VALUES[y, x], "rows are y, columns are x")
    yield "a quarter right and half down is 35"
    expect(blend(VALUES, 0.25, 0.5), 35.0, "fx weighs the right column, fy the bottom row")
    yield "any point of any four values"
    values = torch.randn(2, 2)
    for fx, fy in torch.rand(5, 2).tolist():
        point = torch.tensor([[(fx + 0.5) / 2, (fy + 0.5) / 2]])
        expect(blend(values, fx, fy), bilinear_sample(values[None], point)[0, 0])


@checks("sampling.2")
def check_blend_slope(blend_slope):
    yield "on the top edge the slope along x is the difference of the top corners"
    expect(blend_slope(VALUES, 0.0, 0.0)[0], 10.0, "right minus left")
    yield "the slope along x is blended along y, and the other way round"
    by_x, by_y = blend_slope(VALUES, 0.25, 0.5)
    expect(by_x, 20.0, "differences along x are blended with fy")
    expect(by_y, 45.0, "differences along y are blended with fx")
    yield "it is what finite differences say"
    values = torch.randn(2, 2).double()
    fx, fy, step = 0.3, 0.8, 1e-4

    def value(x, y):
        return (1 - y) * ((1 - x) * values[0, 0] + x * values[0, 1]) + y * (
            (1 - x) * values[1, 0] + x * values[1, 1]
        )

    by_x, by_y = blend_slope(values, fx, fy)
    expect(by_x, (value(fx + step, fy) - value(fx - step, fy)) / (2 * step))
    expect(by_y, (value(fx, fy + step) - value(fx, fy - step)) / (2 * step))


@checks("sampling.3")
def check_has_gradient(has_gradient):
    spot = torch.zeros(8, 16)
    spot[4, 12] = 1.0
    yield "on the full map only the pixel's neighbours feel it"
    expect(has_gradient(spot, (12.4, 4.3), 1), True, "within one pixel of the spot")
    expect(has_gradient(spot, (9.0, 4.3), 1), False, "three pixels away")
    yield "the coarse map carries the point to the right cell"
    # full pixel 9.4 is 1.975 on the map of quarter size, the spot's cell is 3
    expect(has_gradient(spot, (9.4, 4.3), 4), False, "(p + 0.5) / factor - 0.5, half pixels too")
    expect(has_gradient(spot, (9.8, 4.3), 4), True, "(9.8 + 0.5) / 4 - 0.5 = 2.075: near cell 3")
    yield "a coarser map sees further"
    expect([has_gradient(spot, (5.0, 4.0), f) for f in (1, 2, 4, 8)], [False, False, False, True])
    yield "a bright but flat map has no gradient"
    expect(has_gradient(torch.ones(8, 16), (5.2, 4.3), 2), False, "the value is not the gradient")


@checks("sampling.4")
def check_from_align_corners(from_align_corners):
    yield "the middle stays the middle"
    expect(from_align_corners(torch.zeros(2), (3, 5)), torch.tensor([0.5, 0.5]))
    yield "-1 and 1 are the centres of the first and last pixels"
    ends = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])
    centres = pixel_to_normalised(torch.tensor([[0.0, 0.0], [4.0, 2.0]]), (3, 5))
    expect(from_align_corners(ends, (3, 5)), centres, "half a pixel from 0 and from 1; (x, y)")
    yield "samples agree with grid_sample(align_corners=True)"
    feature_map, points = torch.randn(2, 4, 7), torch.rand(9, 2) * 2 - 1
    wanted = F.grid_sample(feature_map[None], points[None, None], align_corners=True)[0, :, 0].T
    expect(bilinear_sample(feature_map, from_align_corners(points, (4, 7))), wanted)


@checks("sampling.5")
def check_cut_out(cut_out):
    picture = torch.randn(2, 4, 7)
    middle = (3.0, 1.5)  # of a picture of 4 rows and 7 columns
    yield "the whole picture comes back unchanged"
    hint = "the middle of 7 columns is at x = 3; size is (w, h), shape is (rows, columns)"
    expect(cut_out(picture, middle, (7, 4), 0.0, (4, 7)), picture, hint)
    yield "a part comes back enlarged"
    y, x = torch.meshgrid(torch.arange(3) + 0.5, torch.arange(5) + 0.5, indexing="ij")
    corner = torch.stack([x * 2 / 5, y * 1 / 3], -1) + torch.tensor([2.0, 1.0])
    wanted = bilinear_sample(picture, corner / torch.tensor([7.0, 4.0])).permute(2, 0, 1)
    hint = "5 points in 2 pixels lie 0.4 apart, the first 0.2 from the edge of the box"
    expect(cut_out(picture, (2.5, 1.0), (2, 1), 0.0, (3, 5)), wanted, hint)
    yield "a box larger than the picture has zeros around it"
    around = cut_out(picture, middle, (13, 10), 0.0, (10, 13))
    expect(around, F.pad(picture, (3, 3, 3, 3)), "outside the picture everything is zero")
    yield "a quarter of a turn clockwise is torch.rot90, whose turn is the other way"
    hint = "y points down: (u, v) goes to (u cos - v sin, u sin + v cos)"
    turned = cut_out(picture, middle, (4, 7), math.pi / 2, (7, 4))
    expect(turned, picture.rot90(1, (1, 2)), hint)
    yield "an upright box is torchvision's RoIAlign"
    picture = torch.randn(2, 11, 14)
    box = torch.tensor([[1.3, 2.1, 12.4, 9.0]])  # left, top, right, bottom, from edge to edge
    wanted = roi_align(picture[None], [box], (6, 9), sampling_ratio=1, aligned=True)[0]
    centre, size = (1.3 + 12.4) / 2 - 0.5, 12.4 - 1.3
    given = cut_out(picture, (centre, (2.1 + 9.0) / 2 - 0.5), (size, 9.0 - 2.1), 0.0, (6, 9))
    expect(given, wanted, "each pixel of the result is read once, at its centre")


def _has_value(full_map, pixel, factor):
    place = (torch.tensor([pixel]) + 0.5) / factor - 0.5
    coarse = F.avg_pool2d(full_map[None], factor)
    return bool(bilinear_sample(coarse, pixel_to_normalised(place, coarse.shape[-2:])).abs().sum())


def _coarse(full_map, pixel, factor, place):
    """Whether the pooled map has a gradient at a place that is already in its pixels."""
    coarse = F.avg_pool2d(full_map[None], factor)
    height, width = coarse.shape[-2:]
    point = pixel_to_normalised(torch.tensor([place]), (height, width)).requires_grad_()
    (gradient,) = torch.autograd.grad(bilinear_sample(coarse, point).sum(), point)
    return bool(gradient.abs().sum() > 0)


def _blend(v, fx, fy):
    return (1 - fy) * ((1 - fx) * v[0, 0] + fx * v[0, 1]) + fy * ((1 - fx) * v[1, 0] + fx * v[1, 1])


def _slope(v, fraction):
    return (1 - fraction) * (v[0, 1] - v[0, 0]) + fraction * (v[1, 1] - v[1, 0])


def _from_corners(g, size):
    sides = torch.tensor([size[0], size[1]])
    return ((g + 1) / 2 * (sides - 1) + 0.5) / sides


def _evenly(count):
    return (torch.arange(count) + 0.5) / count - 0.5


def _on_edges(count):
    return torch.linspace(-0.5, 0.5, count)


def _cut_out(picture, centre, size, angle, shape, spread=_evenly, border=False):
    v, u = torch.meshgrid(spread(shape[0]) * size[1], spread(shape[1]) * size[0], indexing="ij")
    x = centre[0] + u * math.cos(angle) - v * math.sin(angle)
    y = centre[1] + u * math.sin(angle) + v * math.cos(angle)
    if border:
        x, y = x.clamp(0, picture.shape[2] - 1), y.clamp(0, picture.shape[1] - 1)
    points = pixel_to_normalised(torch.stack([x, y], -1), picture.shape[1:])
    return bilinear_sample(picture, points).permute(2, 0, 1)


def _between_centres(picture, centre, size, angle, shape):
    sides = [side - 1 for side in size]
    return _cut_out(picture, centre, sides, angle, shape, spread=_on_edges)


WRONG = {
    "sampling.1": [
        ("swapped axes", lambda v, fx, fy: _blend(v.T, fx, fy)),
        ("weights the wrong way round", lambda v, fx, fy: _blend(v, 1 - fx, 1 - fy)),
        ("nearest pixel", lambda v, fx, fy: v[round(fy), round(fx)]),
    ],
    "sampling.2": [
        ("blended with the same fraction", lambda v, fx, fy: (_slope(v, fx), _slope(v.T, fy))),
        ("left minus right", lambda v, fx, fy: (-_slope(v, fy), -_slope(v.T, fx))),
        ("y first", lambda v, fx, fy: (_slope(v.T, fx), _slope(v, fy))),
    ],
    "sampling.3": [
        (
            "no half pixels",
            lambda m, p, f: _coarse(m, p, f, (p[0] / f, p[1] / f)),
        ),
        ("the full map always", lambda m, p, f: _coarse(m, p, 1, p)),
        ("the value", _has_value),
    ],
    "sampling.4": [
        ("align_corners ignored", lambda g, size: (g + 1) / 2),
        ("sizes swapped", lambda g, size: _from_corners(g, size)),
    ],
    "sampling.5": [
        ("points on the edges", lambda *box: _cut_out(*box, spread=_on_edges)),
        ("from centre to centre", _between_centres),
        ("turned the other way", lambda p, c, s, a, shape: _cut_out(p, c, s, -a, shape)),
        ("size as (h, w)", lambda p, c, s, a, shape: _cut_out(p, c, s[::-1], a, shape)),
        ("half a pixel off", lambda p, c, *box: _cut_out(p, (c[0] + 0.5, c[1] + 0.5), *box)),
        ("the border repeated", lambda *box: _cut_out(*box, border=True)),
        ("the angle forgotten", lambda p, c, s, a, shape: _cut_out(p, c, s, 0.0, shape)),
    ],
}
