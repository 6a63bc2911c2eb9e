# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # {{n}}. A CUDA kernel you can step through
#
# You will be able to
# - **write** a CUDA kernel for deformable attention, one thread per number, and run it without a GPU,
# - **look** inside one thread and read its variables,
# - **predict** how much memory a request of 32 threads fetches, and check it against a trace,
# - **split** the work into two phases, with shared memory, a barrier, a shuffle and atomic additions,
# - **read** the library's kernel, which is yours with a few additions.
#
# You should know: multi-scale deformable attention ({{chapter many_scales}}). C helps; what is needed
# is explained.
#
# {{measured}}
#
# {{map}}

# %% [markdown]
# Deformable attention fetches a few rows of numbers from computed places and sums them by weight.
# PyTorch's `grid_sample` first writes every sample to memory. In one layer of the paper's encoder that is
# 17,821 queries, 8 heads, 16 points and 32 channels of 4 bytes: 292 MB. A kernel of our own adds the samples
# up as it reads them, so it writes only the result.
#
# This chapter writes it in CUDA, the language of NVIDIA's GPUs. You need no GPU, because **CUDA C++
# is C++** with a handful of words added. Once these are supplied, your laptop's compiler builds the
# same source code.

# %% tags=["hide-input"]
import ctypes
import re
from importlib import resources

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Markdown, display
from schematics import cuda_kernel as schematics
from schematics import running_example, slider

from deformable_detr import ms_deform_attn
from deformable_detr.exercises import check
from deformable_detr.exercises.cuda import build, build_team
from deformable_detr.ops import cuda, threads

plt.style.use("book.mplstyle")
_ = torch.manual_seed(0)

# %% [markdown]
# ## {{n}}.1 A grid of threads
#
# A **kernel** is a function that many threads run at the same time. All run the same code; they
# differ only in their number, from which each works out its part of the job. Threads are grouped
# twice: some threads make a **block**, and all blocks make the **grid**.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Three drawings from left to right. A grid of blocks; one of its blocks, enlarged, has four rows of 32 threads each, its warps; one of these warps, enlarged, has 32 numbered lanes, and eight of them, 16 to 23, are filled green."}}
schematics.grid_block_warp_lane()

# %% [markdown]
# *Figure {{n}}.1. A grid has blocks, a block has threads. The hardware runs a block's threads 32 at a
# time: such a group is a **warp**, and a thread's place in it is its **lane**.*
#
# A thread finds its place in three variables: `blockIdx` is the number of its block, `threadIdx`
# its number within the block, `blockDim` how many threads a block has. (`gridDim` counts the
# blocks.) The word `__global__` marks a kernel. This one only notes each thread's place:

# %%
KERNEL = r"""
__global__ void where_am_i(int* block, int* thread, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    block[i] = blockIdx.x;
    thread[i] = threadIdx.x;
}
"""

# %% [markdown]
# A C++ compiler does not know these words, so we define them. (The `.x` is there because CUDA can
# number blocks and threads along more than one axis.)

# %%
WORDS = r"""
#include <cmath>
#define __global__
struct Place { int x; };
static Place threadIdx, blockIdx, blockDim, gridDim;
"""

# %% [markdown]
# Two loops stand in for the grid. A GPU runs threads side by side, in no order that one can rely on. So a correct
# kernel gives the same result in any order, also when the threads run one after another.

# %%
LOOPS = r"""
extern "C" void launch(int blocks, int threads, PARAMETERS) {
    blockDim.x = threads, gridDim.x = blocks;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++) CALL;
}
"""

# %% [markdown]
# `build` puts the words, the kernel and the loops into one file (with the kernel's own parameters for `PARAMETERS`,
# and a call of it for `CALL`), compiles it, and returns a function. The function takes the number of blocks, the
# number of threads per block, and the kernel's arguments. (Later sections call `build` with the kernel alone: words
# and loops like these are its defaults.)
#
# Before you run: we have ten numbers and blocks of four threads. How many blocks does that take, and
# what do the last two threads of the last block do?

# %%
run = build(KERNEL, words=WORDS, grid=LOOPS)
block, thread = torch.zeros(2, 10, dtype=torch.int32)
run(3, 4, block, thread, 10)
print("block ", *block.tolist())
print("thread", *thread.tolist())
assert block.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
assert thread.tolist() == [0, 1, 2, 3] * 2 + [0, 1]

# %% [markdown]
# It takes three blocks, which have twelve threads. Two of them find `i >= n` and return. This line
# is called the **tail guard**; without it they would write beyond the end of the arrays.

# %% [markdown]
# ## Exercise {{n}}.1  A kernel of your own
#
# *difficulty ●○○ · 10 minutes · 7 lines*
#
# Return the text of a kernel called `weighted_rows` that multiplies each row of `x`, (rows, D), by that
# row's weight and writes the result to `y`. Use one thread per number. Blocks may have any size, and
# more threads than numbers may come; those must write nothing.


# %% tags=["exercise"]
def weighted_rows():
    """void weighted_rows(const float* x, const float* weight, float* y, int rows, int D)"""
    # BEGIN SOLUTION
    return r"""
__global__ void weighted_rows(const float* x, const float* weight, float* y, int rows, int D) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= rows * D) return;
    y[i] = weight[i / D] * x[i];
}
"""
    # END SOLUTION


check("cuda_kernel.1", weighted_rows)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# There are `rows * D` threads with work. Number `i` of `x`, counted row after row, lies in row `i / D`.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# It is the kernel of section {{n}}.1 with another last line. Integer division rounds down.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# The first check launches exactly `rows * D` threads, the second launches more: the tail guard.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.2 One output by hand
#
# First we need one result that we can trust. Take one query, one head, one point, and one level of 2 by 3 pixels with
# two channels: channel 0 of a pixel is 10 · row + column, channel 1 the negative of that.

# %%
height, width = 2, 3
ramp = 10.0 * torch.arange(2)[:, None] + torch.arange(3)
value = torch.stack([ramp, -ramp], -1).reshape(1, height * width, 1, 2)  # (B, S, M, D)
location = torch.tensor([0.6, 0.4]).reshape(1, 1, 1, 1, 1, 2)  # (B, Q, M, L, K, 2)
weight = torch.tensor(0.5).reshape(1, 1, 1, 1, 1)  # (B, Q, M, L, K)

# %% [markdown]
# Before you run, with a pencil: in pixels the point is at x = 0.6 · 3 − 0.5 = 1.3 and y = 0.4 · 2 − 0.5 = 0.3.
# Channel 0 is linear, so its sample is 10 · 0.3 + 1.3 = 4.3. What is the output, with a weight of 0.5?

# %%
output = ms_deform_attn(value, [(height, width)], location, weight)
print([round(x, 3) for x in output.flatten().tolist()])
assert torch.allclose(output.flatten(), torch.tensor([2.15, -2.15]))

# %% [markdown]
# ## {{n}}.3 One thread per number
#
# The first kernel, like the official one of {cite}`zhu2021deformable`, gives each of the B · Q · M
# · D output numbers a thread. The thread takes its number `i` apart into channel `d`, head `m` and
# image `b`; `item` counts images, queries and heads together. Then it walks over levels, points,
# and the four pixels around each point. To C an array is one long row of numbers: channel d of head
# m of a token is in `value` at (token · M + m) · D + d.

# %%
NAIVE = r"""
__global__ void naive(const float* value, const int* shapes, const float* locations,
                      const float* weights, float* output, int B, int S, int Q, int M, int D,
                      int L, int K) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= B * Q * M * D) return;
    int d = i % D;
    int item = i / D;  // (b * Q + q) * M + m
    int m = item % M;
    int b = item / M / Q;
    float sum = 0;
    int start = 0;
    for (int l = 0; l < L; l++) {
        int H = shapes[2 * l];
        int W = shapes[2 * l + 1];
        for (int k = 0; k < K; k++) {
            int p = (item * L + l) * K + k;
            float x = locations[2 * p] * W - 0.5f;
            float y = locations[2 * p + 1] * H - 0.5f;
            float attention = weights[p];
            if (!(x > -1 && x < W && y > -1 && y < H)) continue;
            int left = floorf(x);
            int top = floorf(y);
            for (int corner = 0; corner < 4; corner++) {
                int u = left + corner % 2;
                int v = top + corner / 2;
                if (u < 0 || u >= W || v < 0 || v >= H) continue;
                float bilinear = (1 - fabsf(x - u)) * (1 - fabsf(y - v));
                int token = b * S + start + v * W + u;
                sum += attention * bilinear * value[(token * M + m) * D + d];
            }
        }
        start += H * W;
    }
    output[i] = sum;
}
"""

# %% [markdown]
# The line with `continue` skips points outside. It compares with −1, not 0, because a point less than one pixel
# outside still has neighbours inside. And it says "not inside" in place of "outside" because every comparison with
# NaN (not a number) is false: `x <= -1` would let a NaN through, `!(x > -1)` does not.


# %%
def run_naive(kernel, value, shapes, locations, weights, threads=32):
    """The arguments of ms_deform_attn, and threads per block; returns (B, Q, M * D)."""
    B, S, M, D = value.shape
    _, Q, _, L, K, _ = locations.shape
    output = torch.zeros(B, Q, M * D)
    sizes = torch.tensor(shapes, dtype=torch.int32)
    blocks = -(-output.numel() // threads)  # rounded up
    kernel(blocks, threads, value, sizes, locations, weights, output, B, S, Q, M, D, L, K)
    return output


naive = build(NAIVE)
by_thread = run_naive(naive, value, [(height, width)], location, weight)
print([round(x, 3) for x in by_thread.flatten().tolist()])
assert torch.allclose(by_thread, output)

# %% [markdown]
# The kernel agrees with the pencil. And with the library when all sizes differ, some points lie
# outside, and blocks have 1, 32 or 50 threads?

# %%
shapes, B, Q, M, D, K = [(5, 7), (3, 4), (1, 2)], 2, 5, 7, 6, 4
S, L = sum(h * w for h, w in shapes), len(shapes)
value = torch.randn(B, S, M, D)
locations = torch.rand(B, Q, M, L, K, 2) * 1.4 - 0.2
weights = torch.rand(B, Q, M, L * K).softmax(-1).view(B, Q, M, L, K)
expected = ms_deform_attn(value, shapes, locations, weights)
for number in (1, 32, 50):
    result = run_naive(naive, value, shapes, locations, weights, number)
    torch.testing.assert_close(result, expected)
print(B * Q * M * D, "numbers, equal for blocks of 1, 32 and 50 threads")

# %% [markdown]
# Such a kernel can also rotate a picture, which is a map with three channels. Each pixel of a turned and
# magnified grid becomes a query with one point (code folded):

# %% tags=["hide-input"]
picture = torch.from_numpy(running_example() / 255).float()  # (128, 128, 3)
rows, columns = torch.meshgrid(torch.arange(96) - 48, torch.arange(80) - 40, indexing="ij")
turned = torch.stack([0.9 * columns - 0.4 * rows, 0.4 * columns + 0.9 * rows], -1) / 1.5
places = ((torch.tensor([64.0, 96.0]) + turned) / 128).reshape(1, -1, 1, 1, 1, 2)
ones = torch.ones(places.shape[:-1])
drawn = run_naive(naive, picture.reshape(1, -1, 1, 3), [(128, 128)], places, ones)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Left, the photograph of wood with a green seven, and on it an orange frame, turned. Right, what lies in the frame, enlarged: the seven leans to the left, and a corner that lay outside the photograph is black."}}
schematics.turned_picture(
    picture, places.reshape(96, 80, 2) * 128, drawn.reshape(96, 80, 3).clip(0, 1)
)

# %% [markdown]
# *Figure {{n}}.2. The naive kernel at work on the running example, with its queries in the orange frame. Outside
# the map it reads zeros, so one corner is black.*

# %% [markdown]
# ## {{n}}.4 Look inside a thread
#
# NVIDIA's debugger, `cuda-gdb`, stops one thread of thousands and shows its variables. We get the
# same list without stopping, by one more word: `WATCH(x)` notes name and value of `x`, but only in
# the thread that is being watched. (`ctypes` then reads the notes from the compiled library.)

# %%
NOTEBOOK = r"""
extern "C" { int watched = -1, notes = 0; const char* names[4096]; double values[4096]; }
static int me() { return blockIdx.x * blockDim.x + threadIdx.x; }
#define WATCH(x) if (me() == watched && notes < 4096) { names[notes] = #x; values[notes++] = x; }
"""


def watch(kernel):
    """The kernel with a WATCH behind every definition that has a line of its own."""
    line = r"^( +(?:int|float) (\w+) = [^;]+;)"
    return re.sub(line, r"\1 WATCH(\2)", kernel, flags=re.M)


# %% [markdown]
# Before you run: which image, query, head and channel belong to thread 303 of the 420 in our last comparison? Divide
# as the kernel does, with D = 6, M = 7 and Q = 5.

# %%
watched = build(watch(NAIVE), words=WORDS + NOTEBOOK)
library = watched.library
ctypes.c_int.in_dll(library, "watched").value = 303
run_naive(watched, value, shapes, locations, weights)
notes = ctypes.c_int.in_dll(library, "notes").value
names = (ctypes.c_char_p * 4096).in_dll(library, "names")[:notes]
values = (ctypes.c_double * 4096).in_dll(library, "values")[:notes]
steps = [(name.decode(), value) for name, value in zip(names, values, strict=True)]
for name, number in steps[:20]:
    print(f"{name:>9} = {number:g}" if number == int(number) else f"{name:>9} = {number:.3f}")
assert steps[1:5] == [("d", 3), ("item", 50), ("m", 1), ("b", 1)]
assert abs(sum(n for name, n in steps if name == "attention") - 1) < 1e-5  # all points visited

# %% [markdown]
# It is channel 3 of head 1, and item 50 is query 2 of image 1. The first point's x of −1.009 is more than a
# pixel outside, so it is skipped. The second point, p = 601, counts, and its corners follow.

# %% [markdown]
# ## {{n}}.5 Who reads which address
#
# The naive kernel is right. What does it cost? A GPU runs the 32 lanes of a warp together. When they reach a line
# that reads memory, their 32 addresses go out as one **request**. Memory does not send single numbers: it sends
# **sectors** of 32 bytes, eight floats. So lanes that read neighbouring numbers share a sector, while lanes that
# read far apart need one each.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Strips of memory in frames of eight cells. Above, channels last: four neighbouring frames are filled completely. Below, channels first: of each frame that is fetched, only a single cell is filled; six of 32 such frames are drawn."}}
schematics.two_layouts()

# %% [markdown]
# *Figure {{n}}.3. One request of a warp whose lanes read the 32 channels of one pixel, for two layouts of
# `value`. The numbers asked for are the same; what memory has to fetch is not.*
#
# A small simulator counts the sectors. It needs the 32 addresses, and how many bytes each lane reads:


# %%
def sectors(addresses, size=4):
    """How many sectors of 32 bytes one request fetches; addresses: of each lane, in bytes."""
    first, last = addresses // 32, (addresses + size - 1) // 32
    return len(np.unique(np.concatenate([first, last])))


# %% [markdown]
# In the paper's detector a head has 32 channels, so a warp of the naive kernel is one head, and each lane
# a channel. `grid_sample` wants the other layout, (B, M, D, S). An index is the same text in C and in
# Python, so `eval` works it out for 32 lanes at once.
#
# Before you run: how many sectors will one request fetch from each layout?

# %%
shapes, B, Q, M, D, K = [(6, 8), (3, 4)], 1, 2, 4, 32, 8
S, L = sum(h * w for h, w in shapes), len(shapes)
token, lane = 11, np.arange(32)
LAYOUTS = {
    "channels last": "(token * M + m) * D + d",
    "channels first": "(m * D + d) * S + token",
}
predicted = {
    name: sectors(4 * eval(index, {"token": token, "m": 0, "d": lane, "M": M, "D": D, "S": S}))
    for name, index in LAYOUTS.items()
}
print(predicted)
assert predicted == {"channels last": 4, "channels first": 32}

# %% [markdown]
# Move the slider to see what lies between the two. With a stride of 1, lanes read neighbours; from a
# stride of 8 on, no two lanes share a sector.

# %% tags=["hide-input"] mystnb={"image": {"alt": "64 sectors of eight cells each in a grid. With a stride of 3, every third cell of the first 12 sectors is filled, and 33 per cent of the bytes fetched are used."}}
# NBVAL_IGNORE_OUTPUT
slider(schematics.stride_and_sectors, stride=(1, 16, 3))

# %% [markdown]
# *Figure {{n}}.4. One request of 32 lanes, lane t reading number t · stride. Orange: the numbers read.
# Green frames: the sectors that memory fetches for them.*
#
# So channels first would fetch eight times as many sectors, 1024 bytes for every 128 that are used. This is why
# the library keeps `value` channels last.
#
# The reads of shapes, locations and weights show another waste. Their index in the kernel does not contain d, so
# all 32 lanes read the same number. That costs only one sector per request. But then all lanes compute the same
# x, y, corners and weights from it: 31 times too often. (A folded cell makes random inputs for the next section.)

# %% tags=["hide-input"]
value = torch.randn(B, S, M, D)
locations = torch.rand(B, Q, M, L, K, 2) * 0.6 + 0.2
weights = torch.rand(B, Q, M, L * K).softmax(-1).view(B, Q, M, L, K)
expected = ms_deform_attn(value, shapes, locations, weights)
torch.testing.assert_close(run_naive(naive, value, shapes, locations, weights), expected)

# %% [markdown]
# ## {{n}}.6 Two phases
#
# The waste ends if lanes share their results. From here on, eight lanes of a warp work together on one head (the
# green ones in Figure {{n}}.1). Within the head we number them 0 to 7. They work in two phases. First
# each lane takes some of the **points**, finds their corners and weights, and puts them where the others can read
# them. Then each lane takes some of the **channels**, and runs over all points.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Left, phase 1: sixteen points in two rows of eight under lanes 0 to 7. Middle: a box, shared memory, which holds 16 times 4 offsets and weights, on a vertical red line, the barrier. Right, phase 2: rows of 32 channels under the same lanes 0 to 7, four channels for each."}}
schematics.two_phases()

# %% [markdown]
# *Figure {{n}}.5. Eight lanes of one head. What a lane is responsible for changes between the phases:
# first points, then channels.*
#
# Two new words are needed. `__shared__` declares an array that all threads of a block see; on a GPU it lies in a
# small, fast memory. `__syncwarp()` is a **barrier**: a thread that comes to it waits until all threads of its warp
# are there. Without it a lane could read a corner that another lane has not written yet. (`__device__` marks
# functions that kernels call. Three notations of C++ are new as well: `a ? b : c` is Python's `b if a else c`;
# `Corners&` passes an object without copying it; `float sum[VECTOR] = {}` is an array of zeros.)
#
# Threads that wait for each other cannot run one after another. `build_team` therefore makes every CUDA thread a
# thread of the operating system, and `__syncwarp()` a C++ `std::barrier`.
#
# A GPU kernel is compiled for the sizes it will meet, because constants make better code. They are written in
# capitals: `D` channels per head, `POINTS` (= L · K) points, `LANES` lanes per head, and `VECTOR` channels that a
# lane loads at once. Four floats are 16 bytes, the most that one instruction loads on most GPUs.

# %%
SIZES = f"""
constexpr int D = {D}, POINTS = {L * K}, LANES = 8, VECTOR = 4;
"""

# %% [markdown]
# **Phase 1.** A `Corners` holds, for corner c of point p, where its first channel lies and its weight: bilinear times
# attention. A corner outside the map gets weight zero and the offset 0, which exists, so phase 2 need not test for
# it. To keep the code short, the caller tells each point its level: `levels`, (3, points), has the rows H, W and
# start, the number of tokens in the levels before. `stride` is how far apart two tokens lie, M · D numbers.

# %%
PHASE_1 = r"""
struct Corners {
    int offset[4][POINTS];
    float weight[4][POINTS];
};

__device__ void find_corners(const int* levels, const float* locations, const float* weights,
                             int stride, int lane, Corners& corners) {
    for (int p = lane; p < POINTS; p += LANES) {
        int H = levels[p], W = levels[POINTS + p], start = levels[2 * POINTS + p];
        float x = locations[2 * p] * W - 0.5f, y = locations[2 * p + 1] * H - 0.5f;
        bool inside = x > -1 && x < W && y > -1 && y < H;
        int left = inside ? floorf(x) : 0, top = inside ? floorf(y) : 0;
        for (int c = 0; c < 4; c++) {
            int u = left + c % 2, v = top + c / 2;
            bool exists = inside && u >= 0 && u < W && v >= 0 && v < H;
            float bilinear = (1 - fabsf(x - u)) * (1 - fabsf(y - v));
            corners.offset[c][p] = exists ? (start + v * W + u) * stride : 0;
            corners.weight[c][p] = exists ? weights[p] * bilinear : 0;
        }
    }
}
"""

# %% [markdown]
# **Phase 2** is only loads, multiplications and additions. The `VECTOR` sums stay in registers, the
# processor's fastest memory, until the last point.

# %%
PHASE_2 = r"""
__device__ void sum_channels(const float* value, const Corners& corners, int lane, float* output) {
    int first = lane * VECTOR;
    float sum[VECTOR] = {};
    for (int p = 0; p < POINTS; p++)
        for (int c = 0; c < 4; c++) {
            const float* row = value + corners.offset[c][p] + first;
            for (int i = 0; i < VECTOR; i++) sum[i] += corners.weight[c][p] * row[i];
        }
    for (int i = 0; i < VECTOR; i++) output[first + i] = sum[i];
}
"""

# %% [markdown]
# **The kernel** gives each head a block of eight threads. It finds where the head's numbers begin, and puts the
# barrier between the phases.

# %%
FORWARD = r"""
__global__ void forward(const float* value, const int* levels, const float* locations,
                        const float* weights, float* output, int S, int Q, int M) {
    __shared__ Corners corners;
    int item = blockIdx.x, lane = threadIdx.x;  // item = (b * Q + q) * M + m
    int b = item / M / Q, m = item % M;
    const float* own = value + (b * S * M + m) * D;  // this head's channels of token 0
    find_corners(levels, locations + item * POINTS * 2, weights + item * POINTS, M * D, lane, corners);
    __syncwarp();
    sum_channels(own, corners, lane, output + item * D);
}
"""

# %%
levels = torch.tensor([(h, w, s) for (h, w), s in zip(shapes, (0, 48), strict=True)])
levels = levels.repeat_interleave(K, 0).t().int().contiguous()  # (3, POINTS)
TWO_PHASES = SIZES + PHASE_1 + PHASE_2 + FORWARD


def run_forward(kernel):
    """The kernel on our value, locations and weights; returns (B, Q, M * D)."""
    output = torch.zeros(B, Q, M * D)
    kernel(B * Q * M, 8, value, levels, locations, weights, output, S, Q, M)
    return output


two_phases = build_team(TWO_PHASES)
torch.testing.assert_close(run_forward(two_phases), expected)
print(B * Q * M, "heads with 8 lanes each: equal to the library")

# %% [markdown]
# Is the barrier needed? `WITHOUT` makes `__syncwarp()` do nothing, and the lanes run in order, 0 to
# 7. Lane 0 then sums before lanes 1 to 7 have found their points.
#
# Before you run: is there a lane whose channels still come out right?

# %%
WITHOUT = WORDS + "#define __device__ static\n#define __shared__ static\n#define __syncwarp()\n"
careless = build(TWO_PHASES, words=WITHOUT)
wrong = (run_forward(careless) - expected).abs().view(Q * M, 8, 4).amax((0, 2)) > 1e-5
for lane, bad in enumerate(wrong.tolist()):
    print(f"lane {lane}:", "wrong" if bad else "right")
assert wrong.tolist() == [True] * 7 + [False]

# %% [markdown]
# Only the last lane is right, because all others had finished before it started. On a GPU such a mistake is nastier:
# lanes often happen to run together, so the kernel can pass its tests and still fail later.
#
# How does it read memory? A block of eight threads fills only a quarter of a warp, so the library puts several heads into
# one block (a head's number then is `threadIdx.y`). A warp works on four heads at once, and each lane reads 16 bytes.
#
# Before you run: how many sectors does one request fetch now, and how many requests does a head need?

# %%
lane = np.arange(32)
wide = 4 * ((token * M + lane // 8) * D + lane % 8 * 4)  # four heads of one token
naive_requests, wide_requests = 4 * L * K, 4 * L * K // 4  # per head; four heads share one
print("naive:     ", predicted["channels last"], "sectors,", naive_requests, "requests per head")
print("two phases:", sectors(wide, size=16), "sectors,", wide_requests, "requests per head")
assert sectors(wide, size=16) == 16 and wide_requests == 16

# %% [markdown]
# Per head both fetch the same bytes. But the two-phase kernel needs a quarter of the requests, and it computes each
# point's position once instead of 32 times.

# %% [markdown]
# ## Exercise {{n}}.2  Where wide loads start
#
# *difficulty ●●○ · 10 minutes · 3 lines*
#
# The last cell had four heads of one token. In general the rows that a warp reads lie anywhere. Return
# the byte offset at which each of `count` threads starts to read. Each thread reads `size` bytes, rows
# have `row_bytes` bytes, and row r begins at `row_offsets[r]`. Thread 0 begins row 0, and as soon as a
# row is full, the next thread begins the next row; the last row need not become full.


# %% tags=["exercise"]
def thread_offsets(count, size, row_bytes, row_offsets):
    """Returns (count,) integers, a numpy array."""
    # BEGIN SOLUTION
    thread = np.arange(count)
    per_row = row_bytes // size
    return np.asarray(row_offsets)[thread // per_row] + thread % per_row * size
    # END SOLUTION


check("cuda_kernel.2", thread_offsets)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `row_bytes // size` threads share a row. With rows of 128 bytes and 16 bytes per thread, threads 0 to 7
# read row 0.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Which row: `thread // per_row`. Where in it: `thread % per_row`, times the size.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# The first check has one row. With several, each starts at its own offset, not behind the last one.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## Exercise {{n}}.3  How many lanes?
#
# *difficulty ●●○ · 10 minutes · 4 lines*
#
# Not every head has 32 channels. The number of lanes must be a power of two, so that whole heads fill a
# warp. Given heads of D channels of `size` bytes each, return the smallest number of lanes that holds a
# head at 16 bytes per lane, and how many bytes' worth of lanes stay idle. (D · size is a multiple of 16,
# and 32 lanes are enough.)


# %% tags=["exercise"]
def lanes_of_a_head(D, size):
    """Returns (lanes, idle bytes)."""
    # BEGIN SOLUTION
    lanes = 1
    while lanes * 16 < D * size:
        lanes *= 2
    return lanes, lanes * 16 - D * size
    # END SOLUTION


check("cuda_kernel.3", lanes_of_a_head)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# A head has `D * size` bytes. Double the number of lanes until they hold as much.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# D = 24 floats are 96 bytes. Six lanes would do; eight is the next power of two, with 32 bytes idle.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# `D * size // 16` is right where it is a power of two. Where it is not, round up to one.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.7 Backward
#
# Training minimises a loss $\mathcal L$, one number that depends on the output. Autograd hands the kernel
# $g = \partial \mathcal L / \partial\,\text{output}$, D numbers per head, and wants the derivatives of the
# same loss with respect to the three inputs.
#
# A head's output is $\sum_p a_p \sum_c b_{pc} v_{pc}$, over points p and corners c: attention weight $a$, bilinear
# weight $b$, the corner's channels $v$. Differentiating it gives, for one point (its index p is left out;
# $\langle g, v\rangle$ is the sum of products over the D channels),
#
# $$\frac{\partial \mathcal L}{\partial a} = \sum_c b_c \langle g, v_c\rangle, \qquad
# \frac{\partial \mathcal L}{\partial x} = a\, W \sum_c \frac{\partial b_c}{\partial x_\text{px}}
# \langle g, v_c\rangle, \qquad
# \frac{\partial \mathcal L}{\partial v_c} \mathrel{+}= a\, b_c\, g .$$
#
# The factor W is the chain rule at work. The kernel is given the normalised coordinate x, but the
# bilinear weight depends on pixels, $x_\text{px} = x W - 0.5$, so a small step of x moves the pixel
# coordinate W times as far. And $\partial b_c / \partial x_\text{px}$ is easy: $b_c$ is a nearness
# in x times one in y, so the slope is the nearness in y, with a plus for right corners and a minus
# for left ones. (For y: the same with H.)
#
# So a point needs four inner products $\langle g, v_c\rangle$, from which the first two gradients follow, and four
# additions to `value`'s gradient.
#
# **An inner product runs over channels, and these lie in different lanes.** In a **shuffle** each lane reads what
# another one holds in a register: `__shfl_xor_sync(mask, x, step)` returns the `x` of the lane whose number differs
# in the bit `step`. (The mask says which lanes take part. Ours has all 32 bits set: every lane there is.) Three
# shuffles sum eight lanes. In the figure these hold 0 to 7. Each adds what lane `i ^ 4` holds, then `i ^ 2`, then
# `i ^ 1`. (`^` flips bits; for example, 5 ^ 4 = 1.)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Four rows of eight boxes. The first holds 0 to 7. Arrows lead from each box to the one below and to a partner four, then two, then one place away. The second row holds 4, 6, 8, 10 twice, the third 12 and 16 in turn, the last 28 in all boxes."}}
schematics.shuffle()
held = np.arange(8)
for step in (4, 2, 1):
    held = held + held[np.arange(8) ^ step]
assert (held == 28).all()

# %% [markdown]
# *Figure {{n}}.6. Eight lanes sum what they hold in three shuffles. In the end each lane has the whole
# sum, 28.*
#
# **Many queries read the same pixel, so many threads add to the same number.** An addition to memory has three
# steps: read, add, write. If two threads both read before either writes, one addition is lost. An **atomic**
# addition cannot be interrupted in between. With these two words (`build_team` knows them, too) the backward kernel is short:

# %%
BACKWARD = r"""
__device__ float sum_over_lanes(float x) {
    for (int step = LANES / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffff, x, step);
    return x;
}

__global__ void backward(const float* value, const int* levels, const float* locations,
                         const float* weights, const float* grad_output, float* grad_value,
                         float* dots, int S, int Q, int M) {
    __shared__ Corners corners;
    int item = blockIdx.x, lane = threadIdx.x;
    int own = (item / M / Q * S * M + item % M) * D + lane * VECTOR;
    const float* g = grad_output + item * D + lane * VECTOR;
    find_corners(levels, locations + item * POINTS * 2, weights + item * POINTS, M * D, lane, corners);
    __syncwarp();
    for (int p = 0; p < POINTS; p++)
        for (int c = 0; c < 4; c++) {
            int place = own + corners.offset[c][p];
            float product = 0;
            for (int i = 0; i < VECTOR; i++) {
                product += g[i] * value[place + i];
                atomicAdd(grad_value + place + i, corners.weight[c][p] * g[i]);
            }
            product = sum_over_lanes(product);
            if (lane == 0) dots[(item * 4 + c) * POINTS + p] = product;
        }
}
"""

# %% [markdown]
# The judge is autograd, applied to the plain PyTorch form of the operator.

# %%
leaves = [x.clone().requires_grad_() for x in (value, locations, weights)]
by_torch = ms_deform_attn(leaves[0], shapes, *leaves[1:], backend="reference")
grad_output = torch.randn(B, Q, M * D)
by_torch.backward(grad_output)

grad_value, dots = torch.zeros_like(value), torch.zeros(B * Q * M, 4, L * K)
inputs = value, levels, locations, weights, grad_output, grad_value, dots
backward = build_team(SIZES + PHASE_1 + BACKWARD)
backward(B * Q * M, 8, *inputs, S, Q, M)
torch.testing.assert_close(grad_value, leaves[0].grad, atol=1e-5, rtol=1e-5)
print("gradient of value", tuple(grad_value.shape), "equal to autograd's")

# %% [markdown]
# The inner products are in `dots`, (items, 4, points). The other two gradients follow from them. (The
# folded cell shows it for the attention weights, in PyTorch.)

# %% tags=["hide-input"]
size = torch.tensor(shapes).flip(1)[:, None]  # (L, 1, 2): W and H
x, y = (locations * size - 0.5).frac().unbind(-1)
bilinear = torch.stack([(1 - y) * (1 - x), (1 - y) * x, y * (1 - x), y * x], 3)
grad_weights = (bilinear * dots.view(B, Q, M, 4, L, K)).sum(3)
torch.testing.assert_close(grad_weights, leaves[2].grad, atol=1e-5, rtol=1e-5)
print("gradient of weights", tuple(grad_weights.shape), "equal to autograd's")

# %% [markdown]
# A kernel does this in a third phase, which you will write.

# %% [markdown]
# ## Exercise {{n}}.4  The third phase
#
# *difficulty ●●● · 35 minutes · 26 lines*
#
# Return the text of a kernel `point_gradients` with one thread per point. From the inner products of a point's
# corners it computes the gradients of its attention weight and of its location, x and y, and writes them. It
# completes your own operator: the check puts your gradients beside autograd's.
#
# `levels` is as above, (3, points); `dots` is (items, 4, points), corner c = 2 · bottom + right; `weights` is
# (items, points), `locations` (items, points, 2), and so are the results. More threads than points may come.
# The results hold garbage before, so a point outside (or one whose coordinate is not a number) must
# write its zeros. For a corner outside the map, `dots` holds some other pixel's product: it must not count.


# %% tags=["exercise"]
def point_gradients():
    """void point_gradients(const int* levels, const float* locations, const float* weights,
    const float* dots, float* grad_locations, float* grad_weights, int items, int points)"""
    # BEGIN SOLUTION
    return r"""
__global__ void point_gradients(const int* levels, const float* locations, const float* weights,
                                const float* dots, float* grad_locations, float* grad_weights,
                                int items, int points) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= items * points) return;
    int p = i % points, H = levels[p], W = levels[points + p];
    const float* dot = dots + i / points * 4 * points + p;
    float x = locations[2 * i] * W - 0.5f, y = locations[2 * i + 1] * H - 0.5f;
    float by_weight = 0, by_x = 0, by_y = 0;
    if (x > -1 && x < W && y > -1 && y < H) {
        int left = floorf(x), top = floorf(y);
        for (int c = 0; c < 4; c++) {
            int u = left + c % 2, v = top + c / 2;
            if (u < 0 || u >= W || v < 0 || v >= H) continue;
            float near_x = 1 - fabsf(x - u), near_y = 1 - fabsf(y - v);
            by_weight += near_x * near_y * dot[c * points];
            by_x += (c % 2 ? 1 : -1) * near_y * dot[c * points];
            by_y += (c / 2 ? 1 : -1) * near_x * dot[c * points];
        }
    }
    grad_weights[i] = by_weight;
    grad_locations[2 * i] = weights[i] * W * by_x;
    grad_locations[2 * i + 1] = weights[i] * H * by_y;
}
"""
    # END SOLUTION


check("cuda_kernel.4", point_gradients)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Thread i has point `i % points` of item `i / points`. Position and corners are found as in
# `find_corners`. Each corner adds to three sums: one with $b_c$, one with its slope in x, one in y.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# With `near_x = 1 - fabsf(x - u)` and `near_y` likewise: $b_c$ = near_x · near_y, the slope in x is ± near_y,
# the slope in y ± near_x. At the end the sums of the slopes take the factors a · W and a · H. Corner c's
# product is `dots[(item * 4 + c) * points + p]`.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# The first check has all points inside. Outside, the three results are zero and still have to be written;
# at a border some corners do not exist. Test for "inside" in the form that is false for NaN.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.8 The library's kernel
#
# The library's kernel is one file of some 350 lines, `kernels/ms_deform_attn.cu`. The GPU, the fast CPU build and
# this chapter all compile this file. Most of its names you have typed yourself. The others are:
#
# | Name | What it is |
# |---|---|
# | `forward_head`, `backward_head` | both phases of one head |
# | `neighbours` | the part of `find_corners` for one axis, without a branch |
# | `GROUPS` | heads per block |
# | `VALUE`, `REAL`, `OFFSET` | the number type of value, of weights and sums, of indices |
# | `ROW` | the number type of the rows that are read |
# | `Vector`; `load`, `store`, `add` | `VECTOR` channels as one thing; 16 bytes per instruction |
# | `VECTORS` | vectors that a lane sums at once: more than one in large heads |
# | `STEP`, `PASS` | channels of all lanes together: in one vector each, in `VECTORS` each |
# | `EXISTS` | a tail guard for channels |
# | `UNROLL`, `KEEP_LOOP` | have the compiler write a loop out, or not |
# | `LOOK_AHEAD` | on a CPU only: fetch a later point's rows early |
#
# The two phases are easy to recognise:

# %% tags=["hide-input"]
SOURCE = resources.files("deformable_detr.kernels").joinpath("ms_deform_attn.cu").read_text()


def show(name):
    """Display the definition of one of the kernel's functions."""
    start = re.search(rf"^(?:template .*\n)?__device__ \w+ {name}\(", SOURCE, re.M).start()
    text = SOURCE[start : SOURCE.index("\n}", start) + 2]
    display(Markdown(f"```cpp\n{text}\n```"))


show("forward_head")

# %% [markdown]
# It differs from yours in two places: `Vector` replaces an inner loop, and there is an outer loop
# over `first`, which for a head of 32 channels runs once. Backward and `neighbours` are in the
# appendix below.
#
# The library, too, has a slow CPU build in which each CUDA thread is a thread of the operating system. (`specialise`
# returns the constants that it would compile in for these sizes; `capability` is the GPU's generation.)

# %%
macros = cuda.specialise(torch.float32, D, L * K, huge=False, deterministic=False, capability=80)
print({name: macros[name] for name in ("D", "POINTS", "VECTOR", "LANES", "GROUPS")})
torch.testing.assert_close(threads.forward(value, shapes, locations, weights), expected)
gradients = threads.backward(value, shapes, locations, weights, grad_output)
for given, leaf in zip(gradients, leaves, strict=True):
    torch.testing.assert_close(given, leaf.grad, atol=1e-4, rtol=1e-4)
print("forward and all three gradients: equal to autograd's")
assert (macros["VECTOR"], macros["LANES"]) == (4, 8)

# %% [markdown]
# So far, requests and sectors were predictions. This build can write a **trace**: a list of every address that
# every thread reads. The n-th reads of the 32 threads of a warp come from the same line, so they make one request.
#
# Before you run: does the real kernel keep to the 16 requests per head, of 16 sectors each,
# that section {{n}}.6 predicted?

# %%
trace = threads.trace(value, shapes, locations, weights, block=0)
loads = trace[trace["array"] == "value"]
own = [loads["offset"][loads["thread"] == t] for t in range(32)]
wide = 4 * np.stack(own, 1)  # (requests, 32) in bytes
fetched = {sectors(row, size=16) for row in wide}
print(len(wide) // 4, "requests per head,", *fetched, "sectors each")
assert set(loads["bytes"]) == {16} and wide.shape == (L * K * 4, 32) and fetched == {16}

# %% [markdown]
# It does.

# %% [markdown]
# ## {{n}}.9 On a real GPU
#
# On a GPU the kernel stays as it is; only who compiles and who launches it changes. **NVRTC**, NVIDIA's
# compiler as a library, takes the source at run time, and CuPy's `RawModule` {cite}`okuta2017cupy` wraps it, so
# neither a build step nor NVIDIA's toolkit is needed. Two things need care:
#
# - A launch returns at once, and the GPU works through its **stream** of launches in order. The kernel must join
#   the stream on which PyTorch computes. Otherwise it may read values that are not there yet.
# - It must go to the GPU **on which the tensors lie**. The official operator does not make sure of that.
#
# How many warps fit on a GPU, and why that matters, is in {{chapter making_it_fast}}.
#
# ## Appendix: the rest of the kernel
#
# `neighbours` has no branch: `inside & (low >= 0)` becomes a number.

# %% tags=["hide-output"]
show("neighbours")

# %% [markdown]
# `backward_head` is your `backward` with the third phase at its end. `put_sums` is its shuffle; it stores the inner
# products over the corners' weights, which are no longer needed. (`SUMS` and `PRODUCTS` are both true on a GPU.)

# %% tags=["hide-output"]
show("put_sums")
show("backward_head")

# %% [markdown]
# ## Summary
#
# - A kernel is a function that many threads run. Each finds its part of the work by its number.
# - A warp's 32 reads go out together, and memory answers in sectors, so lanes that read
#   neighbouring numbers share a sector.
# - Two phases, a lane per point and then a lane per vector of channels, compute each position once.
# - Lanes wait at barriers, talk through shared memory and shuffles, and add atomically.
# - One source runs on CPU and GPU, so a laptop can test what a GPU will run.
#
# > **Differs from the paper.** It describes no kernel. **Differs from the official code.** There
# > one thread owns a channel and repeats the index arithmetic; six kernels serve backward by size
# > of D; the batch must be divisible by `im2col_step`; half precision is missing. Here: one
# > backward kernel, any D, any batch.
#
# ## Further reading
#
# - {cite}`zhu2021deformable`: the operation; its repository has the first kernel.
# - {cite}`okuta2017cupy`: CuPy.
# - {cite}`nickolls2008cuda`: the programming model, by those who made it.
