"""Where a bilinear sample's slope jumps, on pixels' centres and where a map ends, every form of the
sampling takes the same one: to the right and below."""

import itertools
from functools import cache

import pytest
import torch

from deformable_detr import MSDeformAttn, ms_deform_attn
from deformable_detr.layers.sampling import bilinear_sample, pixel_to_normalised
from deformable_detr.ops import cpu
from deformable_detr.ops.reference import sample_levels
from tests.test_sampling import sample_by_loop

SIZE = 2, 8  # H, W: powers of two, so that every form finds exactly the same pixel
STEP = 2.0**-30  # a hundred-millionth of a pixel
needs_compiler = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))


def by_bilinear_sample(feature_map, points):
    return bilinear_sample(feature_map, points)


def by_sample_levels(feature_map, points):
    value = feature_map.flatten(1).t()[None, :, None]
    return sample_levels(value, [SIZE], points[None, :, None, None, None])[0, :, 0, 0, 0]


def by_operator(backend):
    def sample(feature_map, points):
        value = feature_map.flatten(1).t()[None, :, None]
        weights = points.new_ones(1, len(points), 1, 1, 1)
        return ms_deform_attn(value, [SIZE], points[None, :, None, None, None], weights, backend)[0]

    return sample


FORMS = {
    "bilinear_sample": by_bilinear_sample,
    "sample_levels": by_sample_levels,
    "gather": by_operator("gather"),
    "reference": by_operator("reference"),
    "cpu": by_operator("cpu"),
}
form = pytest.mark.parametrize(
    "form", [pytest.param(x, marks=needs_compiler) if x == "cpu" else x for x in FORMS]
)


def places():
    """Every pairing of centres (whole numbers), corners and edges (halves), and a pixel further."""
    height, width = SIZE
    rows, columns = (torch.arange(-4, 2 * n + 4) / 2 for n in (height, width))
    return torch.cartesian_prod(columns, rows)  # (x, y) in pixels


@cache
def slopes_by_loops():
    """A map, places, and there the change of each channel to the right and below: (P, 2, C)."""
    generator = torch.Generator().manual_seed(0)
    feature_map = torch.randn(3, *SIZE, generator=generator, dtype=torch.float64)
    points = pixel_to_normalised(places().double(), SIZE)
    slopes = []
    for x, y in points.tolist():
        here, *ahead = (
            sample_by_loop(feature_map, x + dx, y + dy) for dx, dy in ((0, 0), (STEP, 0), (0, STEP))
        )
        slopes.append([[(b - a) / STEP for a, b in zip(here, to, strict=True)] for to in ahead])
    return feature_map, points, torch.tensor(slopes, dtype=torch.float64)


@form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_slope_is_to_the_right_and_below(form, dtype):
    feature_map, points, expected = slopes_by_loops()
    points = points.to(dtype).requires_grad_()
    samples = FORMS[form](feature_map.to(dtype), points)
    given = [torch.autograd.grad(x.sum(), points, retain_graph=True)[0] for x in samples.unbind(-1)]
    # a whole pixel outside is outside: the slope with which the map begins is not yet there
    expected = expected.where((places() != -1).all(-1)[:, None, None], 0)
    assert expected.any(-1).all(-1).sum() > SIZE[0] * SIZE[1]
    # slopes are up to 8 pixels times a difference of normal numbers, the loops' to a millionth
    torch.testing.assert_close(torch.stack(given, -1).double(), expected, rtol=1e-5, atol=1e-5)


@form
def test_a_constant_map_has_no_slope(form):
    pixels = places()
    height, width = SIZE
    within = (pixels >= 0).all(-1) & (pixels < torch.tensor([width - 1, height - 1])).all(-1)
    points = pixel_to_normalised(pixels[within], SIZE).requires_grad_()
    FORMS[form](torch.ones(1, *SIZE), points).sum().backward()
    assert len(points) == 14 * 2 and not points.grad.any()


@form
def test_the_gradient_of_the_map_is_the_weight_of_each_pixel(form):
    points = pixel_to_normalised(places(), SIZE).double()
    feature_map = torch.zeros(1, *SIZE, dtype=torch.float64, requires_grad=True)
    FORMS[form](feature_map, points).sum().backward()
    weights = torch.zeros(SIZE, dtype=torch.float64)
    for row, column in itertools.product(*map(range, SIZE)):
        one = torch.zeros(1, *SIZE)
        one[0, row, column] = 1
        weights[row, column] = sum(sample_by_loop(one, x, y)[0] for x, y in points.tolist())
    torch.testing.assert_close(feature_map.grad[0], weights)


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_compiler), "gather"])
def test_the_initial_star_has_the_same_gradients_in_every_form(backend):
    """An encoder's queries look from their pixels' centres at those around."""
    shapes = [(2, 8), (4, 2)]
    torch.manual_seed(0)
    module = MSDeformAttn(8, num_levels=2, num_heads=4, num_points=3).double()
    centres = [
        pixel_to_normalised(torch.cartesian_prod(torch.arange(w), torch.arange(h)), (h, w))
        for h, w in shapes
    ]
    references = torch.cat(centres).double()[None, :, None].expand(-1, -1, 2, -1)
    query = torch.randn(1, 24, 8, dtype=torch.float64)
    sampling = module.sampling(query, references, shapes)
    pixels = sampling.locations[:, :, :, 0] * torch.tensor([8, 2]) - 0.5
    # cos(90 degrees) is 4e-8, so that a third of the coordinates lie just beside
    assert (pixels == pixels.round()).double().mean() > 0.3
    value = torch.randn(1, 24, 4, 2, dtype=torch.float64, requires_grad=True)
    tensors = value, sampling.locations, sampling.weights
    grad_output = torch.randn(1, 24, 8, dtype=torch.float64)

    def gradients(name):
        output = ms_deform_attn(value, shapes, *tensors[1:], name)
        wanted = *tensors, module.sampling_offsets.bias
        return torch.autograd.grad(output, wanted, grad_output, retain_graph=True)

    torch.testing.assert_close(gradients(backend), gradients("reference"), rtol=1e-9, atol=1e-9)
