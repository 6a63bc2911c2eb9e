"""Checkers of chapter attention, "Attention, and what it costs on images"."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from deformable_detr.exercises import checks, expect
from deformable_detr.layers.position import sine_embedding


@checks("attention.1")
def check_masked_attention(masked_attention):
    queries, keys, values = torch.randn(2, 3), torch.randn(5, 3), torch.randn(5, 1)
    yield "without padding it is plain attention"
    plain = F.scaled_dot_product_attention(queries[None], keys[None], values[None])[0]
    hint = "divide by the root of D, softmax along the keys; nan or zeros: is the mask upside down?"
    expect(masked_attention(queries, keys, values, torch.zeros(5, dtype=torch.bool)), plain, hint)
    yield "padded keys count for nothing, and the other weights still add up to 1"
    padding = torch.tensor([False, True, False, False, True])
    left = F.scaled_dot_product_attention(
        queries[None], keys[None, ~padding], values[None, ~padding]
    )[0]
    hint = "the result must be as if these keys did not exist; mask the scores, not the weights"
    expect(masked_attention(queries, keys, values, padding), left, hint)
    ones = masked_attention(queries, keys, torch.ones(5, 1), padding)
    expect(ones, torch.ones(2, 1), "an average of ones is one")
    yield "what stands in the padding does not matter, however large"
    loud = torch.where(padding[:, None], 1e4, 1.0)
    given = masked_attention(queries, keys * loud, values * loud, padding)
    hint = "a weight that is zeroed after the softmax was in its sum already: mask the scores"
    expect(given, left, hint, atol=1e-4)


@checks("attention.2")
def check_split_heads(split_heads):
    B, N, M, D = 2, 5, 3, 4
    x = torch.arange(B * N * M * D).float().view(B, N, M * D)
    heads = split_heads(x, M)
    yield "the shape is (B, M, N, D)"
    expect(tuple(heads.shape), (B, M, N, D), "heads come before tokens")
    yield "head 1 holds channels D to 2D of every token"
    hint = "split the last axis first, move the heads after; do not do both in one reshape"
    expect(heads[0, 1, 0], x[0, 0, D : 2 * D], hint)  # first the first token, to show it
    expect(heads[:, 1], x[..., D : 2 * D], hint)
    yield "so do all heads, and heads side by side are the input again"
    for m in range(M):
        expect(heads[:, m], x[..., m * D : (m + 1) * D], hint)
    expect(torch.cat(list(heads.unbind(1)), -1), x)
    yield "a tensor that does not lie in one piece in memory works too"
    crossed = torch.randn(M * D, N, B).permute(2, 1, 0)
    expect(split_heads(crossed, M)[:, 2], crossed[..., 2 * D :], "reshape, not view")


def _code(phase: Tensor, num_features: int) -> Tensor:
    """The place code of phases (N,) in radians: (N, F)."""
    return sine_embedding(phase[:, None], num_features)


@checks("attention.3")
def check_shift_matrix(shift_matrix):
    phase = torch.linspace(0.1, 6.0, 9)

    def moved(delta, features):
        return _code(phase, features) @ shift_matrix(delta, features).T

    yield "a shift by zero changes nothing"
    expect(shift_matrix(0.0, 6), torch.eye(6), "cos 0 = 1 on the diagonal, sin 0 = 0 beside it")
    yield "two features, a quarter of a turn: sin becomes cos, cos becomes -sin"
    hint = "row 0 is (cos, sin), row 1 is (-sin, cos)"
    expect(shift_matrix(math.pi / 2, 2), torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), hint)
    yield "every pair turns by its own angle"
    hint = "pair j has the period 10000^(2j/F), so it turns by delta divided by that"
    expect(moved(0.7, 8), _code(phase + 0.7, 8), hint)
    yield "any width, forwards and backwards"
    for delta, features in ((-1.3, 6), (2.9, 128)):
        expect(moved(delta, features), _code(phase + delta, features), hint, atol=1e-4)
    yield "with it a cell attends to the next one"
    columns = 11
    step = 2 * math.pi / columns
    codes = _code((torch.arange(columns) + 0.5) * step, 16)
    scores = codes @ shift_matrix(step, 16).T @ codes.T
    expect(scores[:-1].argmax(-1), torch.arange(1, columns), "is R used for queries, as R @ code?")


@checks("attention.4")
def check_score_gradient(score_gradient):
    def by_autograd(scores, values, grad_output):
        scores = scores.clone().requires_grad_()
        (scores.softmax(0) @ values @ grad_output).backward()
        return scores.grad

    yield "two keys of equal weight"
    values, g = torch.tensor([[3.0], [1.0]]), torch.tensor([2.0])
    hint = "0.5 * 2 * (3 - 2) for the first key: its value compared with the output"
    expect(score_gradient(torch.zeros(2), values, g), torch.tensor([1.0, -1.0]), hint)
    yield "keys of different weight"
    scores = torch.tensor([0.0, math.log(3.0)])  # weights 1/4 and 3/4, output 1.5
    expected = torch.tensor([0.75, -0.75])
    hint = "1/4 * 2 * (3 - 1.5): the output is the weighted average of the values"
    expect(score_gradient(scores, values, g), expected, hint)
    yield "seven keys, as autograd does it"
    scores, values, g = torch.randn(7), torch.randn(7, 4), torch.randn(4)
    expect(score_gradient(scores, values, g), by_autograd(scores, values, g))
    yield "raising all scores together changes nothing"
    expect(score_gradient(scores, values, g).sum(), torch.tensor(0.0), "the sum must be zero")


@checks("attention_on_images.1")
def check_attention_flops(attention_flops):
    def counted(num_queries, num_keys, C, M):
        layer = nn.MultiheadAttention(C, M, batch_first=True, device="meta")
        z = torch.empty(1, num_queries, C, device="meta")
        x = torch.empty(1, num_keys, C, device="meta")
        with FlopCounterMode(display=False) as counter:
            layer(z, x, x)
        return counter.get_total_flops()

    yield "one head, as many queries as keys"
    hint = "four projections, the scores and the sum; 2 FLOPs for each multiply-add"
    expect(attention_flops(10, 10, 16, 1), 4 * 2 * 10 * 16**2 + 2 * 2 * 10**2 * 16, hint)
    yield "more keys than queries, as PyTorch counts it"
    hint = "U and W act on the queries, V and W' on the keys"
    expect(attention_flops(7, 30, 16, 1), counted(7, 30, 16, 1), hint)
    yield "the number of heads does not matter"
    hint = "M heads of width D = C / M make C channels, not M * C"
    expect(attention_flops(7, 30, 16, 4), counted(7, 30, 16, 4), hint)
    yield "DETR's decoder: 100 queries on a map of 25 x 34"
    expect(attention_flops(100, 850, 256, 8), counted(100, 850, 256, 8))


@checks("attention_on_images.2")
def check_window_mask(window_mask):
    H, W = 3, 5
    mask = window_mask(H, W, 1)

    def seen_by(i, j):
        return [divmod(token, W) for token in mask[i * W + j].nonzero().flatten().tolist()]

    yield "a cell in the middle sees nine cells"
    expect(tuple(mask.shape), (H * W, H * W), "one row and one column for each of the H * W tokens")
    expect(mask.dtype, torch.bool, "a boolean mask")
    hint = "(row, column) of the cells; True where rows and columns are both within the radius"
    expect(seen_by(1, 2), [(i, j) for i in (0, 1, 2) for j in (1, 2, 3)], hint)
    yield "the window does not wrap around at the end of a row"
    hint = "the top right cell sees itself and three others"
    expect(seen_by(0, 4), [(0, 3), (0, 4), (1, 3), (1, 4)], hint)
    yield "any map, any radius: equal to a loop"
    for H, W, radius in ((4, 3, 0), (2, 7, 2), (6, 4, 1)):
        cells = [(i, j) for i in range(H) for j in range(W)]
        near = [[max(abs(i - a), abs(j - b)) <= radius for a, b in cells] for i, j in cells]
        expect(window_mask(H, W, radius), torch.tensor(near), "token = row * W + column")


def _attention(before=None, after=None):
    """Attention on which `before` changes the scores and `after` the weights, given the mask."""

    def masked_attention(queries, keys, values, padding):
        scores = queries @ keys.T / math.sqrt(queries.shape[-1])
        if before:
            scores = before(scores, padding)
        weights = scores.softmax(-1)
        return (after(weights, padding) if after else weights) @ values

    return masked_attention


def _over_queries(queries, keys, values, padding):
    scores = (queries @ keys.T / math.sqrt(queries.shape[-1])).masked_fill(padding, -math.inf)
    return scores.softmax(0).nan_to_num() @ values


def _shift(sign=1, own_period=True, halves=False):
    def shift_matrix(delta, num_features):
        R = torch.zeros(num_features, num_features)
        half = num_features // 2
        for j in range(half):
            angle = delta / (10_000 ** (2 * j / num_features) if own_period else 1)
            sin, cos = sign * math.sin(angle), math.cos(angle)
            a, b = (j, half + j) if halves else (2 * j, 2 * j + 1)
            R[a, a], R[a, b], R[b, a], R[b, b] = cos, sin, -sin, cos
        return R

    return shift_matrix


def _plain_mean(scores, values, grad_output):
    along = values @ grad_output
    return scores.softmax(0) * (along - along.mean())


def _flops(per_multiply_add=2, scores_for_each_head=False, values_projected=True):
    def attention_flops(num_queries, num_keys, embed_dim, num_heads):
        by_keys = 2 if values_projected else 1
        projections = (2 * num_queries + by_keys * num_keys) * embed_dim**2
        heads = num_heads if scores_for_each_head else 1
        return per_multiply_add * (projections + 2 * heads * num_queries * num_keys * embed_dim)

    return attention_flops


def _keys_projected_as_queries(num_queries, num_keys, embed_dim, num_heads):
    return 8 * num_queries * embed_dim**2 + 4 * num_queries * num_keys * embed_dim


def _window(divisor=lambda H, W: W, both=True):
    def window_mask(H, W, radius):
        token = torch.arange(H * W)
        row, column = token // divisor(H, W), token % divisor(H, W)
        near_rows = (row[:, None] - row).abs() <= radius
        near_columns = (column[:, None] - column).abs() <= radius
        return near_rows & near_columns if both else near_rows | near_columns

    return window_mask


def _flat_window(H, W, radius):
    token = torch.arange(H * W)
    steps = torch.arange(-radius, radius + 1)
    offsets = (steps[:, None] * W + steps).flatten()
    return torch.isin(token - token[:, None], offsets)


WRONG = {
    "attention.1": [
        ("no mask", _attention()),
        ("a score of zero", _attention(before=lambda s, p: s.masked_fill(p, 0))),
        ("weights set to zero afterwards", _attention(after=lambda w, p: w.masked_fill(p, 0))),
        ("mask the wrong way round", _attention(before=lambda s, p: s.masked_fill(~p, -math.inf))),
        ("softmax over the queries", _over_queries),
        ("not divided", _attention(before=lambda s, p: (s * 3**0.5).masked_fill(p, -math.inf))),
    ],
    "attention.2": [
        ("one reshape", lambda x, M: x.reshape(len(x), M, x.shape[1], -1)),
        ("tokens before heads", lambda x, M: x.unflatten(-1, (M, -1))),
        ("channels dealt out in turn", lambda x, M: x.unflatten(-1, (-1, M)).permute(0, 3, 1, 2)),
    ],
    "attention.3": [
        ("turned the other way", _shift(sign=-1)),
        ("one angle for all pairs", _shift(own_period=False)),
        ("sines first, cosines after", _shift(halves=True)),
    ],
    "attention.4": [
        ("weights taken for free", lambda s, v, g: s.softmax(0) * (v @ g)),
        ("the plain mean of the values", _plain_mean),
        ("the weight forgotten", lambda s, v, g: v @ g - s.softmax(0) @ (v @ g)),
        ("the gradient by the weights", lambda s, v, g: v @ g),
    ],
    "attention_on_images.1": [
        ("a multiply-add counted once", _flops(per_multiply_add=1)),
        ("scores of full width for each head", _flops(scores_for_each_head=True)),
        ("values not projected", _flops(values_projected=False)),
        ("keys projected as often as there are queries", _keys_projected_as_queries),
    ],
    "attention_on_images.2": [
        ("distance in the flat list", _flat_window),
        ("height and width exchanged", _window(divisor=lambda H, W: H)),
        ("near in one direction is enough", _window(both=False)),
        ("True where one may not look", lambda H, W, r: ~_window()(H, W, r)),
    ],
}
