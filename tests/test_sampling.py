"""Bilinear sampling against plain loops, grid_sample and finite differences."""

import math

import pytest
import torch
import torch.nn.functional as F

from deformable_detr.layers.sampling import (
    bilinear_sample,
    normalised_to_pixel,
    pixel_to_normalised,
)


def sample_by_loop(feature_map, x, y):
    """One point of a (C, H, W) map, in plain Python and float64; zero outside."""
    channels, height, width = feature_map.shape
    px, py = x * width - 0.5, y * height - 0.5
    result = [0.0] * channels
    if not (math.isfinite(px) and math.isfinite(py)):
        return result
    for row in (math.floor(py), math.floor(py) + 1):
        for column in (math.floor(px), math.floor(px) + 1):
            if 0 <= row < height and 0 <= column < width:
                weight = (1 - abs(py - row)) * (1 - abs(px - column))
                for c in range(channels):
                    result[c] += weight * feature_map[c, row, column].item()
    return result


def test_against_loops_inside_border_outside():
    torch.manual_seed(0)
    feature_map = torch.randn(3, 4, 7, dtype=torch.float64)
    points = torch.rand(60, 2, dtype=torch.float64) * 1.6 - 0.3
    corners = [
        [0, 0],
        [1, 1],
        [0.5 / 7, 0.5 / 4],
        [6.5 / 7, 3.5 / 4],
        [-0.5 / 7, 0.5],
        [0.5, 4.5 / 4],
    ]
    hostile = [[math.nan, 0.5], [0.5, math.inf], [-math.inf, 0.5], [1e300, 0.5], [0.5, -1e30]]
    points = torch.cat([points, torch.tensor(corners + hostile, dtype=torch.float64)])
    expected = [sample_by_loop(feature_map, x, y) for x, y in points.tolist()]
    torch.testing.assert_close(
        bilinear_sample(feature_map, points), torch.tensor(expected, dtype=torch.float64)
    )


def test_against_grid_sample_with_many_axes():
    torch.manual_seed(0)
    feature_map, points = torch.randn(2, 5, 3), torch.rand(4, 6, 2) * 1.4 - 0.2
    expected = F.grid_sample(feature_map[None], 2 * points[None] - 1, align_corners=False)
    torch.testing.assert_close(bilinear_sample(feature_map, points), expected[0].permute(1, 2, 0))


def test_gradients():
    torch.manual_seed(0)
    feature_map = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    points = torch.rand(9, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(bilinear_sample, (feature_map, points))


def test_hostile_points_poison_no_gradient():
    feature_map = torch.ones(1, 3, 5, requires_grad=True)
    points = torch.tensor([[math.nan, 0.5], [math.inf, 0.5], [0.5, 0.5]], requires_grad=True)
    bilinear_sample(feature_map, points).sum().backward()
    assert feature_map.grad.isfinite().all() and points.grad.isfinite().all()
    assert feature_map.grad.sum() == 1


def test_conventions_are_inverse_and_name_the_corners():
    size = (4, 7)  # H, W
    points = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.5 / 7, 0.5 / 4]])
    pixels = normalised_to_pixel(points, size)
    torch.testing.assert_close(pixels, torch.tensor([[-0.5, -0.5], [6.5, 3.5], [0.0, 0.0]]))
    torch.testing.assert_close(pixel_to_normalised(pixels, size), points)


@pytest.mark.parametrize(
    ("feature_map", "points", "message"),
    [
        (torch.ones(3, 4), torch.ones(1, 2), r"feature_map must be \(C, H, W\), got \(3, 4\)"),
        (torch.ones(1, 3, 4), torch.ones(1, 3), r"points must be .* got \(1, 3\)"),
    ],
)
def test_wrong_shapes_are_refused(feature_map, points, message):
    with pytest.raises(ValueError, match=message):
        bilinear_sample(feature_map, points)
