"""Checkers of chapter attention_on_images, "What attention costs on images"."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from deformable_detr.exercises import checks, expect


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
