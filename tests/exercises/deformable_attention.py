"""Checkers of chapter deformable_attention, "Deformable attention on one scale"."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from deformable_detr import DeformAttn, ms_deform_attn
from deformable_detr.exercises import checks, expect


def _library(value, size, locations, weights):
    return ms_deform_attn(value, [size], locations.unsqueeze(3), weights.unsqueeze(3))


def _inputs(B, Q, M, K, D, size):
    value = torch.randn(B, size[0] * size[1], M, D)
    return value, size, torch.rand(B, Q, M, K, 2) * 1.4 - 0.2, torch.rand(B, Q, M, K)


@checks("deformable_attention.1")
def check_attention_vectorised(attention_vectorised):
    yield "one query, one head"
    inputs = _inputs(1, 1, 1, 3, 2, (4, 6))
    hint = "2 * loc - 1, align_corners=False, zeros outside; maps are (D, H, W): permute first"
    expect(attention_vectorised(*inputs), _library(*inputs), hint)
    yield "many queries and heads"
    inputs = _inputs(2, 5, 3, 4, 7, (4, 6))
    expect(attention_vectorised(*inputs), _library(*inputs), "transpose before you reshape")


@checks("deformable_attention.2")
def check_where_and_how_much(where_and_how_much):
    offsets, scores = torch.randn(2, 3, 2), torch.randn(2, 3)
    reference = torch.tensor([0.3, 0.6])
    yield "on a square map"
    locations, _ = where_and_how_much(offsets, scores, reference, (8, 8))
    expect(locations, reference + offsets / 8, "offsets are pixels: divide by the map's size")
    yield "on a map that is not square"
    locations, _ = where_and_how_much(offsets, scores, reference, (4, 10))
    expect(locations, reference + offsets / torch.tensor([10, 4]), "x by W, y by H")
    yield "each head's weights sum to one"
    _, weights = where_and_how_much(offsets, scores, reference, (4, 10))
    expect(weights, scores.softmax(1), "one softmax for each head, over its points")


@checks("deformable_attention.3")
def check_cross_attention_flops(cross_attention_flops):
    def counted(queries, pixels, C, M, K):
        with torch.device("meta"):
            module, dense = DeformAttn(C, M, K), nn.MultiheadAttention(C, M, batch_first=True)
            query, memory = torch.empty(1, queries, C), torch.empty(1, pixels, C)
        with FlopCounterMode(display=False) as first:
            module.value_proj(memory)
            for layer in (module.sampling_offsets, module.attention_weights, module.output_proj):
                layer(query)
        with FlopCounterMode(display=False) as second:
            dense(query, memory, memory)
        return first.get_total_flops(), second.get_total_flops()

    yield "self-attention: as many queries as pixels"
    sizes = (50, 50, 16, 2, 3)
    (deformable, dense), wanted = cross_attention_flops(*sizes), counted(*sizes)
    expect(deformable, wanted[0], "the deformable one first, without sampling; a layer has 2 n a b")
    expect(dense, wanted[1], "then the dense one: all heads together have C channels")
    yield "few queries, many pixels"
    sizes = (30, 700, 32, 4, 2)
    for given, wanted in zip(cross_attention_flops(*sizes), counted(*sizes), strict=True):
        expect(given, wanted, "keys and values are projected once for every pixel")


@checks("deformable_attention.4")
def check_project_last(project_last):
    def case(B, Q, M, K, D, size):
        feature = torch.randn(B, size[0] * size[1], M * D)
        locations = torch.rand(B, Q, M, K, 2) * 1.4 - 0.2
        matrices = torch.randn(2, M * D, M * D)
        return feature, size, locations, torch.rand(B, Q, M, K), *matrices

    yield "one head"
    arguments = case(2, 5, 1, 3, 4, (4, 6))
    expect(project_last(*arguments), _project_first(*arguments), atol=1e-3)
    yield "several heads"
    arguments = case(2, 5, 3, 4, 2, (4, 6))
    hint = "head m has rows m * D to (m + 1) * D of value_weight"
    expect(project_last(*arguments), _project_first(*arguments), hint, atol=1e-3)
    yield "its matrix products cost the same on a larger map"
    found = []
    for size in ((4, 6), (12, 18)):
        with FlopCounterMode(display=False) as counter:
            project_last(*case(1, 5, 3, 4, 2, size))
        found.append(counter.get_total_flops())
    expect(found[1], found[0], "no product may have H * W rows")


def _project_first(feature, size, locations, weights, value_weight, output_weight):
    value = (feature @ value_weight.T).unflatten(-1, (weights.shape[2], -1))
    return _library(value, size, locations, weights) @ output_weight.T


def _project_last(*arguments, split=None, output_transposed=True):
    feature, size, locations, weights, value_weight, output_weight = arguments
    M = weights.shape[2]
    everything = feature.unsqueeze(2).expand(-1, -1, M, -1)
    read = _library(everything, size, locations, weights).unflatten(-1, (M, -1))
    heads = torch.einsum("bqmc,mdc->bqmd", read, split(value_weight, M)).flatten(2)
    return heads @ (output_weight.T if output_transposed else output_weight)


def _rows(matrix, M):
    return matrix.unflatten(0, (M, -1))


def _every_row(matrix, M):
    return matrix.unflatten(0, (-1, M)).transpose(0, 1)


def _vectorised(value, size, locations, weights, align=False, careless=False):
    B, _, M, D = value.shape
    maps = value.permute(0, 2, 3, 1).reshape(B * M, D, *size)
    fold = (lambda x: x.reshape(B * M, -1, *x.shape[3:])) if careless else _fold
    samples = F.grid_sample(maps, 2 * fold(locations) - 1, align_corners=align)
    weighted = (samples * fold(weights)[:, None]).sum(-1)
    return weighted.reshape(B, M * D, -1).transpose(1, 2)


def _fold(x):
    return x.transpose(1, 2).flatten(0, 1)


def _flops(queries, pixels, C, M, K, values_on="pixels"):
    rows = {"pixels": pixels, "queries": queries}[values_on]
    deformable = 2 * queries * C * (3 * M * K + C) + 2 * rows * C * C
    return deformable, 2 * 2 * (queries + rows) * C * C + 4 * queries * pixels * C


WRONG = {
    "deformable_attention.1": [
        ("align_corners=True", lambda *a: _vectorised(*a, align=True)),
        ("reshape without transpose", lambda *a: _vectorised(*a, careless=True)),
        ("weights forgotten", lambda v, s, p, w: _vectorised(v, s, p, torch.ones_like(w))),
    ],
    "deformable_attention.2": [
        (
            "H and W swapped",
            lambda o, s, r, size: (r + o / torch.tensor([size[0], size[1]]), s.softmax(-1)),
        ),
        (
            "softmax over heads too",
            lambda o, s, r, size: (
                r + o / torch.tensor([size[1], size[0]]),
                s.flatten().softmax(0).view_as(s),
            ),
        ),
        ("offsets taken as normalised", lambda o, s, r, size: (r + o, s.softmax(-1))),
    ],
    "deformable_attention.3": [
        ("values projected per query", lambda *a: _flops(*a, values_on="queries")),
        ("multiply-adds counted once", lambda *a: tuple(n // 2 for n in _flops(*a))),
    ],
    "deformable_attention.4": [
        ("all pixels projected first", _project_first),
        (
            "every M-th row",
            lambda *a: _project_last(
                *a, split=lambda w, M: w.unflatten(0, (-1, M)).transpose(0, 1)
            ),
        ),
        (
            "columns instead of rows",
            lambda *a: _project_last(*a, split=lambda w, M: _rows(w.T, M)),
        ),
        (
            "output matrix not transposed",
            lambda *a: _project_last(*a, split=_rows, output_transposed=False),
        ),
    ],
}
