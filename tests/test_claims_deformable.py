"""What chapters deformable_convolution, deformable_attention and many_scales say in words."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from deformable_detr import DeformAttn, MSDeformAttn, ms_deform_attn
from deformable_detr.models.tokens import level_mask, token_centres, valid_ratio


def randomised(module, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return module.to(dtype)


# Deformable convolution


def test_no_linear_layer_lets_a_flag_choose_between_two_parts_of_a_picture():
    """The best 1-D convolution of picture and flag is the mean of both candidates."""
    generator = torch.Generator().manual_seed(0)
    picture = torch.randn(4000, 7, generator=generator).double()  # what lies around a place
    flag = torch.randn(4000, 1, generator=generator).double().sign()
    target = torch.where(flag > 0, picture[:, -1:], picture[:, :1])
    seen = torch.cat([picture, flag, torch.ones_like(flag)], 1)
    best = torch.linalg.lstsq(seen, target).solution[:, 0]
    expected = torch.tensor([0.5, 0, 0, 0, 0, 0, 0.5, 0, 0]).double()
    torch.testing.assert_close(best, expected, atol=0.06, rtol=0)  # 4,000 samples
    assert (seen @ best[:, None] - target).square().mean() > 0.4  # of a variance of one


def test_a_relu_lets_it():
    x, bound = torch.linspace(-4, 4, 101), 4.0
    for flag, expected in ((1.0, x), (-1.0, torch.zeros_like(x))):
        flags = torch.full_like(x, flag)
        gated = (x + bound * flags).relu() - bound * flags.relu()
        torch.testing.assert_close(gated, expected, atol=1e-6, rtol=0)


def test_the_error_on_noise_falls_for_half_of_the_pictures():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4000, 24, 40, generator=generator)
    here, right, target = noise[..., :-3], noise[..., 1:-2], noise[..., 3:]
    derivative = ((0.5 * (here + right) - target) * (right - here)).mean((1, 2))
    assert abs((derivative < 0).double().mean() - 0.5) < 0.04  # five standard deviations


# Deformable attention


def sampled_pixels(sampling, size):
    """(H * W, 1): which pixels of the first image any sample reads."""
    height, width = size
    touched = torch.zeros(size, dtype=torch.bool)
    places = sampling.locations[0].flatten(0, -2) * torch.tensor([width, height]) - 0.5
    for x, y in places.floor().long().tolist():
        touched[max(y, 0) : max(y + 2, 0), max(x, 0) : max(x + 2, 0)] = True
    return touched.flatten().unsqueeze(-1)


@torch.no_grad()
def test_what_stands_at_the_points_moves_the_output_but_neither_points_nor_weights():
    size, module = (7, 11), randomised(DeformAttn(12, 3, 4))
    query, references = torch.randn(1, 2, 12).double(), torch.rand(1, 2, 2).double()
    feature, noise = torch.randn(2, 1, 77, 12).double()
    before, sampling = module(query, references, feature, size, return_sampling=True)
    touched = sampled_pixels(sampling, size)
    assert 0 < touched.sum() < 77
    others = module(query, references, torch.where(touched, feature, noise), size)
    torch.testing.assert_close(others, before)  # sparsity
    changed = torch.where(touched, noise, feature)
    after, again = module(query, references, changed, size, return_sampling=True)
    assert (after - before).abs().max() > 0.1
    assert torch.equal(again.locations, sampling.locations)
    assert torch.equal(again.weights, sampling.weights)
    dense = randomised(nn.MultiheadAttention(12, 3, batch_first=True))
    moved = dense(query, changed, changed)[1] - dense(query, feature, feature)[1]
    assert moved.abs().max() > 0.01


@torch.no_grad()
def test_weights_are_not_linear_in_the_query_but_offsets_are():
    module = randomised(DeformAttn(12, 3, 4))
    query, zero = torch.randn(1, 1, 12).double(), torch.zeros(1, 1, 12).double()
    one, two, none = (
        module.sampling(q, torch.zeros(1, 1, 2).double(), (7, 11)) for q in (query, 2 * query, zero)
    )
    for name, linear in (("locations", True), ("weights", False)):
        first, second = (getattr(s, name) - getattr(none, name) for s in (one, two))
        assert torch.allclose(second, 2 * first) == linear


@torch.no_grad()
@pytest.mark.parametrize(("heads", "identity"), [(1, True), (1, False), (5, True)])
def test_one_point_is_a_deformable_convolution_with_one_head_and_no_value_projection(
    heads, identity
):
    C, height, width = 5, 4, 6
    module = randomised(DeformAttn(C, heads, 1))
    if identity:
        module.value_proj.weight.copy_(torch.eye(C))
        module.value_proj.bias.zero_()
    image = torch.randn(1, C, height, width).double()
    cells = image.flatten(2).transpose(1, 2)
    centres = token_centres([(height, width)], torch.ones(1, 1, 2).double())
    attended = module(cells, centres, cells, (height, width)).transpose(1, 2).view_as(image)
    offsets = F.conv2d(
        image,
        module.sampling_offsets.weight[:2].flip(0)[:, :, None, None],
        module.sampling_offsets.bias[:2].flip(0),
    )
    kernel = module.output_proj.weight[:, :, None, None]
    convolved = torchvision.ops.deform_conv2d(image, offsets, kernel, module.output_proj.bias)
    # token_centres divides in float32, so the points are known to 1e-7 of the map
    assert torch.allclose(attended, convolved, atol=1e-5) == (heads == 1 and identity)


def test_both_orders_of_work_and_weighing_first_give_the_same():
    M, D, C, size = 3, 2, 6, (4, 7)
    feature = torch.randn(2, 28, C).double()
    locations, weights = torch.rand(2, 5, M, 1, 4, 2).double(), torch.rand(2, 5, M, 1, 4).double()
    matrix = torch.randn(C, C).double()
    first = ms_deform_attn((feature @ matrix.T).view(2, 28, M, D), [size], locations, weights)
    everything = feature.unsqueeze(2).expand(-1, -1, M, -1)
    read = ms_deform_attn(everything, [size], locations, weights).view(2, 5, M, C)
    last = torch.einsum("bqmc,mdc->bqmd", read, matrix.view(M, D, C)).flatten(2)
    torch.testing.assert_close(last, first)


def test_the_papers_shortened_sum_holds_on_one_scale_and_not_on_four():
    C, M = 256, 8
    for points, small in ((4, 116), (16, 464)):
        assert 5 * points + 3 * M * points == small
        module = DeformAttn(C, M, points)
        outputs = module.sampling_offsets.out_features + module.attention_weights.out_features
        assert outputs == 3 * M * points
        assert (small < C) == (points == 4)


def test_the_decoders_cost_grows_with_the_map():
    with torch.device("meta"):
        module, query = DeformAttn(32, 4, 2), torch.empty(1, 30, 32)
        counts = []
        for side in (10, 40):
            with FlopCounterMode(display=False) as counter:
                memory = torch.empty(1, side * side, 32)
                module(query, torch.empty(1, 30, 2), memory, (side, side))
            counts.append(counter.get_total_flops())
    assert counts[1] - counts[0] >= 2 * (40**2 - 10**2) * 32**2  # the value projection alone


# Many scales


@pytest.mark.parametrize("size", [64, 96, 153, 165, 250])
@pytest.mark.parametrize("stride", [8, 16, 32])
def test_masks_round_up(size, stride):
    """Exactly where the stride divides the padded size; elsewhere at least."""
    cells = -(-size // stride)
    masks = torch.arange(size) >= torch.arange(1, size + 1)[:, None]
    valid = (~level_mask(masks[:, None], (1, cells))).sum((1, 2))
    begun = (torch.arange(1, size + 1) + stride - 1) // stride
    assert (valid >= begun).all() and (valid <= begun + 1).all()
    assert torch.equal(valid, begun) == (size % stride == 0)


@pytest.mark.parametrize("valid", range(1, 97, 5))
def test_references_drift_by_less_than_a_cell_of_the_coarser_level(valid):
    shapes, strides = [(8, 12), (4, 6), (2, 3)], (8, 16, 32)
    mask = torch.ones(1, 64, 96, dtype=torch.bool)
    mask[:, : max(1, valid * 2 // 3), :valid] = False
    ratios = torch.stack([valid_ratio(level_mask(mask, shape)) for shape in shapes], 1).double()
    references = token_centres(shapes, ratios)[:, :, None] * ratios[:, None]  # (1, S, L, 2)
    start = 0
    for own, (height, width) in enumerate(shapes):
        tokens = references[0, start : start + height * width]
        start += height * width
        inside = (tokens[:, own] < ratios[0, own]).all(-1)
        pixels = tokens[inside] * torch.tensor([96, 64])  # (N, L, 2)
        for other in range(3):
            drift = (pixels[:, other] - pixels[:, own]).abs().max()
            assert drift < max(strides[own], strides[other])
            assert other != own or drift == 0


@torch.no_grad()
def test_the_level_embedding_is_how_a_layer_knows_who_asks():
    shapes = [(5, 7), (3, 4), (2, 2)]
    module = randomised(MSDeformAttn(6, 3, 2, 4))
    content, codes = torch.randn(6).double(), torch.randn(2, 6).double()
    middle = torch.full((1, 2, 3, 2), 0.5).double()
    for code, same in ((torch.zeros_like(codes), True), (codes, False)):
        asked = module.sampling((content + code)[None], middle, shapes)
        assert torch.allclose(asked.locations[:, 0], asked.locations[:, 1]) == same
        assert torch.allclose(asked.weights[:, 0], asked.weights[:, 1]) == same


@torch.no_grad()
def test_diagonal_heads_start_further_away_by_the_root_of_two():
    module = MSDeformAttn(16, num_levels=2, num_heads=8, num_points=4)
    lengths = module.sampling_offsets.bias.view(8, 2, 4, 2).norm(dim=-1)
    steps = torch.arange(1, 5).expand(4, 2, 4)
    torch.testing.assert_close(lengths[::2], steps.float())
    torch.testing.assert_close(lengths[1::2], steps * 2**0.5)


def test_in_training_the_samples_of_every_level_are_kept():
    shapes, saved = [(5, 7), (3, 4), (2, 2)], []
    value = torch.rand(1, 51, 2, 5, requires_grad=True)
    locations, weights = torch.rand(1, 11, 2, 3, 4, 2), torch.rand(1, 11, 2, 3, 4)
    weights.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, id):
        ms_deform_attn(value, shapes, locations, weights, backend="reference")
    assert saved.count(11 * 2 * 4 * 5) == 3  # Q, M, K, D: one for each level
    saved.clear()
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(saved.append, id):
        ms_deform_attn(value, shapes, locations, weights, backend="reference")
    assert not saved
