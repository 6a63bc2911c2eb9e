"""The modules against plain float64 loops, and the library's door, the operator's too."""

import numpy as np
import pytest
import torch
import torchvision

from deformable_detr import DeformAttn, MSDeformAttn, ms_deform_attn
from tests.oracle import SHAPES, attention_by_loops, make_inputs

S = sum(height * width for height, width in SHAPES)


def test_operator_takes_shapes_as_tensor():
    value, locations, weights = make_inputs()
    expected = ms_deform_attn(value, SHAPES, locations, weights)
    assert torch.equal(ms_deform_attn(value, torch.tensor(SHAPES), locations, weights), expected)
    pairs = [tuple(pair) for pair in np.array(SHAPES)]
    assert torch.equal(ms_deform_attn(value, pairs, locations, weights), expected)


BAD_OPERATOR_INPUTS = {
    "halves of pixels": ({"shapes": [(5.0, 7), (3, 4), (1, 2)]}, ValueError, "pairs .* of ints"),
    "shapes that do not add up": (
        {"shapes": [(5, 7), (3, 4)]},
        ValueError,
        r"hold 47 tokens, but value has S=49",
    ),
    "no pairs": ({"shapes": [5, 7]}, ValueError, "L pairs"),
    "a level of no size": ({"shapes": [(5, 7), (3, 4), (0, 2)]}, ValueError, "positive ints"),
    "value without heads": ({"value": torch.ones(2, S, 10)}, ValueError, r"\(B, S, M, D\)"),
    "three coordinates": ({"locations": torch.ones(2, 3, 2, 3, 4, 3)}, ValueError, "K, 2"),
    "another batch": ({"locations": torch.ones(1, 3, 2, 3, 4, 2)}, ValueError, "B=2"),
    "weights of other points": ({"weights": torch.ones(2, 3, 2, 3, 5)}, ValueError, "weights must"),
    "integers": ({"value": torch.ones(2, S, 2, 5, dtype=torch.long)}, TypeError, "floating"),
    "float64 for one": ({"weights": torch.ones(2, 3, 2, 3, 4).double()}, TypeError, "float64 all"),
    "another device": (
        {"weights": torch.ones(2, 3, 2, 3, 4, device="meta")},
        ValueError,
        "one device",
    ),
}


@pytest.mark.parametrize("name", BAD_OPERATOR_INPUTS)
def test_operator_refuses(name):
    changed, error, message = BAD_OPERATOR_INPUTS[name]
    value, locations, weights = make_inputs(dtype=torch.float32)
    given = {"value": value, "shapes": SHAPES, "locations": locations, "weights": weights} | changed
    with pytest.raises(error, match=message) as caught:
        ms_deform_attn(given["value"], given["shapes"], given["locations"], given["weights"])
    assert "\n" not in str(caught.value)


def randomised(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return module.double()


def module_by_formula(module, query, references, features, shapes, padding_mask):
    """Eq. 3 with 4-d and 2-d references, from the module's matrices, one number at a time."""
    B, Q, C = query.shape
    M, L, K = module.num_heads, module.num_levels, module.num_points
    offsets = query @ module.sampling_offsets.weight.t() + module.sampling_offsets.bias
    offsets = offsets.reshape(B, Q, M, L, K, 2)
    scores = query @ module.attention_weights.weight.t() + module.attention_weights.bias
    value = features @ module.value_proj.weight.t() + module.value_proj.bias
    locations, weights = torch.empty_like(offsets), torch.empty(B, Q, M, L, K).double()
    for b, q, m in [(b, q, m) for b in range(B) for q in range(Q) for m in range(M)]:
        exponentials = scores[b, q, m * L * K : (m + 1) * L * K].exp()
        weights[b, q, m] = (exponentials / exponentials.sum()).reshape(L, K)
        for level, (height, width) in enumerate(shapes):
            for k in range(K):
                dx, dy = offsets[b, q, m, level, k]
                x, y, *size = references[b, q, level]
                step = (size[0] / 2 / K, size[1] / 2 / K) if size else (1 / width, 1 / height)
                locations[b, q, m, level, k, 0] = x + dx * step[0]
                locations[b, q, m, level, k, 1] = y + dy * step[1]
    value[padding_mask] = 0
    value = value.reshape(B, -1, M, C // M)
    heads = attention_by_loops(value, shapes, locations, weights)
    return heads @ module.output_proj.weight.t() + module.output_proj.bias, locations, weights


@pytest.mark.parametrize("coordinates", [2, 4])
@torch.no_grad()
def test_module_against_formula(coordinates):
    module = randomised(MSDeformAttn(12, num_levels=3, num_heads=2, num_points=4))
    query, features = torch.randn(2, 5, 12).double(), torch.randn(2, S, 12).double()
    references = torch.rand(2, 5, 3, coordinates).double()
    padding = torch.rand(2, S) < 0.2
    output, sampling = module(query, references, features, SHAPES, padding, return_sampling=True)
    expected = module_by_formula(module, query, references, features, SHAPES, padding)
    for given, wanted in zip((output, sampling.locations, sampling.weights), expected, strict=True):
        torch.testing.assert_close(given, wanted)
    assert sampling.spatial_shapes == SHAPES
    same = module(query, references, features, SHAPES, padding)
    assert torch.equal(same, output)


def test_module_starts_as_a_star_with_equal_weights():
    module = MSDeformAttn(16, num_levels=2, num_heads=8, num_points=3)
    shapes = [(6, 9), (3, 5)]
    sampling = module.sampling(torch.randn(1, 2, 16), torch.full((1, 2, 2, 2), 0.5), shapes)
    assert torch.equal(sampling.weights, torch.full((1, 2, 8, 2, 3), 1 / 6))
    for level, (height, width) in enumerate(shapes):
        pixels = (sampling.locations[0, 0, :, level] - 0.5) * torch.tensor([width, height])
        for k in range(3):  # the set of Appendix A.4, whatever the order of heads
            around = {(round(x), round(y)) for x, y in pixels[:, k].tolist()}
            n = k + 1
            square = {(x, y) for x in (-n, 0, n) for y in (-n, 0, n)} - {(0, 0)}
            assert around == square


def test_initial_points_stay_inside_the_box():
    module = MSDeformAttn(16, num_levels=1, num_heads=8, num_points=4)
    box = torch.tensor([0.4, 0.6, 0.2, 0.1]).expand(1, 1, 1, 4)
    points = module.sampling(torch.randn(1, 1, 16), box, [(9, 7)]).locations.flatten(0, -2)
    assert (points >= torch.tensor([0.3, 0.55]) - 1e-6).all()
    assert (points <= torch.tensor([0.5, 0.65]) + 1e-6).all()


def test_official_parameter_names_and_shapes():
    state = MSDeformAttn(256, 4, 8, 4).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "sampling_offsets.weight": (256, 256),
        "sampling_offsets.bias": (256,),
        "attention_weights.weight": (128, 256),
        "attention_weights.bias": (128,),
        "value_proj.weight": (256, 256),
        "value_proj.bias": (256,),
        "output_proj.weight": (256, 256),
        "output_proj.bias": (256,),
    }


@torch.no_grad()
def test_single_scale_is_one_level():
    single = randomised(DeformAttn(12, num_heads=3, num_points=2))
    many = MSDeformAttn(12, 1, 3, 2).double()
    many.load_state_dict(single.state_dict())
    query, feature = torch.randn(2, 4, 12).double(), torch.randn(2, 15, 12).double()
    references = torch.rand(2, 4, 2).double()
    torch.testing.assert_close(
        single(query, references, feature, (3, 5)),
        many(query, references.unsqueeze(2), feature, [(3, 5)]),
    )
    _, told = single(query, references, feature, (3, 5), return_sampling=True)
    assert torch.equal(single.sampling(query, references, (3, 5)).locations, told.locations)


@torch.no_grad()
def test_one_point_per_head_is_a_deformable_convolution():
    """Section 4.1: K = 1, identity value projection, weight 1; a head for each tap of a 3 x 3."""
    C, height, width = 5, 4, 6
    weight = torch.randn(7, C, 3, 3).double()
    offset = torch.randn(1, 18, height, width).double()  # torchvision: (dy, dx) for each tap
    image = torch.randn(1, C, height, width).double()
    expected = torchvision.ops.deform_conv2d(image, offset, weight, padding=1)

    value = image.flatten(2).transpose(1, 2).unsqueeze(2).expand(-1, -1, 9, -1)  # same for heads
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    centre = torch.stack([x, y], -1).reshape(-1, 1, 2)
    tap_y, tap_x = torch.meshgrid(torch.arange(3) - 1, torch.arange(3) - 1, indexing="ij")
    taps = torch.stack([tap_x, tap_y], -1).reshape(1, 9, 2)
    shift = offset.reshape(9, 2, -1).permute(2, 0, 1).flip(-1)  # (Q, M, 2) as (x, y)
    pixels = centre + taps + shift
    locations = (pixels + 0.5) / torch.tensor([width, height])
    samples = ms_deform_attn(
        value,
        [(height, width)],
        locations[None, :, :, None, None],
        torch.ones(1, height * width, 9, 1, 1).double(),
    )  # (1, Q, 9 * C)
    result = samples @ weight.permute(2, 3, 1, 0).reshape(9 * C, 7)  # the heads' W_m
    torch.testing.assert_close(result.transpose(1, 2).reshape(expected.shape), expected)


BAD_MODULE_INPUTS = {
    "3 coordinates": ({"references": torch.ones(1, 5, 2, 3)}, "2 or 4"),
    "references without levels": ({"references": torch.ones(1, 5, 2)}, "reference_points must be"),
    "references in pixels": (
        {"references": torch.ones(1, 5, 2, 2).long()},
        "reference_points must be floating, got torch.int64",
    ),
    "another width": ({"query": torch.ones(1, 5, 9)}, r"C=8\), got \(1, 5, 9\)"),
    "another number of levels": ({"shapes": [(3, 4)]}, "expected 2 levels"),
    "features of another width": ({"features": torch.ones(1, 14, 9)}, r"C=8\), got \(1, 14, 9\)"),
    "mask of another size": ({"mask": torch.zeros(1, 13).bool()}, "padding_mask must be"),
}


@pytest.mark.parametrize("name", BAD_MODULE_INPUTS)
def test_module_refuses(name):
    changed, message = BAD_MODULE_INPUTS[name]
    module = MSDeformAttn(8, num_levels=2, num_heads=2, num_points=1)
    given = {
        "query": torch.ones(1, 5, 8),
        "references": torch.rand(1, 5, 2, 2),
        "features": torch.ones(1, 14, 8),
        "shapes": [(3, 4), (1, 2)],
        "mask": None,
    } | changed
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        module(*given.values())
    assert "\n" not in str(caught.value)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="divisible"):
        MSDeformAttn(10, num_heads=4)
    with pytest.raises(ValueError, match="at least 1, got 10, 4, 0 and 4"):
        MSDeformAttn(10, num_heads=0)


@torch.no_grad()
def test_half_precision_references_are_not_rounded_further():
    module = MSDeformAttn(16, num_levels=1, num_heads=2, num_points=2).bfloat16()
    references = torch.rand(1, 50, 1, 2).bfloat16()
    sampling = module.sampling(torch.zeros(1, 50, 16).bfloat16(), references, [(160, 160)])
    star = module.sampling_offsets.bias.float().view(2, 1, 2, 2)
    expected = references.float()[:, :, None, :, None] + star / 160
    torch.testing.assert_close(sampling.locations, expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", [MSDeformAttn, DeformAttn])
def test_a_subclass_may_sample_elsewhere(kind):
    class Centred(kind):
        def sampling(self, *arguments):
            found = super().sampling(*arguments)
            found.locations.fill_(0.5)
            return found

    module = Centred(8, num_heads=2)
    query, features = torch.randn(1, 3, 8), torch.randn(1, 20, 8)
    shape, references = (4, 5), torch.rand(1, 3, 2)
    if kind is MSDeformAttn:
        module = Centred(8, 1, 2)
        shape, references = [shape], references.unsqueeze(2)
    _, sampling = module(query, references, features, shape, return_sampling=True)
    assert (sampling.locations == 0.5).all()


def test_errors_name_what_was_given():
    module = MSDeformAttn(8, 1, 2)
    query, features = torch.randn(2, 3, 8), torch.randn(2, 20, 8)
    references = torch.rand(2, 3, 1, 2)
    with pytest.raises(ValueError, match=r"input_flatten must be \(B=2, S, C=8\), got \(1, 20"):
        module(query, references, features[:1], [(4, 5)])
    with pytest.raises(TypeError, match="query and reference_points must be float64 both or"):
        module(query, references.double(), features, [(4, 5)])
    for wrong in (torch.rand(2), torch.rand(2, 3, 1, 2)):
        with pytest.raises(ValueError, match=r"reference_points must be \(B, Q, 2 or 4\), got"):
            DeformAttn(8, 2)(query, wrong, features, (4, 5))
