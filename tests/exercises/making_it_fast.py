"""Checkers of chapter making_it_fast, "Making it fast"."""

import math

import numpy as np
import torch

from deformable_detr import ms_deform_attn
from deformable_detr.exercises import checks, expect
from deformable_detr.exercises.cuda import build


@checks("making_it_fast.1")
def check_least_bytes(least_bytes):
    def wanted(B, S, Q, M, D, L, K, size):
        dtype = {2: torch.float16, 4: torch.float32}[size]
        tensors = [torch.empty(B, S, M, D, dtype=dtype), torch.empty(B, Q, M * D, dtype=dtype)]
        tensors += [torch.empty(B, Q, M, L, K, 2), torch.empty(B, Q, M, L, K)]
        return sum(x.nbytes for x in tensors)

    yield "the encoder: as many queries as tokens"
    sizes = (1, 30, 30, 2, 8, 3, 4, 2)
    expect(least_bytes(*sizes), wanted(*sizes), "locations and weights have 4 bytes, value size")
    yield "the decoder: few queries"
    sizes = (2, 70, 5, 3, 16, 2, 4, 4)
    expect(least_bytes(*sizes), wanted(*sizes), "value has S tokens, all else Q queries")


@checks("making_it_fast.2")
def check_sectors_of_a_warp(sectors_of_a_warp):
    def wanted(D, head_stride, channel_stride, size):
        places = (t // D * head_stride + t % D * channel_stride for t in range(32))
        return len({place * size // 32 for place in places})

    yield "a warp is one head"
    for strides in ((32, 1), (32 * 57, 57)):
        expect(sectors_of_a_warp(32, *strides, 4), wanted(32, *strides, 4), "32 bytes a sector")
    yield "a warp spans several heads"
    for D, strides in ((16, (16, 1)), (16, (500, 1)), (8, (8 * 57, 57))):
        expect(sectors_of_a_warp(D, *strides, 4), wanted(D, *strides, 4), "head = t // D")
    yield "half precision"
    expect(sectors_of_a_warp(32, 32, 1, 2), 2, "sectors are counted in bytes")


@checks("making_it_fast.3")
def check_thread_a_point(thread_a_point):
    run = build(thread_a_point(), "point")

    def compare(shapes, hint):
        S, Q, M, D, L, K = sum(h * w for h, w in shapes), 5, 3, 6, len(shapes), 2
        value, weights = torch.randn(1, S, M, D), torch.rand(1, Q, M, L, K)
        locations = torch.rand(1, Q, M, L, K, 2) * 1.6 - 0.3
        output, sizes = torch.zeros(2, Q, M * D), torch.tensor(shapes, dtype=torch.int32)
        more = locations.repeat(2, 1, 1, 1, 1, 1), weights.repeat(2, 1, 1, 1, 1)
        blocks = -(-weights.numel() // 32)
        run(blocks, 32, value, sizes, *more, output, S, Q, M, D, L, K)
        expect(output[1:], torch.zeros(1, Q, M * D), "threads behind the end must return")
        expect(output[:1], ms_deform_attn(value, shapes, locations, weights), hint)

    yield "one level"
    compare([(4, 7)], "every point adds its weight times the sample, for all channels")
    yield "several levels"
    compare([(4, 7), (3, 2), (1, 5)], "a level starts behind the tokens of those before")


@checks("making_it_fast.4")
def check_fixed_point_scale(fixed_point_scale):
    def wanted(limit):
        scale = 2.0**200
        while limit * scale > 2.0**62:
            scale /= 2
        return scale

    yield "sums above one"
    for largest, count in ((1.0, 1024), (3.5, 1000), (100.0, 7)):
        given = fixed_point_scale(largest, count)
        expect(given / wanted(largest * count), 1.0, "62 - ceil(log2(largest * count))")
    yield "sums below one"
    for largest, count in ((1e-6, 3), (2.0**-20, 8)):
        given = fixed_point_scale(largest, count)
        expect(given / wanted(largest * count), 1.0, "round towards plus infinity")


def _bytes(S, Q, wide):
    def least_bytes(B, _S, _Q, M, D, L, K, size):
        tokens, queries = {"S": _S, "Q": _Q}[S], {"S": _S, "Q": _Q}[Q]
        points = B * _Q * M * L * K * 3 * (4 if wide else size)
        return B * (tokens + queries) * M * D * size + points

    return least_bytes


def _sectors(heads, unit):
    def sectors(D, head_stride, channel_stride, size):
        t = np.arange(32)
        index = t // D * head_stride * heads + t % (D if heads else 32) * channel_stride
        return len(np.unique(index * (size if unit == "bytes" else 4) // 32))

    return sectors


POINT = """
__global__ void point(const float* value, const int* shapes, const float* locations,
                      const float* weights, float* output, int S, int Q, int M, int D, int L,
                      int K) {
    int p = blockIdx.x * blockDim.x + threadIdx.x;
    if (p >= Q * M * L * K) return;
    int l = p / K %% L, item = p / K / L, start = 0;
    int H = shapes[%s], W = shapes[%s];
    float x = locations[2 * p] * W - 0.5f, y = locations[2 * p + 1] * H - 0.5f;
    if (!(x > -1 && x < W && y > -1 && y < H)) return;
    int left = floorf(x), top = floorf(y);
    for (int corner = 0; corner < 4; corner++) {
        int u = left + corner %% 2, v = top + corner / 2;
        if (u < 0 || u >= W || v < 0 || v >= H) continue;
        float weight = weights[p] * (1 - fabsf(x - u)) * (1 - fabsf(y - v));
        const float* row = value + ((start + v * W + u) * M + item %% M) * D;
        for (int d = 0; d < D; d++) output[item * D + d] += weight * row[d];
    }
}
"""

WRONG = {
    "making_it_fast.1": [
        ("locations in half precision too", _bytes("S", "Q", wide=False)),
        ("output as large as value", _bytes("S", "S", wide=True)),
    ],
    "making_it_fast.2": [
        ("one head only", _sectors(heads=0, unit="bytes")),
        ("always four bytes", _sectors(heads=1, unit="floats")),
    ],
    "making_it_fast.3": [
        ("every level starts at zero", lambda: POINT % ("2 * l", "2 * l + 1")),
        ("H and W swapped", lambda: POINT % ("2 * l + 1", "2 * l")),
        (
            "no tail guard",
            lambda: POINT.replace("if (p >= Q", "if (0 && p >= Q") % ("2 * l", "2 * l + 1"),
        ),
    ],
    "making_it_fast.4": [
        ("rounded towards zero", lambda a, n: 2.0 ** (62 - int(math.log2(a * n)))),
        ("bits of a whole number", lambda a, n: 2.0 ** (62 - (math.ceil(a * n) - 1).bit_length())),
        ("the number forgotten", lambda a, n: 2.0 ** (62 - math.ceil(math.log2(a)))),
    ],
}
