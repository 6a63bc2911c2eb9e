"""Checkers of chapter attention_on_images, "What attention costs on images"."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
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


class Shapes(TorchDispatchMode):
    """Notes the shape of each tensor that is made."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.made.append(tuple(tensor.shape))
        return result


@checks("attention_on_images.2")
def check_attend_in_blocks(attend_in_blocks):
    queries, keys, values = torch.randn(3, 4), torch.randn(10, 4), torch.randn(10, 2)

    def plain(queries):
        return F.scaled_dot_product_attention(queries[None], keys[None], values[None])[0]

    yield "one block is plain attention"
    hint = "divide scores by the root of D, and the sum of the values by that of the exponentials"
    expect(attend_in_blocks(queries, keys, values, 10), plain(queries), hint)
    yield "many blocks give the same, also when the last is smaller"
    hint = "when the largest score grows, scale down both sums by exp(old - new)"
    for block in (5, 4, 1):
        expect(attend_in_blocks(queries, keys, values, block), plain(queries), hint)
    yield "scores in the thousands do not overflow"
    hint = "exponentials of scores minus the largest so far are never above 1"
    expect(attend_in_blocks(3000 * queries, keys, values, 4), plain(3000 * queries), hint)
    yield "no tensor holds a query's scores for all keys"
    queries, keys, values = torch.randn(64, 3), torch.randn(256, 3), torch.randn(256, 2)
    with Shapes() as shapes:
        attend_in_blocks(queries, keys, values, 16)
    largest = max(map(math.prod, shapes.made))
    hint = f"a tensor of {largest} numbers was made, and the matrix has {64 * 256}"
    expect(largest < 64 * 256 // 2, True, hint)
    rows = [shape for shape in shapes.made if 256 in shape and not {3, 2} & set(shape)]
    expect(rows, [], "for blocks of 16 keys, scores are (64, 16)")


@checks("attention_on_images.3")
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


def _all_at_once(queries, keys, values, block):
    return (queries @ keys.T / math.sqrt(queries.shape[1])).softmax(-1) @ values


def _query_by_query(queries, keys, values, block):
    return torch.cat([_all_at_once(q, keys, values, block) for q in queries.split(1)])


def _mean_of_blocks(queries, keys, values, block):
    blocks = zip(keys.split(block), values.split(block), strict=True)
    return torch.stack([_all_at_once(queries, k, v, block) for k, v in blocks]).mean(0)


def _blocks(shift=True, shrink_total=True, shrink_output=True):
    def attend_in_blocks(queries, keys, values, block):
        largest = torch.full((len(queries), 1), -math.inf if shift else 0.0)
        total, output = torch.zeros(len(queries), 1), torch.zeros(len(queries), values.shape[1])
        for k, v in zip(keys.split(block), values.split(block), strict=True):
            scores = queries @ k.T / math.sqrt(queries.shape[1])
            new = torch.maximum(largest, scores.amax(1, keepdim=True)) if shift else largest
            weights, shrink = (scores - new).exp(), (largest - new).exp()
            total = total * (shrink if shrink_total else 1) + weights.sum(1, keepdim=True)
            output = output * (shrink if shrink_output else 1) + weights @ v
            largest = new
        return output / total

    return attend_in_blocks


WRONG = {
    "attention_on_images.1": [
        ("a multiply-add counted once", _flops(per_multiply_add=1)),
        ("scores of full width for each head", _flops(scores_for_each_head=True)),
        ("values not projected", _flops(values_projected=False)),
        ("keys projected as often as there are queries", _keys_projected_as_queries),
    ],
    "attention_on_images.2": [
        ("the whole matrix after all", _all_at_once),
        ("one query after another", _query_by_query),
        ("a mean of softmaxes", _mean_of_blocks),
        ("exponentials not shifted", _blocks(shift=False)),
        ("the total not scaled down", _blocks(shrink_total=False)),
        ("the output not scaled down", _blocks(shrink_output=False)),
    ],
    "attention_on_images.3": [
        ("distance in the flat list", _flat_window),
        ("height and width exchanged", _window(divisor=lambda H, W: H)),
        ("near in one direction is enough", _window(both=False)),
        ("True where one may not look", lambda H, W, r: ~_window()(H, W, r)),
    ],
}
