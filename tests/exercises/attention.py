"""Checkers of chapter attention, "Attention"."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    expect(split_heads(crossed, M)[:, 2], crossed[..., 2 * D :], hint)


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


@checks("attention.5")
def check_placed_attention(module):
    C, M = 12, 3
    theirs = nn.MultiheadAttention(C, M, batch_first=True)
    nn.init.normal_(theirs.in_proj_bias)
    nn.init.normal_(theirs.out_proj.bias)
    ours = module(C, M)
    ours.load(theirs)
    z, z_place = torch.randn(2, 2, 4, C)
    x, x_place = torch.randn(2, 2, 7, C)
    nowhere = torch.zeros(2, 7, dtype=torch.bool)

    def compare(z_place, x_place, padding, hint):
        given = ours(z, x, z_place, x_place, padding)
        expect(given, theirs(z + z_place, x + x_place, x, key_padding_mask=padding)[0], hint)

    yield "without places and padding it is nn.MultiheadAttention"
    hint = "load: rows of in_proj_weight are U, V, W'; the biases belong to it too"
    compare(0 * z_place, 0 * x_place, nowhere, hint)
    yield "places count for queries and keys, not for values"
    hint = "U sees z + z_place, V sees x + x_place, W' sees x"
    compare(z_place, x_place, nowhere, hint)
    yield "padding is each image's own"
    padding = torch.tensor([[False] * 5 + [True] * 2, [True] + [False] * 6])
    compare(z_place, x_place, padding, "padding (B, N) masks the last axis of scores (B, M, Q, N)")
    yield "what was loaded can still be trained"
    ours(z, x, z_place, x_place, padding).sum().backward()
    expect(all(p.grad is not None for p in ours.parameters()), True, "copy into the parameters")


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


def _placed(value=lambda x, place: x, key=lambda x, place: x + place, mask=True, biases=True):
    """Attention with places whose parts are exchanged for wrong ones."""

    class PlacedAttention(nn.Module):
        def __init__(self, C, M):
            super().__init__()
            self.num_heads = M
            self.U, self.V, self.W_prime, self.W = (nn.Linear(C, C) for _ in range(4))

        def forward(self, z, x, z_place, x_place, padding):
            inputs = (z + z_place, key(x, x_place), value(x, x_place))
            layers = (self.U, self.V, self.W_prime)
            q, k, v = (
                layer(tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                for layer, tokens in zip(layers, inputs, strict=True)
            )
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            if mask:
                scores = scores.masked_fill(padding[:, None, None], -math.inf)
            return self.W((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

        def load(self, theirs):
            weights = [*theirs.in_proj_weight.chunk(3), theirs.out_proj.weight]
            given = [*theirs.in_proj_bias.chunk(3), theirs.out_proj.bias]
            for layer, weight, bias in zip(self.children(), weights, given, strict=True):
                layer.weight.data.copy_(weight)
                layer.bias.data.copy_(bias if biases else torch.zeros_like(bias))

    return PlacedAttention


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
    "attention.5": [
        ("places added to the values", _placed(value=lambda x, place: x + place)),
        ("keys without places", _placed(key=lambda x, place: x)),
        ("no mask", _placed(mask=False)),
        ("biases forgotten", _placed(biases=False)),
    ],
}
