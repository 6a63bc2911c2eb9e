"""Checkers of chapter dat, "DAT, deformable attention as a backbone"."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from deformable_detr.exercises import checks, expect
from deformable_detr.layers.dat_attention import KeyPlaces, PositionBias


def _offset_network(width: int, groups: int, kernel: int, stride: int, s: float) -> KeyPlaces:
    """One in which no weight is zero, and offsets are not tiny."""
    network = KeyPlaces(width, groups, kernel, stride, s)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return network


def _answer(key_places, network, query):
    rest = network.num_groups, network.stride, network.offset_range
    return key_places(query, network.convolution, network.norm, network.linear, *rest)


@checks("dat.1")
def check_key_places(key_places):
    with torch.no_grad():
        for name, shape, rest, hint in (
            ("one group, on a square map", (1, 5, 5, 6), (1, 5, 1, 2.0), "GELU, tanh, s / 2 cells"),
            ("a map that is not square", (1, 4, 7, 6), (1, 5, 1, 2.0), "(y, x) comes, (x, y) goes"),
            ("groups", (1, 4, 7, 12), (3, 5, 1, 2.0), "each group's own channels, one network"),
            ("stride 2, and another range", (1, 5, 8, 12), (2, 3, 2, 5.0), "the grid's own size"),
            ("a batch", (3, 4, 6, 12), (2, 3, 1, 2.0), "groups are folded behind the batch"),
        ):
            yield name
            groups, kernel, stride, s = rest
            network = _offset_network(shape[-1], groups, kernel, stride, s)
            query = torch.randn(shape)
            expect(_answer(key_places, network, query), network(query), hint)


def _bias(table, queries, keys):
    """The library's bias for queries that are the cells of a map."""
    height, width = ((n + 1) // 2 for n in table.shape)
    module = PositionBias(1, (height, width))
    with torch.no_grad():
        module.table.copy_(table[None])
        rows, columns = queries
        return module(keys[None, None], (0, rows, rows, columns))[0]


def _cells(rows: int, columns: int) -> torch.Tensor:
    y, x = ((torch.arange(n) + 0.5) / n for n in (rows, columns))
    return torch.cartesian_prod(y, x).flip(-1)


@checks("dat.2")
def check_position_bias(position_bias):
    yield "a table that is the same from all sides"
    y, x = torch.meshgrid(torch.arange(5.0) - 2, torch.arange(5.0) - 2, indexing="ij")
    table = 10 - x.square() - y.square()
    keys = torch.rand(7, 2)
    expect(position_bias(table, _cells(3, 3), keys), _bias(table, (3, 3), keys), "(2H - 1) cells")
    yield "any table"
    table = torch.randn(5, 5)
    expect(
        position_bias(table, _cells(3, 3), keys),
        _bias(table, (3, 3), keys),
        "query minus key",
    )
    yield "a map that is not square"
    table = torch.randn(5, 9)
    expect(position_bias(table, _cells(3, 5), keys), _bias(table, (3, 5), keys), "(x, y), (H, W)")
    yield "a map larger than the table's"
    expect(position_bias(table, _cells(7, 4), keys), _bias(table, (7, 4), keys), "parts of the map")


@checks("dat.3")
def check_dat_cost(dat_cost):
    yield "stage 3 of DAT-T"
    attention, offsets = dat_cost(14, 14, 384, 5, 1)
    expect(attention, 145_108_992, "two products, and four projections where r = 1")
    expect(offsets, 27 * 196 * 384, "k * k + 2 per key and channel")
    yield "r = 2"
    attention, offsets = dat_cost(14, 14, 384, 5, 2)
    expect(attention, 79_629_312, "keys and values are projected for the keys alone")
    expect(offsets, 508_032, "a network on the keys' grid")
    yield "a map that is not square, and odd"
    keys = 3 * 4
    products = 2 * 5 * 7 * keys * 8 + 2 * 35 * 64 + 2 * keys * 64
    expect(dat_cost(5, 7, 8, 3, 2), (products, 11 * keys * 8), "each side is rounded up")


def _places(
    flip=True, squash=True, half=True, grid=True, split=True, activation=F.gelu, square=False
):
    """Key places with one thing wrong."""

    def key_places(query, convolution, norm, linear, groups, stride, s):
        B, H, W, C = query.shape
        if split:
            folded = query.unflatten(-1, (groups, C // groups)).permute(0, 3, 4, 1, 2).flatten(0, 1)
        else:
            folded = query.reshape(B * groups, H, W, C // groups).permute(0, 3, 1, 2)
        inner = norm(convolution(folded).permute(0, 2, 3, 1))
        offset = linear(activation(inner))
        offset = offset.tanh() if squash else offset
        offset = offset.flip(-1) if flip else offset
        height, width = offset.shape[1:3]
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        centres = torch.stack([x, y], -1) + 0.5
        size = torch.tensor([width, height] if grid else [W, H])
        size = size.flip(0) if square else size
        places = (centres + (s / 2 if half else s) * offset) / size
        return places.flatten(1, 2).unflatten(0, (B, groups))

    return key_places


def _wrong_bias(sign=1, flip=False, edges=False):
    def position_bias(table, queries, keys):
        differences = sign * (queries[:, None] - keys)
        differences = differences.flip(-1) if flip else differences
        return F.grid_sample(table[None, None], differences[None], align_corners=not edges)[0, 0]

    return position_bias


def _wrong_cost(projected=True, rounded=True, last=2):
    def dat_cost(H, W, C, k, r):
        keys = math.ceil(H / r) * math.ceil(W / r) if rounded else (H // r) * (W // r)
        projections = 2 * (H * W + keys) * C * C if projected else 4 * H * W * C * C
        return 2 * H * W * keys * C + projections, (k * k + last) * keys * C

    return dat_cost


WRONG = {
    "dat.1": [
        ("offsets left as (y, x)", _places(flip=False)),
        ("no tanh", _places(squash=False)),
        ("s cells, not s / 2", _places(half=False)),
        ("divided by (H, W)", _places(square=True)),
        ("divided by the map's size", _places(grid=False)),
        ("groups by reshape", _places(split=False)),
        ("ReLU", _places(activation=nn.functional.relu)),
    ],
    "dat.2": [
        ("key minus query", _wrong_bias(sign=-1)),
        ("x reads the rows", _wrong_bias(flip=True)),
        ("-1 and 1 at the table's edges", _wrong_bias(edges=True)),
    ],
    "dat.3": [
        ("keys and values projected for every pixel", _wrong_cost(projected=False)),
        ("the grid rounded down", _wrong_cost(rounded=False)),
        ("a last layer from C to C", _wrong_cost(last=384)),
    ],
}
