"""Evidence for claims on the operation itself: modules are built, run and counted."""

import math

import torch
from claims import CONDITION, FALSE, TRUE, Finding, evidence, judge
from evidence_studies import result
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import deform_conv2d

from deformable_detr import DeformAttn, MSDeformAttn, ms_deform_attn
from deformable_detr.layers.dat_attention import KeyPlaces

C, M, K, L = 256, 8, 4, 4  # of the published models
SIZE = (5, 7)  # of a small map


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module with random numbers in all parameters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return module


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def centres(height: int, width: int) -> Tensor:
    """(1, H * W, 2), the centres of a map's cells as (x, y)."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return ((torch.stack([x, y], -1).reshape(1, -1, 2)) + 0.5) / torch.tensor([width, height])


@evidence("P2")
def small_terms() -> Finding:
    one, four = ((5 + 3 * M) * points for points in (K, L * K))
    value = f"5K + 3MK = {one} on one scale, {four} on four; C = {C}"
    return Finding(value, judge(one < C < four, CONDITION))


@evidence("P5")
def weights_start_equal() -> Finding:
    sampling = MSDeformAttn(C, L, M, K).sampling(
        normal(1, 3, C), torch.full((1, 3, L, 2), 0.5), [(8, 12)] * L
    )
    low, high = sampling.weights.min().item(), sampling.weights.max().item()
    value = f"weights of random queries: {low:.4f} to {high:.4f}; 1/LK = {1 / (L * K):.4f}"
    return Finding(value, judge(high - low < 1e-6 and abs(low * L * K - 1) < 1e-5, TRUE))


@evidence("P6")
def offsets_start_as_a_star() -> Finding:
    bias = MSDeformAttn(C, L, M, K).sampling_offsets.bias.detach().view(M, L, K, 2)
    steps = [(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1) if x or y]
    wanted = {(k * x, k * y) for x, y in steps for k in range(1, K + 1)}
    for level in range(L):
        found = {tuple(map(round, point)) for point in bias[:, level].flatten(0, 1).tolist()}
        if found != wanted:
            return Finding(f"level {level} differs", judge(False, TRUE))
    value = f"{len(wanted)} offsets on each level, the same set"
    return Finding(value, judge(torch.allclose(bias, bias.round(), atol=1e-5), TRUE))


@evidence("P7")
def points_start_inside_the_box() -> Finding:
    boxes = torch.tensor([[0.5, 0.4, 0.2, 0.5]]).expand(1, 3, 1, 4)
    sampling = MSDeformAttn(C, L, M, K).sampling(normal(1, 3, C), boxes, [(8, 12)] * L)
    away = (sampling.locations - boxes[0, 0, 0, :2]).abs() / (boxes[0, 0, 0, 2:] / 2)
    layer = result("looking")["decoder"]["layers"][-1]
    outside = 1 - layer["inside"]["all"]["own"][0]
    value = (
        f"farthest point: {away.max():.3f} of the way to the edge; of the digits' detector, after "
        f"training, {100 * outside:.0f} % of the weight lies outside"
    )
    return Finding(value, judge(away.max() < 1 + 1e-5 and outside > 0.1, TRUE))


@evidence("S3")
def is_a_deformable_convolution() -> Finding:
    """Nine heads, one for each tap of a 3 x 3 kernel, all of which read all channels."""
    height, width = SIZE
    image, kernel, moves = (
        normal(1, 3, *SIZE),
        normal(4, 3, 3, 3, seed=2),
        normal(1, 18, *SIZE, seed=3),
    )
    convolved = deform_conv2d(image, moves, kernel, padding=1)
    taps = torch.tensor([(x, y) for y in (-1, 0, 1) for x in (-1, 0, 1)])
    shift = taps + moves.reshape(9, 2, -1).permute(2, 0, 1).flip(-1)  # torchvision has (dy, dx)
    places = centres(*SIZE)[0, :, None] + shift / torch.tensor([width, height])
    value = image.flatten(2).transpose(1, 2).unsqueeze(2).expand(-1, -1, 9, -1)
    ones = torch.ones(1, height * width, 9, 1, 1)
    read = ms_deform_attn(value, [SIZE], places[None, :, :, None, None], ones)
    attended = (read @ kernel.permute(2, 3, 1, 0).reshape(27, 4)).transpose(1, 2)
    error = (attended.reshape(convolved.shape) - convolved).abs().max().item()
    text = "nine heads of one point: " + ("the same as" if error < 1e-4 else "not")
    return Finding(f"{text} a deformable 3 x 3 convolution", judge(error < 1e-4, CONDITION))


@evidence("S4")
def is_dense_attention() -> Finding:
    dense = nn.MultiheadAttention(12, 3, bias=False, batch_first=True)
    query, memory = normal(1, 4, 12), normal(1, math.prod(SIZE), 12, seed=2)
    expected, weights = dense(query, memory, memory, average_attn_weights=False)
    value = (memory @ dense.in_proj_weight[24:].T).unflatten(-1, (3, 4))
    places = centres(*SIZE)[:, None, None, None].expand(1, 4, 3, 1, -1, -1)
    read = ms_deform_attn(value, [SIZE], places, weights.transpose(1, 2).unsqueeze(3))
    handed_in = (read @ dense.out_proj.weight.T - expected).abs().max().item()
    own = weights_on_other_maps()
    text = "with the weights handed in: " + ("the same" if handed_in < 1e-4 else "not the same")
    value = f"{text}; its own weights on another map: {'unchanged' if own == 0 else 'changed'}"
    return Finding(value, judge(handed_in < 1e-4 and own == 0, CONDITION))


def weights_on_other_maps() -> float:
    """How far a module's weights move when the map is another."""
    module, query = randomised(DeformAttn(12, 3, 4)), normal(1, 4, 12)
    said = []
    for seed in (2, 3):
        memory = normal(1, math.prod(SIZE), 12, seed=seed)
        _, sampling = module(query, centres(*SIZE)[:, :4], memory, SIZE, return_sampling=True)
        said.append(sampling.weights)
    return (said[0] - said[1]).abs().max().item()


@evidence("B4")
def points_per_query() -> Finding:
    sampling = MSDeformAttn().sampling(
        normal(1, 1, C), torch.full((1, 1, L, 2), 0.5), [(8, 12)] * L
    )
    points = sampling.weights[0, 0].numel()
    value = f"{points} points per query: {M} heads, {L} levels, {K} points"
    return Finding(value, judge(points == M * L * K, FALSE))


@evidence("B5")
def offsets_are_linear() -> Finding:
    module = randomised(DeformAttn(12, 3, 4)).double()
    a, b = normal(1, 1, 12).double(), normal(1, 1, 12, seed=2).double()
    outputs = len(module.sampling_offsets.weight) + len(module.attention_weights.weight)

    def said(query: Tensor) -> tuple[Tensor, Tensor]:
        sampling = module.sampling(query, torch.zeros(1, 1, 2).double(), SIZE)
        return sampling.locations, sampling.weights

    middle, ends = said((a + b) / 2), zip(said(a), said(b), strict=True)
    gaps = [(m - (x + y) / 2).abs().max().item() for m, (x, y) in zip(middle, ends, strict=True)]
    value = (
        f"{outputs} outputs for M = 3, K = 4; half way between two queries offsets are off the "
        f"mean by {gaps[0]:.2f}, weights by {gaps[1]:.2f}"
    )
    return Finding(value, judge(outputs == 36 and gaps[0] < 1e-9 and gaps[1] > 0.01, TRUE))


@evidence("N1")
def formula_without_heads() -> Finding:
    module = randomised(DeformAttn(6, 1, 4))
    query, memory = normal(1, 3, 6), normal(1, math.prod(SIZE), 6, seed=2)
    places = centres(*SIZE)[:, :3]
    errors = []
    for plain in (False, True):
        if plain:
            for layer in (module.value_proj, module.output_proj):
                nn.init.eye_(layer.weight)
                nn.init.zeros_(layer.bias)
        with torch.no_grad():
            output, sampling = module(query, places, memory, SIZE, return_sampling=True)
            picture = memory.transpose(1, 2).unflatten(-1, SIZE)
            grid = 2 * sampling.locations[:, :, 0, 0] - 1
            read = F.grid_sample(picture, grid, align_corners=False)  # (1, C, Q, K)
            formula = (read * sampling.weights[:, None, :, 0, 0]).sum(-1).transpose(1, 2)
        errors.append((output - formula).abs().max().item())
    same = ["the same" if error < 1e-5 else "not the same" for error in errors]
    value = f"one head, any projections: {same[0]}; identities: {same[1]}"
    return Finding(value, judge(errors[1] < 1e-5 < errors[0], CONDITION))


@evidence("D1")
def offset_network() -> Finding:
    """Eq. 10's last term, by formula and counted, in the example of the third stage."""
    tokens, keys, channels, kernel = 14 * 14, 49, 384, 5
    overhead = (kernel**2 + 2) * keys * channels
    attention = 2 * tokens * keys * channels + 2 * (tokens + keys) * channels**2
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        KeyPlaces(channels, 3, kernel, 2, 2.0)(torch.zeros(1, 14, 14, channels))
    found = counter.get_total_flops() // 2  # a multiply-add is two
    value = (
        f"{overhead / 1e6:.3f} M by the formula, {found / 1e6:.3f} M counted: "
        f"{100 * overhead / (attention + overhead):.1f} % of {(attention + overhead) / 1e6:.1f} M"
    )
    return Finding(value, judge(found == overhead and round(10 * overhead / 1e6, 2) == 5.08, FALSE))


@evidence("D2")
def region_of_a_key() -> Finding:
    places = KeyPlaces(32, 1, 5, 1, 2.0)
    with torch.no_grad():
        places.linear.weight.mul_(1e6)  # tanh at its ends
        found = places(normal(1, 6, 10, 32))[0, 0]
    moved = ((found - centres(6, 10)[0]) * torch.tensor([10, 6])).abs().max().item()
    value = f"s = 2: a key moves by at most {moved:.2f} cells of its grid to each side"
    return Finding(value, judge(abs(moved - 1) < 1e-4, CONDITION))


@evidence("D3")
def weights_are_linear_projections() -> Finding:
    moved = weights_on_other_maps()
    value = f"the same queries on another map: weights differ by {moved:.1f}"
    return Finding(value, judge(moved == 0, TRUE))
