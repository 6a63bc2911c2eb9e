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
# # {{n}}. Making it fast
#
# You will be able to
# - **count** the bytes and operations that deformable attention cannot do without,
# - **simulate** a cache, and predict with it the faster of two layouts before you time both,
# - **speed** a kernel up step by step, and say which steps the measurement really shows,
# - **place** kernels under your machine's roofline, and say what limits them,
# - **watch** a data race lose sums, and avoid it in three ways.
#
# You should know: {{chapter cuda_kernel}}.
#
# {{measured}}
#
# {{map}}

# %% [markdown]
# Of two correct kernels, one can be dozens of times slower than the other. This chapter finds out
# why, on your own processor. Times differ from machine to machine, and from minute to minute on the
# same one; counts do not. So we count first, predict from the counts, and only then take the time.
# (The times on this page are those of the machine that made it.)

# %% tags=["hide-input"]
import ctypes
import json
import math
import platform
import random
import re
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from schematics import making_it_fast as schematics
from schematics import running_example

from deformable_detr import Batch, ms_deform_attn, use_backend
from deformable_detr.exercises import check
from deformable_detr.exercises.cuda import build, build_team, library_of
from deformable_detr.layers import attention
from deformable_detr.ops import threads
from deformable_detr.weights.ours import load_model

plt.style.use("book.mplstyle")
torch.manual_seed(0)
torch.set_num_threads(1)

# %% [markdown]
# ## {{n}}.1 What has to move
#
# Take the encoder of the paper's detector on an image of 800 by 1066 pixels {cite}`zhu2021deformable`. Every token of
# its four levels is a query. In float32, each input must be read at least once and the output written once. No
# kernel can move less:

# %%
LEVELS = [(100, 134), (50, 67), (25, 34), (13, 17)]
M, D, L, K = 8, 32, 4, 4
S = Q = sum(h * w for h, w in LEVELS)
value_bytes = output_bytes = 4 * S * M * D
compulsory = value_bytes + output_bytes + 4 * Q * M * L * K * 3  # two coordinates and a weight
print(f"{Q} queries, {Q * M * L * K / 1e6:.2f} million points, {compulsory / 1e6:.1f} MB")

# %% [markdown]
# But each point reads four rows of D channels, and neighbouring queries read the same rows again. Before you run: how
# many times is each byte of `value` read, on average?

# %%
gathered = Q * M * L * K * 4 * D * 4  # points, corners, channels, bytes
flops = Q * M * L * K * 4 * D * 2  # a multiplication and an addition for each number
print(f"gathered {gathered / 1e9:.2f} GB, {gathered / value_bytes:.0f} times value")
print(f"{flops / 1e9:.2f} GFLOP, {flops / gathered:.1f} operations per byte gathered")
assert gathered / value_bytes == 4 * L * K

# %% [markdown]
# (64 is 4 corners times 16 points; there are as many queries as tokens.) So there is half an operation per byte read.
# Is that little or much?

# %% [markdown]
# ## {{n}}.2 Two limits
#
# A processor can fetch only so many bytes per second, and compute only so many operations per second. Which of the
# two limits a kernel meets first depends on its **intensity**: how many operations it does per byte. The picture of
# both limits is called a **roofline** {cite}`williams2009roofline`.

# %% tags=["hide-input"] mystnb={"image": {"alt": "A line that rises to the right and becomes flat at 40 GFLOP/s. A point on the slope at one operation per byte, 10 GFLOP/s: bytes limit. A point on the flat part at 16 operations per byte: arithmetic limits."}}
schematics.two_limits()

# %% [markdown]
# *Figure {{n}}.1. The roofline of an imagined machine that fetches 10 GB/s and computes 40 GFLOP/s. A kernel with 4
# operations per byte would meet both limits at once.*
#
# To find your machine's limits, we measure three things: how fast it copies an array that fits into the processor's
# cache, how fast it copies one that does not, and how fast it computes where each byte is used many times, in a
# product of matrices or a convolution.


# %%
def best_time(function, repeats):
    """Seconds of the fastest call. For a limit that is right: whatever disturbs, slows down."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


def copy_rate(megabytes, repeats):
    """GB/s read and written by copying an array."""
    source = torch.rand(megabytes * 2**18)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_time(lambda: target.copy_(source), repeats) / 1e9


# %%
# NBVAL_IGNORE_OUTPUT
a, b = torch.rand(2, 768, 768)
image, filters = torch.rand(1, 128, 32, 44), torch.rand(128, 128, 3, 3)
product = 2 * 768**3 / best_time(lambda: a @ b, repeats=9) / 1e9
with torch.no_grad():
    seconds = best_time(lambda: torch.conv2d(image, filters, padding=1), repeats=15)
convolution = 2 * filters.numel() * 32 * 44 / seconds / 1e9
machine = {"cache": copy_rate(1, 300), "memory": copy_rate(128, 7)}
machine["GFLOP/s"] = max(product, convolution)
for name in ("cache", "memory"):
    rate, ridge = machine[name], machine["GFLOP/s"] / machine[name]
    print(f"{name}: {rate:.0f} GB/s; up to {ridge:.1f} operations per byte, bytes are the limit")

# %% [markdown]
# Compare the printed numbers with the 0.5 of deformable attention. On nearly every processor 0.5 is
# less, even if all bytes come from the cache. Then the limit is **moving** bytes, not computing,
# and what counts is where the 1.17 GB come from.

# %% [markdown]
# ## Exercise {{n}}.1  Bytes of half precision
#
# *difficulty ●○○ · 10 minutes · 4 lines*
#
# Return the least number of bytes that forward moves when value and output have `size` bytes per number, and
# locations and weights stay float32. In general S, the number of tokens, and Q, that of queries, differ.


# %% tags=["exercise"]
def least_bytes(B, S, Q, M, D, L, K, size):
    """Returns bytes: value, locations and weights read once, output written once."""
    # BEGIN SOLUTION
    value = B * S * M * D * size
    output = B * Q * M * D * size
    points = B * Q * M * L * K
    return value + output + points * 3 * 4
    # END SOLUTION


check("making_it_fast.1", least_bytes)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# A point has two coordinates and a weight.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# value is B * S * M * D numbers, output B * Q * M * D; S and Q differ in the decoder.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# In the encoder S = Q. In the decoder few queries look at many tokens.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.3 A cache in fifteen lines
#
# A cache keeps copies of what was read lately. It works in **lines** of 64 bytes. The places for
# lines are grouped into **sets**, and a line may only go into one of them: set number = line number
# modulo the number of sets. A common first-level cache has 64 sets of 8 places, 32 KB. When a set
# is full, the line that has gone unused for longest has to go. A read whose line is not there is a
# **miss**, and has to wait for a slower memory.
#
# A short program can follow these rules. It gets the numbers of the lines in the order in which they are read, and
# counts misses:

# %%
CACHE = r"""
#include <vector>
extern "C" long long misses(const int* lines, long long count, int sets, int ways) {
    std::vector<int> cache(sets * ways, -1);  // in each set the one used last stands first
    long long missed = 0;
    for (long long i = 0; i < count; i++) {
        int* set = &cache[lines[i] % sets * ways];
        int place = 0;
        while (place < ways - 1 && set[place] != lines[i]) place++;
        missed += set[place] != lines[i];
        for (; place > 0; place--) set[place] = set[place - 1];
        set[0] = lines[i];
    }
    return missed;
}
"""


# %%
simulator = library_of(CACHE, "-O2")


def misses(lines, sets=64, ways=8):
    """How many of these reads miss; lines: numbers of lines in the order in which they are read."""
    address = ctypes.c_void_p(lines.ctypes.data)
    return simulator.misses(address, ctypes.c_longlong(lines.size), sets, ways)


rounds = np.tile(np.arange(3, dtype=np.int32) * 64, 5)  # three lines of one set, five rounds
print(misses(rounds, ways=4), "misses with 4 places,", misses(rounds, ways=2), "with 2")
assert (misses(rounds, ways=4), misses(rounds, ways=2)) == (3, 15)

# %% [markdown]
# The three lines belong to one set. With four places each misses once, the first time. With two places each is thrown out
# just before it is wanted again, and every read misses.
#
# Now for deformable attention, on an image half as wide and high as the paper's, to keep times short. The points lie
# as in an encoder, around the query's own pixel. (A folded cell then finds `tokens`, (Q, M, L · K, 4): the token of
# each corner, or −1 outside the map.)

# %%
shapes = [(50, 67), (25, 34), (13, 17), (7, 9)]
S = Q = sum(h * w for h, w in shapes)
centres = [
    torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w)
    for h, w in shapes
]
centres = torch.cat(centres).flip(1)  # (Q, 2), x and y
offsets = 2 * torch.randn(1, Q, M, L, K, 2)  # pixels
locations = centres[:, None, None, None] + offsets / torch.tensor(shapes).flip(1)[:, None]
weights = torch.rand(1, Q, M, L * K).softmax(-1).view(1, Q, M, L, K)
value = torch.randn(1, S, M, D)
expected = ms_deform_attn(value, shapes, locations, weights)


# %% tags=["hide-input"]
def tokens_read():
    """The token of each corner, (Q, M, L * K, 4), and -1 where a corner lies outside."""
    found, start = [], 0
    for level, (h, w) in enumerate(shapes):
        pixels = locations[0, :, :, level] * torch.tensor([w, h]) - 0.5
        x, y = pixels.floor().long().unbind(-1)
        u, v = torch.stack([x, x + 1, x, x + 1], -1), torch.stack([y, y, y + 1, y + 1], -1)
        inside = (u >= 0) & (u < w) & (v >= 0) & (v < h)
        found.append(torch.where(inside, start + v * w + u, -1))
        start += h * w
    return torch.cat(found, 2).numpy()


tokens = tokens_read()

# %% [markdown]
# `value` can lie in memory as (B, S, M, D), channels last, or as (B, M, D, S), channels first. The index of a number
# is the same text in C and in Python, so the simulator and the kernel can share it. (`step` and `heads_first` are for
# later.)

# %%
LAYOUTS = {
    "channels last": "(token * M + m) * D + d",
    "channels first": "(m * D + d) * S + token",
}


def lines_read(index, tokens, step=1, heads_first=False):
    """The lines of 64 bytes that one thread after another reads, every `step`-th channel of a row."""
    names = {"token": tokens[..., None], "d": np.arange(0, D, step), "M": M, "D": D, "S": S}
    lines = eval(index, names | {"m": np.arange(M)[:, None, None, None]}) * 4 // 64
    inside = tokens >= 0
    if heads_first:
        lines, inside = lines.swapaxes(0, 1), inside.swapaxes(0, 1)
    return np.ascontiguousarray(lines[inside], dtype=np.int32)


# %% [markdown]
# One row of 32 channels has 128 bytes. Before you run: how many lines does one corner need in each of the two layouts,
# and which will miss more often? (We simulate six rows of queries on the finest level.)

# %%
predicted = {}
for name, index in LAYOUTS.items():
    lines = lines_read(index, tokens[: 6 * 67])
    each = len(np.unique(lines[0]))
    predicted[name] = misses(lines) / len(lines)
    print(f"{name:>14}: {each:2} lines per corner, {predicted[name]:4.1f} of them miss")
assert predicted["channels first"] > 3 * predicted["channels last"]

# %% [markdown]
# Channels first needs 16 times as many lines, but misses only about seven times as often, because a
# line that a neighbour has fetched is often still there. So the prediction is that channels last
# wins. Its gain in time will be less than sevenfold, because a kernel does more than wait, and
# several misses can wait at once.
#
# To check it, here is a kernel for both layouts, with one thread per head. The words `BEGIN`, `ADD`, `END` and
# `INDEX` stand for what differs from one version to the next. (The version with one thread per number is for later.)
# Folded: `fill` puts the meanings in, and `compile_kernel` returns a function of `value`.

# %%
ARGUMENTS = """const float* value, const int* shapes, const float* locations,
    const float* weights, float* output, int S, int Q, int M, int D, int L, int K"""
ONE_PHASE = """
__global__ void head(ARGUMENTS) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    BEGIN
    int m = item % M, start = 0;
    for (int l = 0; l < L; l++) {
        int H = shapes[2 * l], W = shapes[2 * l + 1];
        for (int k = 0; k < K; k++) {
            int p = (item * L + l) * K + k;
            float x = locations[2 * p] * W - 0.5f, y = locations[2 * p + 1] * H - 0.5f;
            if (!(x > -1 && x < W && y > -1 && y < H)) continue;
            int left = floorf(x), top = floorf(y);
            for (int corner = 0; corner < 4; corner++) {
                int u = left + corner % 2, v = top + corner / 2;
                if (u < 0 || u >= W || v < 0 || v >= H) continue;
                float weight = weights[p] * (1 - fabsf(x - u)) * (1 - fabsf(y - v));
                int token = start + v * W + u;
                ADD
            }
        }
        start += H * W;
    }
    END
}
"""
PER_NUMBER = {
    "BEGIN": "if (i >= Q * M * D) return; int item = i / D, d = i % D; float sum = 0;",
    "ADD": "sum += weight * value[INDEX];",
    "END": "output[i] = sum;",
}
PER_HEAD = {
    "BEGIN": "if (i >= Q * M) return; int item = i;",
    "ADD": "for (int d = 0; d < D; d++) output[item * D + d] += weight * value[INDEX];",
    "END": "",
}


# %% tags=["hide-input"]
ARM = platform.machine() in ("arm64", "aarch64")
# The last two: ignore errno and floating-point traps, which would forbid vector instructions.
FLAGS = ("-O3", "-mcpu=native" if ARM else "-march=native", "-fno-math-errno", "-fno-trapping-math")


def fill(text, **meanings):
    """The text with names in it replaced, as a compiler's option -DNAME=meaning does."""
    for name, meaning in {**meanings, "ARGUMENTS": ARGUMENTS}.items():
        text = re.sub(rf"\b{name}\b", str(meaning), text)
    return text


SIZES = torch.tensor(shapes).int()


def compile_kernel(text, threads=1, sizes=SIZES):
    """The kernel as run(value) -> (1, Q, M * D), with Q * M blocks of `threads` threads."""
    kernel = build(text, "head", FLAGS)

    def run(value):
        output = torch.zeros(1, Q, M * D)
        kernel(Q * M, threads, value, sizes, locations, weights, output, S, Q, M, D, L, K)
        return output

    return run


# %%
values = {"channels last": value, "channels first": value[0].permute(1, 2, 0).contiguous()}
by_layout = {}
for name, index in LAYOUTS.items():
    run = by_layout[name] = compile_kernel(fill(ONE_PHASE, **PER_HEAD, INDEX=index))
    torch.testing.assert_close(run(values[name]), expected, atol=1e-5, rtol=1e-5)
print("both layouts give the library's numbers")

# %% [markdown]
# How to compare times honestly? A single measurement says little, because other programs run, too,
# and the processor's clock changes. So we let the versions **race**: in each round every version
# runs once, in shuffled order, so a disturbance hits all versions alike. We take processor time,
# which stands still while another program has the processor. We print the median, the range, and in
# how many rounds a version **won**: was faster than the one in the line above it.


# %%
def race(functions, rounds):
    """Milliseconds of processor time, (rounds,) arrays by name; prints median, range, victories."""
    times = {name: np.zeros(rounds) for name in functions}
    for n in range(rounds):
        for name in random.sample(list(functions), len(functions)):
            start = time.process_time()
            functions[name]()
            times[name][n] = 1e3 * (time.process_time() - start)
    before = None
    for name, given in times.items():
        won = "" if before is None else f", won {(given < before).sum():2}"
        low, high = given.min(), given.max()
        print(f"{name:>31}: {np.median(given):6.1f} ms ({low:.1f} to {high:.1f}){won}")
        before = given
    return times


# %%
# NBVAL_IGNORE_OUTPUT
first, last = "channels first", "channels last"
_ = race({name: lambda n=name: by_layout[n](values[n]) for name in (first, last)}, rounds=15)

# %% [markdown]
# If the second line won (nearly) all of the 15 rounds, the prediction has held on your machine.

# %% [markdown]
# ## Exercise {{n}}.2  Sectors before seconds
#
# *difficulty ●●○ · 15 minutes · 3 lines*
#
# The same question for a GPU. A warp of 32 threads reads one corner's channels; thread t reads channel `t % D` of head
# `t // D`, `size` bytes. Heads lie `head_stride` numbers apart and channels `channel_stride` numbers (numbers, not
# bytes), and the array begins at a sector. How many 32-byte sectors does the request touch?


# %% tags=["exercise"]
def sectors_of_a_warp(D, head_stride, channel_stride, size):
    """The distinct 32-byte sectors of 32 reads of `size` bytes; the array starts at a sector."""
    # BEGIN SOLUTION
    thread = np.arange(32)
    index = thread // D * head_stride + thread % D * channel_stride
    return len(np.unique(index * size // 32))
    # END SOLUTION


check("making_it_fast.2", sectors_of_a_warp)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The number that a thread reads has index `head * head_stride + channel * channel_stride`.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Its sector is `index * size // 32`. Count distinct ones: `np.unique`.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# With D = 16 a warp spans two heads: thread 16 reads channel 0 of head 1.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.4 Step by step
#
# Now we climb from {{chapter cuda_kernel}}'s first kernel to the library's. Each step has a reason that can be counted.
#
# **Step 0** is one thread per number: all coordinates are computed D times. **Step 1**, one thread per head, computes
# them once. A point's position and corners take about 30 operations. Each channel then takes 8: a multiplication and
# an addition for each of four corners. So a point takes about 30 + 32 · 8 = 286 operations instead of 32 · (30 + 8) =
# 1216.
#
# **Step 2: say what is constant.** A loop over D channels with D unknown needs a counter, a comparison, and code for
# every remainder. If D is a number in the source, the compiler can write the loop out as a few vector instructions. This
# is why the library compiles at run time: one build for each D, L and K.
#
# **Step 3: two phases.** Each corner still asks whether it is inside, a jump that the processor may
# guess wrong. So we first find all points' corners, and give those outside weight zero and an
# address that exists. Without jumps the compiler can find the corners of 8 or 16 points at once,
# with vector instructions: one lane per point, this time of a CPU's vector. The second phase is
# nothing but loads, multiplications and additions, with the sums in registers.
#
# As in the last chapter, `levels` has the rows H, W and start for each point (it takes the place of `shapes`).
# `ORDER` will say which query q and head m a thread works on, and `row` is a small function: where a token's channel
# 0 lies.

# %%
TWO_PHASES = """
typedef float Vector __attribute__((vector_size(32), aligned(4), may_alias));  // eight floats
__global__ void head(ARGUMENTS) {
    const int* levels = shapes;
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= Q * M) return;
    ORDER
    int item = q * M + m, offset[4][L * K];
    float corner[4][L * K];
    auto row = [=](int token) { int d = 0; return INDEX; };
    for (int n = 0; n < L * K; n++) {
        int p = item * L * K + n, H = levels[n], W = levels[L * K + n], start = levels[2 * L * K + n];
        float x = locations[2 * p] * W - 0.5f, y = locations[2 * p + 1] * H - 0.5f;
        bool inside = (x > -1) & (x < W) & (y > -1) & (y < H);
        x = inside ? x : 0, y = inside ? y : 0;
        int left = floorf(x), top = floorf(y);
        float fx = x - left, fy = y - top, a = inside * weights[p];
        float wx[2] = {left >= 0 ? 1 - fx : 0, left + 1 < W ? fx : 0};
        float wy[2] = {top >= 0 ? a * (1 - fy) : 0, top + 1 < H ? a * fy : 0};
        int u[2] = {std::max(left, 0), std::min(left + 1, W - 1)};
        int v[2] = {start + std::max(top, 0) * W, start + std::min(top + 1, H - 1) * W};
        for (int c = 0; c < 4; c++) {
            offset[c][n] = row(v[c / 2] + u[c % 2]);
            corner[c][n] = wy[c / 2] * wx[c % 2];
        }
    }
    SUMS
}
"""
SUMS = """Vector sum[D / 8] = {};
    for (int n = 0; n < L * K; n++)
        for (int c = 0; c < 4; c++)
            for (int j = 0; j < D / 8; j++)
                sum[j] += corner[c][n] * ((const Vector*)(value + offset[c][n]))[j];
    for (int j = 0; j < D / 8; j++) ((Vector*)(output + item * D))[j] = sum[j];"""

# %% [markdown]
# **Step 4: locality.** This one the simulator must judge. In (B, S, M, D) the rows of one head lie M · D floats apart,
# 1024 bytes, with the other heads' rows between them. Two changes suggest themselves: go through the work **head by
# head** instead of query by query, so that one head's rows are wanted again soon; and put one head's rows next to each
# other **without gaps**, as (B, M, S, D). Either could help alone.
#
# Before you run: which of the four combinations misses least?

# %%
GAPS = {"with gaps": "(token * M + m) * D + d", "no gaps": "(m * S + token) * D + d"}
ORDERS = {
    "query by query": "int q = i / M, m = i % M;",
    "head by head": "int m = i / Q, q = i % Q;",
}
simulated = {}
for gaps, index in GAPS.items():
    for order in ORDERS:
        lines = lines_read(index, tokens, step=16, heads_first=order == "head by head")
        simulated[order, gaps] = misses(lines) / len(lines)
        print(f"{order:>14}, {gaps:<9}: {simulated[order, gaps]:.1f} of 2 lines per corner miss")
both = simulated["head by head", "no gaps"]
assert all(2 * both < missed for place, missed in simulated.items() if place[1] == "with gaps")
assert 2 * both < simulated["query by query", "no gaps"]

# %% [markdown]
# In the simulation only both together help, and then by more than half. Why does neither help alone? It depends on
# which sets of the cache the rows fall into.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two grids of 64 cells, the sets of a cache. Left, for rows 1024 bytes apart, only eight cells are filled, in two columns. Right, for rows without gaps, all 64 cells are filled."}}
schematics.places_of_a_cache(with_gaps=4 * M * D, without=4 * D)
assert len(schematics.sets_used(4 * M * D)) == 8 and len(schematics.sets_used(4 * D)) == 64

# %% [markdown]
# *Figure {{n}}.2. The sets that 64 rows of one head may use. With gaps, one head has only an eighth of the cache.*
#
# With gaps, every head has its own eighth of the sets, whatever the order: the heads never compete, and so it does not
# matter whether they take turns. Without gaps but query by query, each head could use the whole cache, but eight heads
# share it. Only head by head without gaps does one head have the whole cache to itself.

# %% [markdown]
# A prediction of misses is not yet one of time. Our simulator leaves out the second-level cache, which makes a miss
# cheaper, and the **prefetcher**: a processor guesses which line comes next and fetches it ahead of time, which works
# for reads in sequence. Query by query, locations, weights and output are read and written in sequence; head by head,
# they are not. What one gains at `value` may be lost there, unless the kernel itself asks for these lines some
# queries ahead. Two layouts and three orders make six versions:

# %%
CONSTANTS = {"D": D, "L": L, "K": K, "M": M}
AHEAD = """
    for (int n = 0, later = (q + 8) * M + m; n < D && q + 8 < Q; n += 16) {
        __builtin_prefetch(locations + later * 2 * L * K + n);
        __builtin_prefetch(weights + later * L * K);
        __builtin_prefetch(output + later * D + n);
    }"""
ORDERS["head by head + ahead"] = ORDERS["head by head"] + AHEAD
starts = np.cumsum([0, *(h * w for h, w in shapes[:-1])])
levels = torch.tensor([(h, w, start) for (h, w), start in zip(shapes, starts, strict=True)])
levels = levels.repeat_interleave(K, 0).t().int().contiguous()  # (3, L * K)
by_gaps = {"with gaps": value, "no gaps": value.transpose(1, 2).contiguous()}


def two_phases(order, gaps):
    """One of the six versions, on value as it has to lie; () -> (1, Q, M * D)."""
    text = fill(TWO_PHASES, SUMS=SUMS, ORDER=ORDERS[order], INDEX=GAPS[gaps], **CONSTANTS)
    run = compile_kernel(text, sizes=levels)
    torch.testing.assert_close(run(by_gaps[gaps]), expected, atol=1e-5, rtol=1e-5)
    return lambda: run(by_gaps[gaps])


versions = {f"{order}, {gaps}": two_phases(order, gaps) for gaps in GAPS for order in ORDERS}

# %%
# NBVAL_IGNORE_OUTPUT
by_version = race(versions, rounds=25)
won = by_version["head by head + ahead, no gaps"] < by_version["query by query, with gaps"]
print("all three changes against none: faster in", won.sum(), "of 25 rounds")

# %% [markdown]
# Here "won" compares neighbours in the list, so the last line, printed apart, compares all three
# changes (order, no gaps, fetching ahead) with none. The versions between have some of the changes.
# Only such an **ablation** can show that changes help together. If the printed ranges of the two
# overlap, the answer is faint: run the cell again and see if it holds.
#
# Now the whole ladder, with the library's kernel and PyTorch's form for comparison. (For step 4 the copy without gaps was
# made before; the library makes it each time, and its time includes that.)

# %%
last = LAYOUTS["channels last"]
per_number = compile_kernel(fill(ONE_PHASE, **PER_NUMBER, INDEX=last), D)
fixed = compile_kernel(fill(ONE_PHASE, **PER_HEAD, INDEX=last, **CONSTANTS))
inputs = value, shapes, locations, weights
runs = {
    "0 one thread per number": lambda: per_number(value),
    "1 one thread per head": lambda: by_layout["channels last"](value),
    "2 constant sizes": lambda: fixed(value),
    "3 two phases": versions["query by query, with gaps"],
    "4 locality": versions["head by head + ahead, no gaps"],
    "the library": lambda: ms_deform_attn(*inputs, backend="cpu"),
    "PyTorch": lambda: ms_deform_attn(*inputs, backend="reference"),
}
for run in runs.values():
    torch.testing.assert_close(run(), expected, atol=1e-5, rtol=1e-5)

# %%
# NBVAL_IGNORE_OUTPUT
with torch.no_grad():
    times = race(runs, rounds=11)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Seven rows, the versions of the kernel and PyTorch's form; in each a dot for the median and a bar for the range of the measured milliseconds, on a logarithmic axis."}}
schematics.ladder(times)

# %% [markdown]
# *Figure {{n}}.3. The ladder on the machine that made this page: median (dot) and range (bar) of 11 rounds. Where two
# bars overlap, look at the printed number of rounds before you call a step faster.*
#
# A step counts as shown if it won (nearly) all rounds, and does so again when you run the cell a
# second time. Step 4 is the doubtful one: compare the rounds that it won here with those in the race before. Step 1
# gained more than the factor of 4 that we counted, because the compiler makes vector instructions of its loop over
# channels. The library's kernel adds vectors of 64 bytes, where the processor has them, and asks for rows ahead of
# time.
#
# (`make bench` measures other implementations in the same way, at the paper's sizes, and writes what it finds to
# `data/results/`.)

# %% [markdown]
# ## Exercise {{n}}.3  One thread per point
#
# *difficulty ●●● · 30 minutes · 20 lines*
#
# There is a middle way between one thread per number and one per head. Write a kernel `point` in which a thread takes
# one **point** of a head, finds its corners once, and adds its share to all D channels of the output. Several threads
# then share one output, so on a GPU the additions would have to be atomic; here, one after another, `+=` will do.
#
# There is one image. `output` holds zeros at first. Blocks may have any size, and there may be more
# than Q · M · L · K threads; those left over must write nothing. Level l's tokens come after those
# of the levels before it. Points outside the map, and corners outside, add nothing. Keep the
# kernel: compiled by `build(thread_a_point(), "point", FLAGS)` and called as in `compile_kernel`,
# with Q · M · L blocks of K threads, it can join the race above.


# %% tags=["exercise"]
def thread_a_point():
    """void point(const float* value, const int* shapes, const float* locations,
    const float* weights, float* output, int S, int Q, int M, int D, int L, int K), one image"""
    # BEGIN SOLUTION
    return """
__global__ void point(const float* value, const int* shapes, const float* locations,
                      const float* weights, float* output, int S, int Q, int M, int D, int L, int K) {
    int p = blockIdx.x * blockDim.x + threadIdx.x;
    if (p >= Q * M * L * K) return;
    int l = p / K % L, item = p / K / L, start = 0;
    for (int i = 0; i < l; i++) start += shapes[2 * i] * shapes[2 * i + 1];
    int H = shapes[2 * l], W = shapes[2 * l + 1];
    float x = locations[2 * p] * W - 0.5f, y = locations[2 * p + 1] * H - 0.5f;
    if (!(x > -1 && x < W && y > -1 && y < H)) return;
    int left = floorf(x), top = floorf(y);
    for (int corner = 0; corner < 4; corner++) {
        int u = left + corner % 2, v = top + corner / 2;
        if (u < 0 || u >= W || v < 0 || v >= H) continue;
        float weight = weights[p] * (1 - fabsf(x - u)) * (1 - fabsf(y - v));
        const float* row = value + ((start + v * W + u) * M + item % M) * D;
        for (int d = 0; d < D; d++) output[item * D + d] += weight * row[d];
    }
}
"""
    # END SOLUTION


check("making_it_fast.3", thread_a_point)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Take the kernel `head` of `ONE_PHASE` and turn its two loops over levels and points into the thread's number:
# `p / K % L` is the level, `p / K / L` the item.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `start` is the number of tokens in the levels before: a short loop. The item's head is `item % M`.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# With one level `start` is zero. With several, sum H · W of those before.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.5 The kernels under the roof
#
# All versions do the same useful work: half an operation per byte read. So under the roofline they stand above one
# another, and their height tells how well they use the machine. For comparison there are two operations that reuse
# each byte many times, a product of matrices and a convolution. They keep numbers in registers while they use them,
# so we count each of their bytes once. (Counted like that, deformable attention would have 9 operations per byte. But
# it cannot keep its rows in registers, since nobody knows which row is wanted next.)

# %% tags=["hide-input"]
# NBVAL_IGNORE_OUTPUT
useful = Q * M * L * K * 4 * D * 2 / 1e6  # per millisecond: GFLOP/s
speeds = {name: useful / np.median(given) for name, given in times.items()}
others = {
    "product of matrices": (768 / 6, product),
    "3 x 3 convolution": (
        2 * filters.numel() * 32 * 44 / (2 * image.nbytes + filters.nbytes),
        convolution,
    ),
}
for name, speed in speeds.items():
    times_as_long = convolution / speed
    print(f"{name:>24}: {times_as_long:6.1f} times as long as a convolution of as many FLOPs")

# %% tags=["hide-input"] mystnb={"image": {"alt": "The measured roofline on logarithmic axes: two slopes, for bytes from cache and from memory, meet a flat ceiling. At half an operation per byte stand the seven versions of the kernel above one another, labelled; far to the right, near the ceiling, a product of matrices and a convolution."}}
schematics.roofline(machine, speeds, intensity=0.5, others=others)

# %% [markdown]
# *Figure {{n}}.4. The roofline of the machine that made this page, with the kernels on it (green), PyTorch's form (grey), and
# two regular operations (violet), at the intensity of each byte moved once.*
#
# Read the figure from below. A kernel far below both slopes is not limited by bytes: it spends its time on
# coordinates, jumps and loops. (PyTorch's form is another matter. It writes every sample to memory, and these bytes
# are not counted here.) Above the dashed line bytes must come from a cache, since memory could not deliver them so
# fast. The solid line is the rate of copying 1 MB, which lies in the second-level cache; what is still in the
# first-level cache comes faster, so a version may even stand above it.
#
# ### Why the published detector is slower than its FLOPs
#
# The same is seen in whole detectors. These are the numbers that the authors measured on one GPU (images per second):
#
# | | GFLOPs | one image at a time | four at a time |
# |---|---|---|---|
# | Faster R-CNN with FPN, convolutions | 180 | 25.6 | 28.0 |
# | Deformable DETR | 173 | 15.0 | 19.4 |
#
# The work is about equal, the time is not. (The paper's table prints 26 and 19: by this table, the
# first is for one image at a time, the second for four.) The reason that {cite}`zhu2021deformable`
# give is the order of accesses to memory. A convolution's reads are known in advance, lie side by
# side, and serve many outputs; here each query computes where it reads. FLOPs count none of that.
# (Other things may add to it, such as many small operations; the published numbers do not tell them
# apart.)

# %% [markdown]
# ## {{n}}.6 Backward: who may write where
#
# In forward every output number has one writer. In backward the gradient of `value` has many, because each query
# that has sampled a pixel adds to that pixel's gradient.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Left, forward: three queries with one arrow each to an output of their own. Middle, backward: arrows from three queries to a row of six pixels; two pixels, in red, get arrows from all three. Right, three boxes: atomic additions, one owner per head, sums of integers."}}
schematics.who_writes()

# %% [markdown]
# *Figure {{n}}.5. Forward gathers, backward scatters. Where several arrows end in one pixel, threads may collide.*
#
# Before you run: at the paper's sizes, how many additions does a pixel of each level get, per head, on average?

# %%
total = sum(h * w for h, w in LEVELS)  # queries; each has K points of 4 corners on each level
for level, (h, w) in enumerate(LEVELS):
    print(f"level {level}: {total * K * 4 / (h * w):5.0f} additions to each pixel and head")

# %% [markdown]
# So a pixel of the coarsest level gets over a thousand additions, from threads that run at the same time. This is how
# one gets lost:

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two rows of boxes along time, thread A and thread B, and between them the number in memory. A reads 5, B reads 5, both compute 5 plus 1, A writes 6, B writes 6. The number should be 7."}}
schematics.lost_addition()

# %% [markdown]
# *Figure {{n}}.6. A data race: both threads read before either writes.*
#
# It can be watched. `build_team` of the last chapter makes each CUDA thread a thread of the operating system. Between reading
# and writing each lets the others go first, as the scheduler does now and then.

# %%
ADDERS = """
__global__ void add(float* sum, int times) {
    for (int i = 0; i < times; i++) { ADDITION }
}
"""
PLAIN = "float read = *sum; std::this_thread::yield(); *sum = read + 1;"
adders = {
    "plain": build_team(fill(ADDERS, ADDITION=PLAIN)),
    "atomic": build_team(fill(ADDERS, ADDITION="atomicAdd(sum, 1);")),
}

# %% [markdown]
# Before you run: four threads make 2,000 additions each. What comes out, plain and atomic?

# %%
# NBVAL_IGNORE_OUTPUT
sums = {name: torch.zeros(1) for name in adders}
for name, run in adders.items():
    run(1, 4, sums[name], 2000)
print({name: int(total) for name, total in sums.items()})
assert sums["plain"] < sums["atomic"] == 8000

# %% [markdown]
# Most plain additions are lost, because usually all four threads read the same number and write back the same sum. In
# a real kernel a race shows itself rarely, so a test may miss it. **ThreadSanitizer** {cite}`serebryany2009tsan`
# watches every access. It reports two threads that touch the same number, at least one of them writing, when no
# barrier or atomic operation orders them, even if the sum came out right. Here is the library's kernel under it, on
# inputs for which each sum must be 128, and once more with a read and a write in place of the atomic addition:

# %%
# NBVAL_IGNORE_OUTPUT
try:
    right, wrong = threads.races(), threads.races(atomic=False)
    print("atomic:", set(right.sums), "report:", right.report or "none")
    print("plain: ", sorted(set(wrong.sums)), "report:", wrong.report.split(" (pid")[0])
    assert not right.report and "data race" in wrong.report and set(right.sums) == {right.expected}
except threads.NoSanitizerError as error:  # a compiler without it
    print("not on this machine:", str(error)[:60])

# %% [markdown]
# There are three ways to be right, and the library uses each of them:
#
# - **Atomic additions**, on the GPU. The hardware adds in its cache, four channels per instruction where it can (from the
#   H100 on). But the order of the additions changes from run to run, and with it the last bits of the sum.
# - **Ownership**, on the CPU. A worker owns whole heads, so nobody else writes there. No atomics are needed, and any
#   number of threads gives the same bits (a test compares them).
# - **Fixed point**, the deterministic mode on the GPU. Each number is turned into an integer before it is added.
#
# The last works because sums of integers do not depend on their order, while those of floats do:

# %%
addends = torch.randn(10_000)
orders = [torch.randperm(10_000) for _ in range(50)]
floats = {np.add.accumulate(addends[order].numpy())[-1].item() for order in orders}
integers = {int((addends[order].double() * 2.0**40).round().long().sum()) for order in orders}
print("50 orders. Sums of floats: several; sums of integers:", len(integers))
assert len(floats) > 1 and len(integers) == 1

# %% [markdown]
# ## Exercise {{n}}.4  A scale for fixed point
#
# *difficulty ●●○ · 20 minutes · 2 lines*
#
# 64-bit integers hold up to $2^{63} - 1$. Each number is multiplied by a scale before it is rounded. Given bounds on the size
# of one addend and on how many there are, return the largest power of two as scale such that no sum can exceed
# $2^{62}$. Bounds may be below one.


# %% tags=["exercise"]
def fixed_point_scale(largest_addend, count):
    """Returns a float, a power of two: largest_addend * count * scale <= 2**62, as large as can be."""
    # BEGIN SOLUTION
    limit = largest_addend * count
    return 2.0 ** (62 - math.ceil(math.log2(limit)))
    # END SOLUTION


check("making_it_fast.4", fixed_point_scale)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The sum is at most `largest_addend * count`. Its logarithm says how many bits it takes.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Round the logarithm up, and subtract it from 62.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# With bounds below one the logarithm is negative, and the scale above $2^{62}$. Counting the bits of a
# whole number stops at zero there. Or you rounded two logarithms up: round that of the product.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.7 What a GPU would do
#
# NVRTC compiles for a GPU without having one. `python -m tests.test_cuda_build` does so for every generation, and
# notes what the compiler says: the **registers** of a thread, the shared memory of a block, and **spills**, numbers
# that found no register (there must be none). While one warp waits for memory, others can run, so it helps if many
# fit. A multiprocessor of the H100 holds up to 2048 threads, 65,536 registers and 228 KB of shared memory. From these
# a folded cell computes how many of the 2048 fit:

# %% tags=["hide-input"]
built = json.loads(Path("../data/results/cuda_build.json").read_text())["kernels"]
for entry in built:
    if (entry["architecture"], entry["D"], entry["deterministic"]) == (90, 32, False):
        t = entry["threads"]  # of a block
        by_registers = 65536 // (t * 8 * math.ceil(entry["registers"] / 8))  # given out by eights
        by_memory = 228 * 1024 // (entry["shared"] + 1024)  # 1 KB of each block is the system's
        share = t * min(2048 // t, by_registers, by_memory) / 2048
        names, registers = f"{entry['dtype']:>8} {entry['kernel']:>8}", entry["registers"]
        print(f"{names}: {registers} registers, {entry['shared']:5} bytes shared, {share:.0%} fit")
assert not any(entry["spilled"] for entry in built)

# %% [markdown]
# More is not always better. A thread can also have several loads under way at once, which takes registers. (The
# backward kernel loads all four corners of a point before `put_sums` shuffles.) Which is faster, only a measurement
# on a GPU can say.

# %% [markdown]
# ## {{n}}.8 A whole detector
#
# Last, the question that decides whether any of this matters: what share of a training step is the operator? Take the
# shipped detector of {{chapter training}} and four copies of the book's seven, forward and backward. We write down
# the operator's calls, and then time the step and the calls alone.

# %%
model, _ = load_model("../data/checkpoints/digits.safetensors")
seven = torch.from_numpy(running_example().copy()).permute(2, 0, 1) / 255
batch = Batch.from_images([seven] * 4)
calls = []


def step():
    """One forward and backward pass."""
    output = model.train()(batch)
    (output.logits.square().mean() + output.boxes.mean()).backward()


def recorded(value, shapes, *inputs):
    """The operator, which writes down what it is given."""
    calls.append((value, shapes, *inputs))
    return ms_deform_attn(value, shapes, *inputs)


attention.ms_deform_attn = recorded
step()
attention.ms_deform_attn = ms_deform_attn
calls = [[x.detach().requires_grad_() if torch.is_tensor(x) else x for x in c] for c in calls]
print(len(calls), "calls of the operator in a step")


# %%
# NBVAL_IGNORE_OUTPUT
def operators():
    """The same calls, forward and backward, and nothing else."""
    for call in calls:
        ms_deform_attn(*call).sum().backward()


for backend in ("reference", "cpu"):
    print("backend:", backend)
    with use_backend(backend):
        pair = race({"step": step, "operator": operators}, rounds=3)
    share = np.median(pair["operator"]) / np.median(pair["step"])
    print(f"{'of the step':>31}: {share:6.0%}")

# %% [markdown]
# "reference" is PyTorch's form, "cpu" the kernel. A faster operator leaves the rest as slow as
# before: convolutions, linear layers, normalisation. That limits the gain, as **Amdahl's law**
# says: where the operator is a tenth of a step, making it twice as fast gains a twentieth.
#
# ## {{n}}.9 Your kernel in the library's tests
#
# A kernel with the name and arguments of `head` above can be put through the tests of the library's own operator: odd
# sizes, borders, coordinates that are not numbers, no queries, several images. It is launched for one image at a
# time, with at least one thread per head, and finds an output of zeros. Write it into a file and run, in the
# repository's folder,
#
# ```
# python -m pytest tests/test_own_kernel.py --kernel my_kernel.cu
# ```
#
# Without `--kernel` it tests step 1 of this chapter, which `tests/own_kernel.cu` contains.

# %% [markdown]
# ## Summary
#
# - The operation moves bytes: half an operation per byte read, and each byte of `value` read 64 times.
# - A simulator of a few lines predicts which layout and order miss least; an ablation shows whether
#   that saves time.
# - A step is faster if it wins in (nearly) every round of a race, not if one number is smaller than another.
# - The operator takes longer than a convolution of as many FLOPs, because its reads are irregular.
# - In backward additions collide. There are three ways out: atomics, ownership, fixed point.
#
# > **Differs from the paper.** Its Table 1 measures whole detectors only. **Differs from the official
# > code.** A lane has 16 bytes instead of 4, coordinates are shared by lanes, one backward kernel
# > serves any D, sums are float32 for half precision, and there is a CPU path.
#
# ## Further reading
#
# - {cite}`williams2009roofline`: the roofline.
# - {cite}`serebryany2009tsan`: how races are found.
# - {cite}`nickolls2008cuda`: why GPUs have warps.
