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
    yield "one lane per row"
    rows = np.array([96, 32, 64])
    expect(thread_offsets(3, 16, 16, rows), rows, "thread // per_row")
    yield "the last row not full"
    given = thread_offsets(5, 4, 16, np.array([64, 0]))
    expect(given, np.array([64, 68, 72, 76, 0]), "row_bytes // size threads share a row")


@checks("cuda_kernel.3")
def check_lanes_of_a_head(lanes_of_a_head):
    dtypes = {2: torch.float16, 4: torch.float32, 8: torch.float64}
    yield "16 bytes per lane"
    for D, size in ((32, 4), (32, 2), (64, 4), (128, 2)):
        macros = cuda.specialise(dtypes[size], D, 16, False, False, 80)
        expect(lanes_of_a_head(D, size)[0], macros["LANES"], "D * size / 16")
    yield "D that is no power of two"
    for D, size in ((24, 4), (40, 2), (48, 8)):
        macros = cuda.specialise(dtypes[size], D, 16, False, False, 80)
        expect(lanes_of_a_head(D, size), (macros["LANES"], macros["LANES"] * 16 - D * size))


def _dots(value, shapes, locations, grad):
    """<grad, corner> for each image's item, corner and point: (items, 4, points); a corner outside
    the map stands for the nearest pixel inside."""
    B, _, M, D = value.shape
    Q, L, K = locations.shape[1], locations.shape[3], locations.shape[4]
    found, start = torch.zeros(B, Q, M, 4, L, K), 0
    b, m = torch.arange(B)[:, None, None, None], torch.arange(M)[:, None]
    g = grad.view(B, Q, M, 1, D)
    for level, (height, width) in enumerate(shapes):
        size = torch.tensor([width, height])
        low = (
            (locations[:, :, :, level].nan_to_num() * size - 0.5).floor().long()
        )  # (B, Q, M, K, 2)
        for c in range(4):
            u = (low[..., 0] + c % 2).clamp(0, width - 1)
            v = (low[..., 1] + c // 2).clamp(0, height - 1)
            tokens = start + v * width + u
            rows = value[b, tokens, m]
            found[:, :, :, c, level] = (rows * g).sum(-1)
        start += height * width
    return found.reshape(B * Q * M, 4, L * K)


@checks("cuda_kernel.4")
def check_point_gradients(point_gradients):
    run = build(point_gradients(), "point_gradients")
    shapes, B, Q, M, D, K = [(3, 5), (2, 4)], 2, 3, 2, 4, 3
    L, S = len(shapes), sum(h * w for h, w in shapes)
    levels = torch.tensor([(h, w, s) for (h, w), s in zip(shapes, (0, 15), strict=True)])
    levels = levels.repeat_interleave(K, 0).t().int().contiguous()
    value, grad = torch.randn(B, S, M, D), torch.randn(B, Q, M * D)

    def compare(locations, hint):
        weights = torch.rand(B, Q, M, L, K, requires_grad=True)
        places = locations.clone().requires_grad_()
        ms_deform_attn(value, shapes, places, weights, backend="reference").backward(grad)
        by_place, by_weight = places.grad.nan_to_num(), weights.grad.nan_to_num()
        lost = locations.isnan().any(-1)
        by_place[lost], by_weight[lost] = 0, 0
        count = weights.numel()
        given = [torch.full((n * (count + 32),), torch.nan) for n in (2, 1)]
        for x, n in zip(given, (2, 1), strict=True):
            x[n * count :] = 7
        dots = _dots(value, shapes, locations, grad)
        more = [torch.cat([x.flatten(), x.flatten()]) for x in (locations, weights.detach(), dots)]
        run(-(-count // 32), 32, levels, *more, *given, B * Q * M, L * K)
        expect(given[1][count:], torch.full((32,), 7.0), "threads behind the end must return")
        expect(given[1][:count].view_as(weights), by_weight, "weights: " + hint, atol=1e-4)
        found = given[0][: 2 * count].view_as(places)
        expect(found[..., 0], by_place[..., 0], "x: " + hint, rtol=1e-4, atol=1e-4)
        expect(found[..., 1], by_place[..., 1], "y: " + hint, rtol=1e-4, atol=1e-4)

    yield "points inside"
    compare(torch.rand(B, Q, M, L, K, 2) * 0.3 + 0.35, "a sum over four corners")
    yield "points at borders and outside, and coordinates that are not a number"
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


INSIDE = "x > -1 && x < W && y > -1 && y < H"
SKIP = "if (u < 0 || u >= W || v < 0 || v >= H) continue;"
POINT_GRADIENTS = """
__global__ void point_gradients(const int* levels, const float* locations, const float* weights,
                                const float* dots, float* grad_locations, float* grad_weights,
                                int items, int points) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= items * points) return;
    int p = i % points, H = levels[p], W = levels[points + p];
    const float* dot = dots + i / points * 4 * points + p;
    float x = locations[2 * i] * W - 0.5f, y = locations[2 * i + 1] * H - 0.5f;
    float by_weight = 0, by_x = 0, by_y = 0;
    bool inside = x > -1 && x < W && y > -1 && y < H;
    if (!inside) x = y = 0;
    int left = floorf(x), top = floorf(y);
    for (int c = 0; inside && c < 4; c++) {
        int u = left + c % 2, v = top + c / 2;
        if (u < 0 || u >= W || v < 0 || v >= H) continue;
        float near_x = 1 - fabsf(x - u), near_y = 1 - fabsf(y - v);
        by_weight += near_x * near_y * dot[c * points];
        by_x += (c % 2 ? 1 : -1) * near_y * dot[c * points];
        by_y += (c / 2 ? 1 : -1) * near_x * dot[c * points];
    }
    grad_weights[i] = by_weight;
    grad_locations[2 * i] = weights[i] * W * by_x;
    grad_locations[2 * i + 1] = weights[i] * H * by_y;
}
"""


def _point_gradients(old, new):
    """A right answer with one thing made wrong."""
    assert old in POINT_GRADIENTS
    return lambda: POINT_GRADIENTS.replace(old, new)


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
        ("one lane per channel", lambda D, size: (min(32, D), 0)),
        ("no power of two", lambda D, size: (D * size // 16, 0)),
    ],
    "cuda_kernel.4": [
        ("pixels, not normalised coordinates", _point_gradients("weights[i] * W", "weights[i]")),
        ("W and H swapped", _point_gradients("H = levels[p], W", "W = levels[p], H")),
        ("the attention weight forgotten", _point_gradients("weights[i] * H", "H")),
        ("right and bottom swapped", _point_gradients("c % 2 ? 1", "c / 2 ? 1")),
        ("corners outside count", _point_gradients(SKIP, "")),
        ("nothing written outside", _point_gradients("x = y = 0", "return")),
        ("what is no number counts", _point_gradients(INSIDE, "!(x <= -1 || x >= W)")),
        ("no tail guard", _point_gradients("if (i >= items", "if (0 && i >= items")),
    ],
}
