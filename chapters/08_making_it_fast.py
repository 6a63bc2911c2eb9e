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
# - **place** a kernel under your machine's roofline, and say what limits it,
# - **predict** the faster of two layouts by counting, then time both,
# - **speed** a kernel up step by step: reuse, specialisation, two phases, locality,
# - **watch** a data race lose sums, and avoid it in three ways.
#
# You should know: {{chapter cuda_kernel}}.
#
# {{measured}}
#
# {{map}}

# %% [markdown]
# Times in this chapter are those of the machine that ran it: yours, if you run it. What one may
# assert is what one can count; so this chapter counts first, and times after.

# %%
import ctypes
import json
import math
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from deformable_detr import Batch, ms_deform_attn, use_backend
from deformable_detr.exercises import check
from deformable_detr.exercises.cuda import WORDS, build
from deformable_detr.layers import attention
from deformable_detr.ops import threads
from deformable_detr.ops.build import compiler
from deformable_detr.weights.ours import load_model

plt.style.use("book.mplstyle")
torch.manual_seed(0)
torch.set_num_threads(1)

# %% [markdown]
# ## {{n}}.1 What has to move
#
# The encoder of the paper's detector on an image of 800 by 1066 pixels {cite}`zhu2021deformable`:
# every token of four levels is a query. In float32, each input must be read once and the output
# written once. That is the least any kernel moves.

# %%
LEVELS = [(100, 134), (50, 67), (25, 34), (13, 17)]
M, D, L, K = 8, 32, 4, 4
S = Q = sum(h * w for h, w in LEVELS)
value_bytes = output_bytes = 4 * S * M * D
location_bytes, weight_bytes = 4 * Q * M * L * K * 2, 4 * Q * M * L * K
compulsory = value_bytes + location_bytes + weight_bytes + output_bytes
print(f"{Q} queries, {Q * M * L * K / 1e6:.2f} million points, {compulsory / 1e6:.1f} MB")

# %% [markdown]
# But each point reads four rows of D channels, and value is read over and over. Before you run: how
# many times is each of its bytes read, on average?

# %%
points = Q * M * L * K
gathered = points * 4 * D * 4  # corners, channels, bytes
flops = points * 4 * D * 2  # a multiplication and an addition for each
print(f"gathered {gathered / 1e9:.2f} GB, {gathered / value_bytes:.0f} times value")
print(f"{flops / 1e9:.2f} GFLOP, {flops / gathered:.1f} per byte gathered")
assert gathered / value_bytes == 4 * L * K

# %% [markdown]
# Half an operation for each byte that is read. The next section measures how many your processor could
# do in that time: about one where the byte comes from the cache, several where it comes from memory. So
# this kernel is a matter of **moving**, not of computing, and it matters where the 1.17 GB come from.

# %% [markdown]
# ## {{n}}.2 Your machine's roofline
#
# Three measurements: copying what fits into a cache, copying what does not, and multiplying matrices.


# %%
def best_time(function, repeats=7):
    """Seconds of the fastest call: others were disturbed."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def copy_rate(megabytes, repeats):
    """GB/s read and written by copying an array."""
    source = torch.rand(megabytes * 2**18)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / best_time(lambda: target.copy_(source), repeats) / 1e9


a, b = torch.rand(768, 768), torch.rand(768, 768)
machine = {
    "memory": copy_rate(128, repeats=7),
    "cache": copy_rate(1, repeats=300),
    "GFLOP/s": 2 * 768**3 / best_time(lambda: a @ b) / 1e9,
}

# %%
# NBVAL_IGNORE_OUTPUT
print(platform.machine(), {name: f"{rate:.0f}" for name, rate in machine.items()})
for name in ("cache", "memory"):
    milliseconds, ridge = gathered / machine[name] / 1e6, machine["GFLOP/s"] / machine[name]
    print(f"gathers from {name}: {milliseconds:.0f} ms; {ridge:.1f} operations a byte at the ridge")

# %% mystnb={"image": {"alt": "A roofline on logarithmic axes: two rising lines for cache and memory bandwidth meet a flat ceiling of arithmetic. Three vertical lines: deformable attention with every read counted, at half an operation a byte, left of both ridges; with each byte counted once, at nine; and a product of matrices, each byte once, far to the right."}}
kinds = {
    "every read": (flops / gathered, "C2"),
    "each byte once": (flops / compulsory, "C2"),
    "product of matrices": (768 / 6, "C3"),
}
figure, axis = plt.subplots()
intensity = np.logspace(-2, 3, 100)
for name, style in (("cache", "-"), ("memory", "--")):
    roof = np.minimum(intensity * machine[name], machine["GFLOP/s"])
    axis.loglog(intensity, roof, style, label=name)
for name, (place, colour) in kinds.items():
    axis.axvline(place, color=colour, linewidth=1)
    axis.annotate(
        name,
        (place, machine["GFLOP/s"] / 500),
        xytext=(4, 0),
        textcoords="offset points",
        rotation=90,
    )
axis.set(xlabel="operations a byte", ylabel="GFLOP/s", title="roofline, one thread")
axis.legend()
plt.show()

# %% [markdown]
# *Figure {{n}}.1. The roofline {cite}`williams2009roofline` of the machine that ran this page. What can be
# computed in a second is limited by the slope, bytes, or by the ceiling, arithmetic. Deformable
# attention in green: counted by its reads it lies on the slope of whatever serves them; counted by the bytes that must
# come from memory, to the right of that. (In violet a product of 768 x 768 matrices, each byte once.) So reuse, which is locality, decides which limit holds.*

# %% [markdown]
# ## Exercise {{n}}.1  Bytes of half precision
#
# *difficulty ●○○ · 10 minutes · 4 lines*
#
# Return the least number of bytes that forward moves when value and output have `size` bytes a
# number, and locations and weights stay float32.


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
# ## {{n}}.3 Count, predict, time: the layout
#
# Value can lie as (B, S, M, D), a head's channels side by side, or as (B, M, D, S), a channel's
# pixels side by side. {{chapter cuda_kernel}} counted sectors for a GPU's warp: 4 against 32. A CPU fetches lines
# of 64 bytes; one thread that sums a head's channels for one corner touches D · 4 / 64 = 2 lines in
# the first layout and 32 in the second. So the first one should win.
#
# A smaller image, to keep times short, and locations as an encoder has them: near the query.

# %%
shapes = [(32, 44), (16, 22), (8, 11), (4, 6)]
S = Q = sum(h * w for h, w in shapes)
centres = [
    torch.stack(
        torch.meshgrid((torch.arange(w) + 0.5) / w, (torch.arange(h) + 0.5) / h, indexing="xy"), -1
    )
    for h, w in shapes
]
centres = torch.cat([c.reshape(-1, 2) for c in centres])  # (Q, 2)
offsets = torch.randn(1, Q, M, L, K, 2) * 2  # pixels
locations = centres[:, None, None, None] + offsets / torch.tensor(shapes).flip(1)[:, None]
weights = torch.rand(1, Q, M, L * K).softmax(-1).view(1, Q, M, L, K)
value = torch.randn(1, S, M, D)
expected = ms_deform_attn(value, shapes, locations, weights)

# %% [markdown]
# One kernel, two ways to index. A thread takes a head and adds up its channels in a loop.

# %%
ARGUMENTS = """const float* value, const int* shapes, const float* locations,
    const float* weights, float* output, int S, int Q, int M, int D, int L, int K"""
HEAD = """
__global__ void head(ARGUMENTS) {
    int item = blockIdx.x * blockDim.x + threadIdx.x;
    if (item >= Q * M) return;
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
                for (int d = 0; d < D; d++)
                    output[item * D + d] += weight * value[INDEX];
            }
        }
        start += H * W;
    }
}
"""

# %%
X86 = platform.machine() in ("x86_64", "AMD64")
NATIVE = "-march=native" if X86 else "-mcpu=native"
OPTIMISE = ("-O3", NATIVE, "-fno-math-errno", "-fno-trapping-math")
LAYOUTS = {"channels last": "(token * M + m) * D + d", "channels first": "(m * D + d) * S + token"}


def compile_kernel(text, threads=1, **macros):
    """The kernel `head` with ARGUMENTS and other names replaced: run(value) -> (1, Q, M * D).

    threads: in a block; there are Q * M blocks."""
    for name, meaning in {**macros, "ARGUMENTS": ARGUMENTS}.items():
        text = text.replace(name, meaning)
    kernel, sizes = build(text, "head", OPTIMISE), torch.tensor(shapes, dtype=torch.int32)

    def run(value):
        output = torch.zeros(1, Q, M * D)
        kernel(Q * M, threads, value, sizes, locations, weights, output, S, Q, M, D, L, K)
        return output

    return run


# %%
values = {"channels last": value, "channels first": value[0].permute(1, 2, 0).contiguous()}
by_layout = {name: compile_kernel(HEAD, INDEX=index) for name, index in LAYOUTS.items()}
for name, run in by_layout.items():
    torch.testing.assert_close(run(values[name]), expected, atol=1e-5, rtol=1e-5)
lines = {"channels last": D * 4 // 64, "channels first": D}
print(lines, "lines a corner")


# %%
def race(functions, rounds=5):
    """Milliseconds of the fastest call each; order shuffled, since who goes first looks slower."""
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name in random.sample(list(functions), len(functions)):
            start = time.perf_counter()
            functions[name]()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: min(given) for name, given in times.items()}


# %%
# NBVAL_IGNORE_OUTPUT
layouts = race({name: (lambda n=name: by_layout[n](values[n])) for name in LAYOUTS})
for name, milliseconds in layouts.items():
    print(f"{name:>15}: {milliseconds:6.1f} ms")

# %% [markdown]
# The count says who wins, not by how much: a line that a neighbour has fetched is still in the cache.

# %% [markdown]
# ## Exercise {{n}}.2  Sectors before seconds
#
# *difficulty ●●○ · 15 minutes · 3 lines*
#
# A warp of 32 threads reads one corner's channels. Given strides counted in numbers, not bytes, how many
# 32-byte sectors does its request touch? Thread t reads channel t of head `t // D` counted from head 0.


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
# **Step 0** is {{chapter cuda_kernel}}'s naive kernel, one thread a channel: all coordinates are computed D times.
# **Step 1** is the kernel above, one thread a head: once. Count what that saves: a point's position
# and corners take about 30 operations, its share of a channel 8.

# %%
NAIVE = """
__global__ void head(ARGUMENTS) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= Q * M * D) return;
    int item = i / D, d = i % D, m = item % M, start = 0;
    float sum = 0;
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
                sum += weight * value[((start + v * W + u) * M + m) * D + d];
            }
        }
        start += H * W;
    }
    output[i] = sum;
}
"""
print("operations a point:", D * (30 + 8), "and", 30 + D * 8)

# %% [markdown]
# **Step 2: say what is constant.** A loop of D turns with D unknown needs a counter, a comparison and
# code for every remainder. With `D` a number in the source, the compiler unrolls it into vector
# instructions. Compiling at run time makes that cheap to have: one build for each D, L and K.
#
# **Step 3: two phases.** Even unrolled, each corner asks four questions (inside?) and ends in a jump
# that the processor may guess wrong. So first compute all points' corners without a jump: an outside
# corner gets weight zero, and an address that exists. Then run over channels with nothing but
# multiply-adds, sums in registers.

# %%
TWO_PHASES = """
typedef float Vector __attribute__((vector_size(32), aligned(4), may_alias));  // eight floats
__global__ void head(ARGUMENTS) {
    int item = blockIdx.x * blockDim.x + threadIdx.x;
    if (item >= Q * M) return;
    int offset[4][L * K];
    float corner[4][L * K];
    for (int l = 0, start = 0; l < L; start += shapes[2 * l] * shapes[2 * l + 1], l++) {
        int H = shapes[2 * l], W = shapes[2 * l + 1];
        for (int k = 0; k < K; k++) {
            int i = l * K + k, p = item * L * K + i;
            float x = locations[2 * p] * W - 0.5f, y = locations[2 * p + 1] * H - 0.5f;
            bool inside = (x > -1) & (x < W) & (y > -1) & (y < H);
            x = inside ? x : 0, y = inside ? y : 0;
            int left = floorf(x), top = floorf(y);
            float fx = x - left, fy = y - top, a = inside ? weights[p] : 0;
            float wx[2] = {left >= 0 ? 1 - fx : 0, left + 1 < W ? fx : 0};
            float wy[2] = {top >= 0 ? 1 - fy : 0, top + 1 < H ? fy : 0};
            int u[2] = {std::max(left, 0), std::min(left + 1, W - 1)};
            int v[2] = {std::max(top, 0), std::min(top + 1, H - 1)};
            for (int c = 0; c < 4; c++) {
                offset[c][i] = ((start + v[c / 2] * W + u[c % 2]) * M + item % M) * D;
                corner[c][i] = a * wy[c / 2] * wx[c % 2];
            }
        }
    }
    Vector sum[D / 8] = {};
    for (int i = 0; i < L * K; i++)
        for (int c = 0; c < 4; c++) {
            const Vector* row = (const Vector*)(value + offset[c][i]);
#pragma GCC unroll 8
            for (int j = 0; j < D / 8; j++) sum[j] += corner[c][i] * row[j];
        }
    for (int j = 0; j < D / 8; j++) *((Vector*)(output + item * D) + j) = sum[j];
}
"""

# %% [markdown]
# The constants go in as text, which is what NVRTC's `-DD=32` does.


# %%
def constant(text):
    """The kernel with the sizes written in."""
    body = text.split("ARGUMENTS", 1)
    for name, number in (("D", D), ("L", L), ("K", K), ("M", M)):
        body[1] = re.sub(rf"\b{name}\b", str(number), body[1])
    return body[0] + "ARGUMENTS" + body[1]


steps = {
    "0 a thread a channel": compile_kernel(NAIVE, threads=D),
    "1 a thread a head": by_layout["channels last"],
    "2 constant sizes": compile_kernel(constant(HEAD), INDEX=f"(token * {M} + m) * {D} + d"),
    "3 two phases": compile_kernel(constant(TWO_PHASES)),
    "4 the library": lambda value: ms_deform_attn(value, shapes, locations, weights, backend="cpu"),
    "PyTorch": lambda value: ms_deform_attn(value, shapes, locations, weights, backend="reference"),
}
for step in steps.values():
    torch.testing.assert_close(step(value), expected, atol=1e-5, rtol=1e-5)
print(len(steps), "ways, one result")

# %%
# NBVAL_IGNORE_OUTPUT
with torch.no_grad():
    ladder = race({name: (lambda s=step: s(value)) for name, step in steps.items()})
read = 4 * Q * M * L * K * 4 * D  # bytes, counting every read
for name, milliseconds in ladder.items():
    times, rate = ladder["PyTorch"] / milliseconds, read / milliseconds / 1e6
    print(f"{name:>22}: {milliseconds:7.2f} ms, {times:5.1f} x PyTorch, {rate:5.1f} GB/s read")

# %% mystnb={"image": {"alt": "Horizontal bars of milliseconds for six versions of one operation on a logarithmic axis, from one thread a channel, the slowest kernel, step by step down to the library's, with PyTorch's grid_sample form beside them."}}
figure, axis = plt.subplots(figsize=(7, 2.8))
bars = axis.barh(list(ladder), list(ladder.values()), color=["C0"] * 5 + ["C1"])
axis.bar_label(bars, fmt="%.1f", padding=3)
right = 2 * max(ladder.values())
axis.set(xscale="log", xlim=(1, right), xlabel="milliseconds, one thread (logarithmic)")
axis.xaxis.set_major_formatter("{x:g}")
axis.xaxis.set_minor_formatter("")
axis.invert_yaxis()
plt.show()

# %% [markdown]
# *Figure {{n}}.2. The ladder on the machine that made this page, with PyTorch's form in the other colour.
# Look which step gained most; on another processor it may be another.*
#
# Step 1 is the kernel of section {{n}}.3: if its time is another one here, that is how far to trust such times.
# The printed rates place each version under the roofline: the limit is the cache's slope, and the first
# steps are far below it, because they compute more than they move. Step 1 may gain more than the count of 4:
# the compiler can then also turn the loop over channels into vectors.
#
# **Step 4: locality.** The library's build adds two things that only help together: it goes through the
# queries head by head, and first copies the head's channels of all tokens into one gapless piece. In (B, S, M, D) a head's rows lie M · D
# floats apart, and a cache that maps addresses to a few places finds room for few of them at once.

# %%
set_bytes = 64 * 64  # a first-level cache of 64 sets of 64-byte lines repeats every 4 KiB


def sets(stride):
    """How many of the 64 sets 64 rows of two lines use, `stride` bytes apart."""
    return len({(t * stride + byte) % set_bytes // 64 for t in range(64) for byte in (0, 64)})


print(f"rows {4 * M * D} bytes apart use {sets(4 * M * D)} sets, rows without gaps {sets(4 * D)}")
assert (sets(4 * M * D), sets(4 * D)) == (8, 64)

# %% [markdown]
# Measured against others by `make bench`, in one process and shuffled order
# (`data/results/operator_cpu.json`): how many times as long as the library they take, with one thread, at the
# paper's encoder and decoder, and at the size of a small training. Much of PyTorch's time goes into fetching fresh memory, so
# it is measured twice, the second time with an allocator that keeps what it has.

# %%
results = json.loads(Path("../data/results/operator_cpu.json").read_text())
ratios = {
    (r["shape"], r["mode"], r["peer"], r["allocator"]): r["times"]
    for r in results["ratios"]
    if r["threads"] == 1
}
pytorch, package = "official, pure PyTorch", "torch-ms-deform-attn"
print(f"{'':29}{'PyTorch':>8}{'kept':>8}  {package}")
for shape in ("encoder", "decoder", "training"):
    for mode in ("forward", "forward + backward"):
        slow = [ratios[shape, mode, pytorch, allocator] for allocator in ("default", "kept")]
        other = ratios[shape, mode, package, "default"]
        print(f"{shape:>8}  {mode:<19}{slow[0]:>8.1f}{slow[1]:>8.1f}{other:>8.1f}")

# %% [markdown]
# ## Exercise {{n}}.3  Reuse
#
# *difficulty ●●○ · 20 minutes · 20 lines*
#
# Write the middle way: a thread takes one **point** of a head and adds its share to the output, all
# channels. Coordinates are computed once, but threads of one head now share an output: on a GPU the
# additions would have to be atomic. On the CPU, one after the other, `+=` will do.


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
# Take the kernel `HEAD` and turn its two loops over levels and points into the thread's number:
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
# ## {{n}}.5 Backward: who may write where
#
# Forward, each output number has one writer. Backward, the gradient of value is different: every
# query that sampled a pixel adds to it. How many?

# %%
for level, (h, w) in enumerate(LEVELS):
    tokens = sum(a * b for a, b in LEVELS)
    print(f"level {level}: {tokens * K * 4 / (h * w):5.0f} additions to each pixel and head")

# %% [markdown]
# So the coarsest pixels get over a thousand additions each, from threads that run at the same time.
# What happens without care can be watched. Threads of the operating system add 1 to one number; in
# between reading and writing, each lets the others go first, as the scheduler does now and then.

# %%
ADDERS = """
#include <atomic>
#include <thread>
#include <vector>
extern "C" float add(int threads, int times, int atomic) {
    std::atomic<float> shared{0};
    auto work = [&] {
        for (int i = 0; i < times; i++) {
            if (atomic) { shared.fetch_add(1); continue; }
            float read = shared;
            std::this_thread::yield();
            shared = read + 1;
        }
    };
    std::vector<std::thread> all;
    for (int t = 0; t < threads; t++) all.emplace_back(work);
    for (auto& thread : all) thread.join();
    return shared;
}
"""
with tempfile.TemporaryDirectory() as folder:
    source, library = Path(folder, "adders.cpp"), Path(folder, "adders.so")
    source.write_text(ADDERS)
    command = [*compiler(), "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", str(source)]
    subprocess.run([*command, "-o", str(library)], check=True)
    adders = ctypes.CDLL(str(library))
adders.add.restype = ctypes.c_float

# %% [markdown]
# Before you run: four threads, 2,000 additions each. What comes out, plain and atomic?

# %%
# NBVAL_IGNORE_OUTPUT
plain, atomic = adders.add(4, 2000, 0), adders.add(4, 2000, 1)
print(f"plain {plain:.0f}, atomic {atomic:.0f}")
assert plain < atomic == 8000

# %% [markdown]
# Additions are lost whenever two threads read the same old number. **ThreadSanitizer**
# {cite}`serebryany2009tsan` finds such places where plain runs need luck: it watches every access and
# reports two that nothing orders. Our kernel, every CUDA thread an operating-system thread, passes it; with the
# atomic addition replaced by a read and a write it does not:

# %%
# NBVAL_IGNORE_OUTPUT
try:
    right, wrong = threads.races(), threads.races(atomic=False)
    assert not right.report and "data race" in wrong.report
    assert set(right.sums) == {right.expected}
    print("atomic:", set(right.sums), "each, no report")
    print("plain: ", sorted(set(wrong.sums)), "and this report:\n")
    accesses = wrong.report.split("\n\n  Location")[0]
    print(re.sub(r" at 0x\w+| \(pid=\d+\)", "", accesses))
except threads.NoSanitizerError as error:  # a compiler without it
    print("not on this machine:", str(error)[:60])

# %% [markdown]
# Three ways to be right:
#
# - **Atomic additions**, on the GPU. They are fast where the hardware adds in the cache, and the
#   kernel asks for four channels in one instruction where it can (sm_90). But their order changes
#   from run to run, and floating-point sums with it.
# - **Ownership**, on the CPU: a worker owns whole heads, so nobody else writes there. No atomics, and
#   the same bits for any number of threads.
# - **Fixed point**, the deterministic mode on the GPU: turn each addend into an integer. Integer sums
#   do not depend on order.

# %%
addends = torch.randn(10_000)
orders = [torch.randperm(10_000) for _ in range(50)]
floating = {np.add.accumulate(addends[order].numpy())[-1].item() for order in orders}
scale = 2.0**40
integers = {int((addends[order].double() * scale).round().long().sum()) for order in orders}
print("floats: several sums; integers:", len(integers))
assert len(floating) > 1 and len(integers) == 1

# %% [markdown]
# And here the CPU kernel's gradients, with one and with two threads, bit for bit:

# %%
leaves = [x.clone().requires_grad_() for x in (value, locations, weights)]
gradients = {}
for count in (1, 2):
    torch.set_num_threads(count)
    output = ms_deform_attn(leaves[0], shapes, *leaves[1:], backend="cpu")
    gradients[count] = torch.autograd.grad(output.square().sum(), leaves)
torch.set_num_threads(1)
assert all(torch.equal(a, b) for a, b in zip(gradients[1], gradients[2], strict=True))
print("the same bits")

# %% [markdown]
# ## Exercise {{n}}.4  A scale for fixed point
#
# *difficulty ●●● · 20 minutes · 2 lines*
#
# 64-bit integers hold up to $2^{63} - 1$. Given bounds on the size of one addend and on their number,
# return the largest power of two as scale such that no sum can exceed $2^{62}$.


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
# ## {{n}}.6 What the compiler made of it
#
# NVRTC needs no GPU to compile. `python -m tests.test_cuda_build` builds the kernels of four types and three
# sizes of head for every architecture from sm_75 on (the tests a part of them), and reads what the compiler
# reports: registers a thread, memory shared by a block, and **spills**, numbers that did not fit into registers
# and go to memory (there must be none). For the H100's generation, sm_90, the tests also read the instructions.
# From the record:

# %%
built = json.loads(Path("../data/results/cuda_build.json").read_text())
row = "{:>9} {:>9} {:>10} {:>7} {:>9}"
print(row.format("value", "kernel", "registers", "shared", "resident"))
for entry in built["kernels"]:
    if (entry["architecture"], entry["D"], entry["deterministic"]) == (90, 32, False):
        t = entry["threads"]  # of a block; an sm_90 multiprocessor holds, of each:
        by_registers = 65536 // (t * 8 * math.ceil(entry["registers"] / 8))  # given out by eights
        by_memory = 228 * 1024 // (entry["shared"] + 1024)  # 1 KiB of a block is the system's
        resident = t * min(2048 // t, by_registers, by_memory) / 2048
        values = (entry[k] for k in ("dtype", "kernel", "registers", "shared"))
        print(row.format(*values, f"{resident:.0%}"))
assert not any(entry["spilled"] for entry in built["kernels"])

# %% [markdown]
# The last column is *computed*: which part of the 2048 threads that a multiprocessor can hold finds room.
# While a load is under way, others' threads can run, so more is better. But a thread can also have several
# loads under way, which takes registers. The backward kernel sums a point's four inner products after the
# loop over its corners, and in the instructions for sm_90 all four loads of 16 bytes stand before the first
# shuffle (a test asserts it). With the sums inside that loop, each load would wait for the last one's sum,
# and one would do with fewer registers. Which is faster, a GPU must say.
#
# Another count, of **banks**: shared memory has 32 columns of 4 bytes, and answers a warp's addresses at
# once if they are equal or lie in different columns. The four heads of a warp read their own corner of the
# same point: an offset and a weight of 4 bytes for each of 4 corners and 16 points lie between two heads.
# Before you run: how many columns do the four addresses lie in, and what does one number of padding behind
# each head's corners change?

# %%
head_bytes = 4 * 16 * (4 + 4)
for padding in (0, 4):
    banks = {head * (head_bytes + padding) // 4 % 32 for head in range(4)}
    print(f"{padding} bytes of padding: {len(banks)} of 4 banks")
assert len(banks) == 4

# %% [markdown]
# On the CPU you can look yourself. On x86 a multiply-add can take an operand straight from memory, and
# that is the whole inner loop: fetch eight channels, multiply, add, in one instruction. (Others load first.)

# %%
# NBVAL_IGNORE_OUTPUT
flags = ["-std=c++17", *OPTIMISE, "-S", "-o", "-", "-x", "c++", "-"]
text = WORDS + constant(TWO_PHASES).replace("ARGUMENTS", ARGUMENTS)
listing = subprocess.run([*compiler(), *flags], input=text, capture_output=True, text=True).stdout
fused = [line.strip() for line in listing.splitlines() if re.search(r"fmadd.*\(%r[^i].*ymm", line)]
print(len(fused), "multiply-adds from memory", *fused[:4], sep="\n")

# %% [markdown]
# ## {{n}}.7 Where the time goes in a whole detector
#
# The digits' detector of {{chapter training}}, a batch of eight, once with PyTorch's form and once with the
# kernel. How much of forward and backward is the operator? To know, write down its calls, and repeat
# them alone.

# %%
model, _ = load_model("../data/checkpoints/digits.safetensors")
batch = Batch.from_images([torch.randn(3, 128, 128) for _ in range(8)])


def step():
    """One forward and backward pass."""
    output = model.train()(batch)
    (output.logits.square().mean() + output.boxes.mean()).backward()


calls = []


def recorded(value, shapes, *inputs):
    """The operator, which writes down what it is given."""
    calls.append((value, shapes, *inputs))
    return ms_deform_attn(value, shapes, *inputs)


attention.ms_deform_attn = recorded
step()
attention.ms_deform_attn = ms_deform_attn
calls = [[x.detach().requires_grad_() if torch.is_tensor(x) else x for x in c] for c in calls]
print(len(calls), "calls of the operator in a step")


def operators():
    """The same calls, forward and backward, and nothing else."""
    for call in calls:
        ms_deform_attn(*call).sum().backward()


# %%
# NBVAL_IGNORE_OUTPUT
def forced(name, function):
    """A call of the function with this backend."""

    def run():
        with use_backend(name):
            function()

    return run


parts = race(
    {
        (name, f.__name__): forced(name, f)
        for name in ("reference", "cpu")
        for f in (step, operators)
    },
    rounds=3,
)
for name in ("reference", "cpu"):
    whole, part = parts[name, "step"], parts[name, "operators"]
    print(
        f"{name:>9}: a step {whole:4.0f} ms, of which the operator {part:4.0f}: {part / whole:.0%}"
    )

# %% [markdown]
# A faster operator makes the rest visible: convolutions, linear layers, normalisation. This is
# Amdahl's law, and the reason to stop: where the operator is a tenth of a step, making it twice as
# fast gains a twentieth.
#
# ## {{n}}.8 Your kernel in the library's tests
#
# Write `__global__ void head(...)`, with the arguments of `HEAD`, into a file. It gets one thread a head
# (Q · M, and some too many), one image at a time, and an output of zeros. One command, in the
# repository's folder, compares it with the plain loops that the library's operator is compared with: odd sizes, borders,
# coordinates that are not numbers, no queries, several images.
#
# ```
# python -m pytest tests/test_own_kernel.py --kernel my_kernel.cu
# ```
#
# Here with `HEAD` itself, channels last:

# %%
with tempfile.TemporaryDirectory() as folder:
    mine = Path(folder, "my_kernel.cu")
    mine.write_text(HEAD.replace("ARGUMENTS", ARGUMENTS).replace("INDEX", LAYOUTS["channels last"]))
    command = [sys.executable, "-m", "pytest", "tests/test_own_kernel.py", "--kernel", str(mine)]
    result = subprocess.run(
        [*command, "-q", "-p", "no:cacheprovider"], cwd="..", capture_output=True, text=True
    )
print(re.search(r"\d+ passed", result.stdout)[0])

# %% [markdown]
# ## Summary
#
# - The operation moves bytes: 64 reads of a value byte on average, half an operation for each byte read.
# - Count lines and sectors; the layout with fewer wins before anyone takes the time.
# - Compute coordinates once, say what is constant, leave no branch in the hot loop, keep neighbours
#   near: each step shows on the ladder.
# - Backward, additions collide: atomics, ownership, or fixed point.
# - After that the operator is no longer what takes the time.
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
