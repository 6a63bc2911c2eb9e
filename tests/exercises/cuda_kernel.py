"""Checkers of chapter cuda_kernel, "A CUDA kernel you can step through"."""

import numpy as np
import torch

from deformable_detr import ms_deform_attn
from deformable_detr.exercises import checks, expect
from deformable_detr.exercises.cuda import build
from deformable_detr.ops import cuda


@checks("cuda_kernel.1")
def check_weighted_rows(weighted_rows):
    run = build(weighted_rows(), "weighted_rows")
    x, weight = torch.randn(3, 5), torch.randn(3)
    yield "as many threads as numbers"
    y = torch.zeros(3, 5)
    run(3, 5, x, weight, y, 3, 5)
    expect(y, weight[:, None] * x, "number i lies in row i / D")
    yield "more threads than numbers"
    padded = torch.full((32,), 7.0)
    run(4, 8, x, weight, padded, 3, 5)
    expect(padded[15:], torch.full((17,), 7.0), "threads behind the end must return")
    expect(padded[:15].reshape(3, 5), weight[:, None] * x, "blocks may have any size")
    run(9, 2, x, weight, padded.fill_(7), 3, 5)
    expect(padded[:15].reshape(3, 5), weight[:, None] * x, "a block is no row")


@checks("cuda_kernel.2")
def check_thread_offsets(thread_offsets):
    yield "one row"
    rows = np.array([0])
    expect(thread_offsets(8, 16, 128, rows), np.arange(8) * 16, "threads lie side by side")
    yield "several rows"
    expect(
        thread_offsets(8, 16, 64, np.array([1024, 0])),
        np.concatenate([1024 + np.arange(4) * 16, np.arange(4) * 16]),
        "each row starts at its own offset",
    )
    yield "one lane a row"
    rows = np.array([96, 32, 64])
    expect(thread_offsets(3, 16, 16, rows), rows, "thread // per_row")
    yield "the last row not full"
    given = thread_offsets(5, 4, 16, np.array([64, 0]))
    expect(given, np.array([64, 68, 72, 76, 0]), "row_bytes // size threads share a row")


@checks("cuda_kernel.3")
def check_lanes_of_a_head(lanes_of_a_head):
    dtypes = {2: torch.float16, 4: torch.float32, 8: torch.float64}
    yield "16 bytes a lane"
    for D, size in ((32, 4), (32, 2), (64, 4), (128, 2)):
        macros = cuda.specialise(dtypes[size], D, 16, False, False, 80)
        expect(lanes_of_a_head(D, size)[0], macros["LANES"], "D * size / 16")
    yield "D that is no power of two"
    for D, size in ((24, 4), (40, 2), (48, 8)):
        macros = cuda.specialise(dtypes[size], D, 16, False, False, 80)
        expect(lanes_of_a_head(D, size), (macros["LANES"], macros["LANES"] * 16 - D * size))


@checks("cuda_kernel.4")
def check_grad_weights(grad_weights):
    run = build(grad_weights(), "grad_weights")
    shapes = torch.tensor([[3, 5], [2, 4]], dtype=torch.int32)
    B, S, Q, M, D, L, K = 2, 23, 3, 2, 4, 2, 3
    value, grad = torch.randn(B, S, M, D), torch.randn(B, Q, M * D)

    def compare(locations, hint):
        weights = torch.rand(B, Q, M, L, K, requires_grad=True)
        ms_deform_attn(value, shapes, locations, weights).backward(grad)
        count = weights.numel()
        given = torch.full((count + 32,), torch.nan)
        given[count:] = 7
        more = [torch.cat([x, x[:1]]) for x in (value, locations, grad)]  # for threads too many
        run(-(-count // 32), 32, more[0], shapes, *more[1:], given, B, S, Q, M, D, L, K)
        expect(given[count:], torch.full((32,), 7.0), "threads behind the end must return")
        expect(given[:count].view_as(weights), weights.grad, hint)

    yield "points inside"
    compare(torch.rand(B, Q, M, L, K, 2) * 0.3 + 0.35, "sum over d of grad_output * sample")
    yield "points outside, and coordinates that are not a number"
    locations = torch.rand(B, Q, M, L, K, 2) * 2 - 0.5
    locations[0, 0, 0, 0, 0, 0] = torch.nan
    compare(locations, "what is outside contributes nothing")


ROWS = """
__global__ void weighted_rows(const float* x, const float* weight, float* y, int rows, int D) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    %s
    y[i] = weight[%s] * x[i];
}
"""


OUTSIDE = "if (!inside) { result[p] = 0; return; }"
SKIP = "if (u < 0 || u >= W || v < 0 || v >= H) continue;"
REPEAT = "u = u < 0 ? 0 : u < W ? u : W - 1, v = v < 0 ? 0 : v < H ? v : H - 1;"
GRAD_WEIGHTS = """
__global__ void grad_weights(const float* value, const int* shapes, const float* locations,
                             const float* grad_output, float* result, int B, int S, int Q,
                             int M, int D, int L, int K) {
    int p = blockIdx.x * blockDim.x + threadIdx.x;
    if (p >= B * Q * M * L * K) return;
    int l = p / K %% L, item = p / K / L, start = 0;
    for (int i = 0; i < l; i++) start += shapes[2 * i] * shapes[2 * i + 1];
    int H = shapes[2 * l], W = shapes[2 * l + 1];
    float x = locations[2 * p] * W - 0.5f, y = locations[2 * p + 1] * H - 0.5f, sum = 0;
    bool inside = x > -1 && x < W && y > -1 && y < H;
    %s
    for (int c = 0; c < 4; c++) {
        int u = floorf(x) + c %% 2, v = floorf(y) + c / 2;
        %s
        const float* row = value + ((item / M / Q * S + start + v * W + u) * M + item %% M) * D;
        float bilinear = (1 - fabsf(x - u)) * (1 - fabsf(y - v));
        for (int d = 0; d < D; d++) sum += bilinear * row[d] * grad_output[item * D + d];
    }
    result[p] = sum;
}
"""


def _offsets(by_row):
    def thread_offsets(count, size, row_bytes, row_offsets):
        lane = np.arange(count)
        rows = np.asarray(row_offsets)[lane // (row_bytes // size)] if by_row else row_offsets[0]
        return rows + lane * size

    return thread_offsets


def _even_offsets(count, size, row_bytes, row_offsets):
    lane, each = np.arange(count), -(-count // len(row_offsets))
    return np.asarray(row_offsets)[lane // each] + lane % each * size


WRONG = {
    "cuda_kernel.1": [
        ("no tail guard", lambda: ROWS % ("", "i / D")),
        (
            "the row and the column swapped",
            lambda: ROWS % ("if (i >= rows * D) return;", "i % rows"),
        ),
        (
            "a block a row",
            lambda: (
                ROWS
                % (
                    "int j = threadIdx.x; if (blockIdx.x >= rows || j >= D) return;"
                    "i = blockIdx.x * D + j;",
                    "i / D",
                )
            ),
        ),
        ("another kernel", lambda: "int main() {}"),
    ],
    "cuda_kernel.2": [
        ("only the first row", _offsets(by_row=False)),
        ("never back to a row's start", _offsets(by_row=True)),
        ("rows share the threads evenly", _even_offsets),
    ],
    "cuda_kernel.3": [
        ("a lane a channel", lambda D, size: (min(32, D), 0)),
        ("no power of two", lambda D, size: (D * size // 16, 0)),
    ],
    "cuda_kernel.4": [
        ("zeros", lambda: GRAD_WEIGHTS % ("inside = false;" + OUTSIDE, "")),
        ("nothing written outside", lambda: GRAD_WEIGHTS % ("if (!inside) return;", SKIP)),
        ("the border repeated", lambda: GRAD_WEIGHTS % (OUTSIDE, REPEAT)),
        ("what is no number counts", lambda: GRAD_WEIGHTS % ("", SKIP)),
        (
            "no tail guard",
            lambda: GRAD_WEIGHTS.replace("if (p >= B", "if (0 && p >= B") % (OUTSIDE, SKIP),
        ),
    ],
}
