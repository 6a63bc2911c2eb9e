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
# - **write** a CUDA kernel for deformable attention, one thread a number, and run it without a GPU,
# - **stop** inside one thread and read its variables,
# - **trace** which thread reads which address, and count what that costs a GPU,
# - **read** the library's kernel: lanes, shared memory, shuffles, barriers, atomic additions,
# - **say** what changes on a real GPU.
#
# You should know: multi-scale deformable attention ({{chapter many_scales}}). C helps; what is needed is explained.
#
# {{measured}}
#
# {{map}}

# %% [markdown]
# Every detector of this family spends much of its time in one operation: fetch a few rows of
# numbers from computed places, and sum them by weight. PyTorch can do it with `grid_sample`, and
# writes hundreds of megabytes on the way. A kernel of our own writes only the result. This chapter
# writes one, the next makes it fast.
#
# No GPU is needed, because **CUDA C++ is C++** with a handful of words added. Supply those words, and
# the compiler of your laptop builds the same text.

# %%
import ctypes
import re
import subprocess
import tempfile
from importlib import resources
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from deformable_detr import ms_deform_attn
from deformable_detr.exercises import check
from deformable_detr.ops import cuda, threads
from deformable_detr.ops.build import compiler

plt.style.use("book.mplstyle")
_ = torch.manual_seed(0)

# %% [markdown]
# ## {{n}}.1 A grid of threads
#
# A kernel is a function that many threads run, each with its own number. Threads come in **blocks**,
# blocks in a **grid**. A thread finds its place from variables that nobody passes to it: `blockIdx`, its
# block's number; `threadIdx`, its own number in the block; `blockDim`, how many threads a block has. (A
# fourth, `gridDim`, counts the blocks.) That is nearly all there is to the language:

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
# The words that a C++ compiler lacks: `__global__`, and the four variables. The rest of this text
# is for later: `WATCH` and `READ` write down what a thread does, as a debugger would show it.

# %%
WORDS = r"""
#include <cmath>
#define __global__
struct Dim { int x, y, z; };
static Dim threadIdx, blockIdx, blockDim, gridDim;

extern "C" { int watched = -1, notes = 0, reads = 0;
             const char* names[4096]; double values[4096]; long long trace[1 << 16][2]; }
static int me() { return blockIdx.x * blockDim.x + threadIdx.x; }
#define WATCH(x) if (me() == watched && notes < 4096) { names[notes] = #x; values[notes++] = x; }
template <typename T> const T& read(const T& x) {
    if (reads < 1 << 16) { trace[reads][0] = me(); trace[reads++][1] = (long long)&x; }
    return x;
}
#define READ(x) read(x)
"""

# %% [markdown]
# And a grid? Two loops. A GPU runs the threads side by side and in no order that you can rely on;
# a kernel that is right must not care, so one after the other will do.


# %%
def build(kernel):
    """The text of a kernel, compiled: run(blocks, threads, *arguments), and the library."""
    name, parameters = re.search(r"__global__ void (\w+)\((.*?)\)", kernel, re.S).groups()
    arguments = ", ".join(p.split()[-1].lstrip("*") for p in parameters.split(","))
    launch = f"""extern "C" void launch(int blocks, int threads, {parameters}) {{
        gridDim.x = blocks, blockDim.x = threads;
        for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
            for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++) {name}({arguments});
    }}"""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "kernel.cpp"), Path(folder, "kernel.so")
        source.write_text(WORDS + kernel + launch)
        flags = ["-std=c++17", "-O1", "-shared", "-fPIC"]
        command = [*compiler(), *flags, str(source), "-o", str(library)]
        subprocess.run(command, check=True)
        loaded = ctypes.CDLL(str(library))
    return lambda *given: loaded.launch(*map(as_c, given)), loaded


def as_c(x):
    """A tensor becomes its address, a number stays one."""
    return ctypes.c_void_p(x.data_ptr()) if isinstance(x, torch.Tensor) else ctypes.c_int(x)


# %% [markdown]
# Before you run: ten numbers, blocks of four threads. How many blocks does it take, and what do the
# last two threads of the last one do?

# %%
run, _ = build(KERNEL)
block, thread = torch.full((10,), -1, dtype=torch.int32), torch.full((10,), -1, dtype=torch.int32)
run(3, 4, block, thread, 10)
print("block ", *block.tolist())
print("thread", *thread.tolist())
assert block.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
assert thread.tolist() == [0, 1, 2, 3] * 2 + [0, 1]

# %% [markdown]
# Three blocks make twelve threads. Two find `i >= n` and return: the **tail guard**. Without it they
# would write behind the array's end.

# %% [markdown]
# ## Exercise {{n}}.1  A kernel of your own
#
# *difficulty ●○○ · 10 minutes · 7 lines*
#
# Return the text of a kernel that multiplies each row of `x`, (rows, D), by its weight, one thread a
# number. Call it `weighted_rows`; more threads than numbers may come.


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
# There are `rows * D` threads with work. Number `i` of `x`, row after row, lies in row `i / D`.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# The kernel of section {{n}}.1 with another last line. Integer division rounds down.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# The first one launches exactly `rows * D` threads, the second launches more: the tail guard.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.2 One output by hand
#
# One query, one head, one level of 2 by 3 pixels with two channels, one point. Channel 0 of a pixel
# is 10 times its row plus its column, channel 1 is its negative.

# %%
height, width = 2, 3
value = torch.tensor(
    [[[[10.0 * y + x], [-10.0 * y - x]] for y in range(height) for x in range(width)]]
)
value = value.reshape(1, height * width, 1, 2)  # (B, S, M, D)
location = torch.tensor([0.6, 0.4]).reshape(1, 1, 1, 1, 1, 2)  # (B, Q, M, L, K, 2)
weight = torch.tensor(0.5).reshape(1, 1, 1, 1, 1)

# %% [markdown]
# Before you run, with a pencil: x = 0.6 · 3 − 0.5 = 1.3 and y = 0.4 · 2 − 0.5 = 0.3. The map is
# linear, so the sample is 10 · 0.3 + 1.3 = 4.3, and half of it is the answer.

# %%
output = ms_deform_attn(value, [(height, width)], location, weight)
print([round(x, 3) for x in output.flatten().tolist()])
assert torch.allclose(output.flatten(), torch.tensor([2.15, -2.15]))

# %% [markdown]
# ## {{n}}.3 One thread, one number
#
# The official kernel of {cite}`zhu2021deformable` gives each of the B · Q · M · D output numbers a
# thread. Here is that idea, written plainly. A thread finds out who it is, then walks through levels
# and points. Reads of arrays go through `READ`, which on a GPU would be nothing.

# %%
NAIVE = r"""
__global__ void naive(const float* value, const int* shapes, const float* locations,
                      const float* weights, float* output, int B, int S, int Q, int M, int D,
                      int L, int K) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= B * Q * M * D) return;
    int d = i % D;
    int m = i / D % M;
    int b = i / D / M / Q;
    int item = i / D;
    float sum = 0;
    int start = 0;
    for (int l = 0; l < L; l++) {
        int H = READ(shapes[2 * l]);
        int W = READ(shapes[2 * l + 1]);
        for (int k = 0; k < K; k++) {
            int p = (item * L + l) * K + k;
            float x = READ(locations[2 * p]) * W - 0.5f;
            float y = READ(locations[2 * p + 1]) * H - 0.5f;
            float attention = READ(weights[p]);
            if (!(x > -1 && x < W && y > -1 && y < H)) continue;
            int left = floorf(x);
            int top = floorf(y);
            for (int corner = 0; corner < 4; corner++) {
                int u = left + corner % 2;
                int v = top + corner / 2;
                if (u < 0 || u >= W || v < 0 || v >= H) continue;
                float bilinear = (1 - fabsf(x - u)) * (1 - fabsf(y - v));
                int token = b * S + start + v * W + u;
                float number = READ(value[(token * M + m) * D + d]);
                sum += attention * bilinear * number;
            }
        }
        start += H * W;
    }
    output[i] = sum;
}
"""

# %% [markdown]
# `!(x > -1 && ...)` looks clumsy. It is written so that a coordinate that is not a number, for which
# every comparison is false, is skipped too.


# %%
def run_naive(kernel, value, shapes, locations, weights, threads=32):
    """The arguments of ms_deform_attn, and threads in a block; returns (B, Q, M * D)."""
    B, S, M, D = value.shape
    _, Q, _, L, K, _ = locations.shape
    output = torch.zeros(B, Q, M * D)
    sizes = torch.tensor(shapes, dtype=torch.int32)
    blocks = -(-output.numel() // threads)  # rounded up
    kernel(blocks, threads, value, sizes, locations, weights, output, B, S, Q, M, D, L, K)
    return output


naive, library = build(NAIVE)
by_thread = run_naive(naive, value, [(height, width)], location, weight)
print([round(x, 3) for x in by_thread.flatten().tolist()])

# %% [markdown]
# The same on sizes that are all different, with some points outside, against the library:

# %%
shapes, B, Q, M, D, K = [(5, 7), (3, 4), (1, 2)], 2, 5, 7, 6, 4
S, L = sum(h * w for h, w in shapes), len(shapes)
value = torch.randn(B, S, M, D)
locations = torch.rand(B, Q, M, L, K, 2) * 1.4 - 0.2
weights = torch.rand(B, Q, M, L * K).softmax(-1).view(B, Q, M, L, K)
expected = ms_deform_attn(value, shapes, locations, weights)
for number in (1, 32, 50):  # threads in a block: the result must not care
    result = run_naive(naive, value, shapes, locations, weights, number)
    torch.testing.assert_close(result, expected)
print(B * Q * M * D, "threads, equal")

# %% [markdown]
# ## {{n}}.4 Stop inside a thread
#
# `cuda-gdb` stops one thread of thousands and shows its variables. On the CPU any debugger can:
# build with `-g -O0` and set a breakpoint. Here we let the kernel itself say what a debugger would,
# by putting `WATCH(x)` behind every line that defines an `x`.


# %%
def watch(kernel):
    """The kernel with a WATCH behind each definition that stands on a line of its own."""
    return re.sub(r"^( +(?:int|float) (\w+) = [^;]+;)$", r"\1 WATCH(\2)", kernel, flags=re.M)


print(next(line.strip() for line in watch(NAIVE).splitlines() if "attention =" in line))

# %% [markdown]
# Thread 303 of our 420. Before you run: which image, query, head and channel is that? Count from the
# back: D = 6, M = 7, Q = 5.

# %%
watched, library = build(watch(NAIVE))
ctypes.c_int.in_dll(library, "watched").value = 303
run_naive(watched, value, shapes, locations, weights)
notes = ctypes.c_int.in_dll(library, "notes").value
names = (ctypes.c_char_p * 4096).in_dll(library, "names")[:notes]
values = (ctypes.c_double * 4096).in_dll(library, "values")[:notes]
steps = [(name.decode(), value) for name, value in zip(names, values, strict=True)]
for name, number in steps[:22]:
    print(f"{name:>9} = {number:g}" if number == int(number) else f"{name:>9} = {number:.3f}")

# %% [markdown]
# Channel 3 of head 1, and it belongs to item 50, which is query 2 of image 1: `item` counts
# (b · Q + q) · M + m. Then comes the first point, at x = −1.009: more than a pixel outside, so it is
# skipped. The second, p = 601, counts, and its corners follow. A watch is a test as well:

# %%
first = dict(reversed(steps))  # the first value that each name had
assert (first["d"], first["m"], first["b"]) == (303 % 6, 303 // 6 % 7, 303 // 6 // 7 // 5)
assert first["item"] == 50
assert sum(n for name, n in steps if name == "attention") > 0.999  # all L * K points were visited

# %% [markdown]
# ## {{n}}.5 Who reads which address
#
# A GPU runs 32 threads together, a **warp**. When they read, their 32 addresses go out as one
# request, and memory answers in **sectors** of 32 bytes. Threads that read neighbours share sectors;
# threads that read far apart need one each. So what matters is who reads what *at the same time*.
#
# Our loop ran the threads one by one, but the n-th read of each of them is the same line of code,
# which a warp would run together.


# %%
def requests(library, warp=0):
    """The reads of a warp, (requests, 32) addresses; all of its threads must read in one order."""
    count = ctypes.c_int.in_dll(library, "reads").value
    trace = np.ctypeslib.as_array((ctypes.c_longlong * (2 << 16)).in_dll(library, "trace"))
    thread, address = trace[: 2 * count].reshape(-1, 2).T
    own = [address[thread == 32 * warp + t] for t in range(32)]
    shortest = min(map(len, own))
    return np.stack([a[:shortest] for a in own], 1)


# %% [markdown]
# A head of 32 channels, as in the paper's detector: a warp is one head, a thread a channel, and all do
# the same. All points lie inside, so that each has four corners to read.

# %%
shapes, B, Q, M, D, K = [(6, 8), (3, 4)], 1, 2, 4, 32, 2
S, L = sum(h * w for h, w in shapes), len(shapes)
value = torch.randn(B, S, M, D)
locations = torch.rand(B, Q, M, L, K, 2) * 0.6 + 0.2
weights = torch.rand(B, Q, M, L * K).softmax(-1).view(B, Q, M, L, K)
naive, library = build(NAIVE)
result = run_naive(naive, value, shapes, locations, weights)
torch.testing.assert_close(result, ms_deform_attn(value, shapes, locations, weights))
addresses = requests(library)
inside = (addresses >= value.data_ptr()) & (addresses < value.data_ptr() + 4 * value.numel())
of_value, of_others = addresses[inside.all(1)], addresses[~inside.any(1)]
print(len(of_value), "requests for value,", len(of_others), "for everything else")
assert len(of_value) == L * K * 4 and len(of_others) == 2 * L + 3 * L * K

# %% mystnb={"image": {"alt": "Two panels of dots, thread number across, address up. Left: for value, each request is a rising line of 32 neighbouring addresses. Right: for locations, weights and shapes each request is a flat line, all threads read one address."}}
figure, axes = plt.subplots(1, 2, sharey=True)
for axis, part, title in zip(axes, (of_value, of_others), ("value", "all else"), strict=True):
    for n, row in enumerate(part[:6]):  # each request drawn above the one before
        axis.plot(40 * n + (row - row.min()) // 4, ".", markersize=4)
    axis.set(xlabel="thread of the warp", yticks=range(0, 240, 40), title=title)
axes[0].set(yticklabels=[f"request {n}" for n in range(6)])
plt.show()

# %% [markdown]
# *Figure {{n}}.1. Six requests each of one warp, from the trace; height within a request is the address.
# Left: 32 threads read 32 neighbouring floats, one row of a head. Right: they all read the same number,
# and compute the same from it.*
#
# The left picture is good, and no accident: value is laid out (B, S, M, D), channels last. What if it
# were (B, M, D, S), as `grid_sample` wants it?


# %%
def sectors(addresses, size=4):
    """How many 32-byte sectors one request of `size` bytes a thread touches."""
    first, last = addresses // 32, (addresses + size - 1) // 32
    return len(np.unique(np.concatenate([first, last])))


origin = -(-value.data_ptr() // 128) * 128  # a row of 128 bytes begins here
token, channel = 11, np.arange(32)
channels_last = origin + 4 * (token * M * D + channel)
channels_first = origin + 4 * (channel * S + token)
print("channels last ", sectors(channels_last), "sectors")
print("channels first", sectors(channels_first), "sectors")
assert (sectors(channels_last), sectors(channels_first)) == (4, 32)

# %% [markdown]
# Eight times the traffic for the same 128 bytes. {{chapter making_it_fast}} times both. It is the right half of figure {{n}}.1
# that shows a waste: 32 threads each compute the same x, y, corners and weights, 31 times too often.

# %% [markdown]
# ## Exercise {{n}}.2  Where wide loads start
#
# *difficulty ●●○ · 10 minutes · 3 lines*
#
# A thread can load 16 bytes at once. Return the byte offset at which each of `count` threads starts
# when threads that load `size` bytes each share rows of `row_bytes` bytes, and row r starts at
# `row_offsets[r]`: thread 0 begins row 0, and a row that is full hands over to the next.


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
# `row_bytes // size` threads share a row. With 128 bytes and 16 a thread, threads 0 to 7 read row 0.
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
# ## {{n}}.6 The real kernel: a lane a point, then a lane a vector
#
# The library's kernel is one file of some 350 lines, and the only one: the GPU, the fast CPU build
# and this chapter compile the same text. It computes what is common once, and loads 16 bytes at a
# time instead of 4. The threads of a head are called **lanes**. First, each lane takes some of the head's points and computes corners and weights, once.
# Then each lane takes 16 bytes of channels and walks over all points. The results of the first phase
# lie in **shared memory**, a small fast memory that the threads of a block share; ours takes 8 KB of it.
#
# Most words in capitals are set by the build. `VALUE` is the number type of value, `REAL` that of weights
# and sums, `OFFSET` that of indices, `GRADIENT` that in which value's gradient is summed. `POINTS` is
# L · K, `LANES` the lanes of a head, `GROUPS` the heads of a block. A lane loads `VECTOR` channels at once,
# and all lanes of a head together a `STEP`; with `VECTORS` such vectors each they make one `PASS` over the
# channels. `EXISTS` is the tail guard for channels. `UNROLL` and `KEEP_LOOP` tell the compiler what to do
# with a loop, and `__device__` marks a function that kernels call. `LOOK_AHEAD` is nothing on a GPU, which
# runs other warps while one waits for memory; the fast CPU build asks there for a later point's rows.


# %%
SOURCE = resources.files("deformable_detr.kernels").joinpath("ms_deform_attn.cu").read_text()


def show(name):
    """The definition of one function or struct of the kernel."""
    definition = rf"^(?:struct {name} \{{|(?:template .*\n)?__device__ \w+ {name}\()"
    start = re.search(definition, SOURCE, re.M).start()
    print(SOURCE[start : SOURCE.index("\n}", start) + 2])


show("Corners")
show("find_corners")

# %% [markdown]
# `neighbours` does for one axis what {{chapter sampling}} did by hand. Outside pixels get weight zero and the
# address of some pixel inside: no branch in the hot loop, and every address can be read. The price: if
# that pixel's value is infinite or not a number, zero times it is not a number.

# %%
show("neighbours")

# %% [markdown]
# Before you run: a coordinate that is NaN. Which line makes it harmless?


# %%
def neighbours(coordinate, size):
    """The same in Python: low, high, weight_low, weight_high."""
    position = coordinate * size - 0.5
    inside = -1 < position < size
    position = position if inside else 0.0
    low = int(np.floor(position))
    fraction = position - low
    weights = (inside and low >= 0) * (1 - fraction), (inside and low + 1 < size) * fraction
    return max(low, 0), min(low + 1, size - 1), *weights


print("in the middle", neighbours(0.5, 4))
print("at the edge  ", neighbours(0.0, 4))
print("NaN          ", neighbours(float("nan"), 4))
assert neighbours(float("nan"), 4)[2:] == (0, 0) and neighbours(1e30, 4)[2:] == (0, 0)
assert neighbours(0.5, 4) == (1, 2, 0.5, 0.5)

# %% [markdown]
# The second phase. `offset` and `weight` come from shared memory; `load` fetches 16 bytes at once;
# the sums stay in registers until the last point.

# %%
show("forward_head")

# %% [markdown]
# And the kernel itself, which asks: which head? `__shared__` gives an array to a whole block. Blocks
# have two axes here: `threadIdx.x` is the lane, `threadIdx.y` the head.

# %%
print(SOURCE[SOURCE.index('extern "C" __global__') :].split("\n}")[0] + "\n}")

# %% [markdown]
# ## {{n}}.7 Running it, a thread a thread
#
# Lanes wait for one another: between the phases stands `__syncwarp()`, a **barrier**. So threads can
# no longer run one after the other. The library has a second, slow CPU build for this purpose, where
# every CUDA thread is a thread of the operating system, and barriers, shuffles and atomics are real.
# How many lanes a head gets is decided when the kernel is built:

# %%
macros = cuda.specialise(torch.float32, D, L * K, huge=False, deterministic=False, capability=80)
print({name: macros[name] for name in ("D", "POINTS", "VECTOR", "LANES")})
assert (macros["VECTOR"], macros["LANES"]) == (4, 8)  # 8 lanes of 4 floats, 16 bytes each

# %% [markdown]
# Four heads to a warp, then. It gives the same numbers:

# %%
result = threads.forward(value, shapes, locations, weights)
torch.testing.assert_close(result, ms_deform_attn(value, shapes, locations, weights))
print(B * Q * M, "heads, each by", macros["LANES"], "threads: equal")

# %% [markdown]
# And it writes a trace: who touched what. A block has 16 heads of 8 lanes. Here are only eight heads:
# 64 lanes have work, the others return. Each of the 64 loads from `value` 16 times and stores once. A
# request of the warp is now 32 lanes of 16 bytes: four whole rows, one of each head.

# %%
trace = threads.trace(value, shapes, locations, weights, block=0)
print({name: int((trace["array"] == name).sum()) for name in ("value", "output")})
reads = trace[trace["array"] == "value"]
own = [reads["offset"][reads["thread"] == t] for t in range(32)]
wide = 4 * np.stack(own, 1)  # (requests, 32) in bytes
assert set(reads["bytes"]) == {16} and wide.shape == (L * K * 4, 32)
for row in wide:  # 8 lanes on each of 4 rows, no byte twice, all sectors full
    assert (np.unique(row // 128, return_counts=True)[1] == 8).all() and len(np.unique(row)) == 32
    assert sectors(row, size=16) == 16

# %% mystnb={"image": {"alt": "Two panels, thread number across, address up, one colour a request. Left, the naive kernel: all 32 threads on one row of a head. Right, the library's: 32 lanes cover four rows of four heads, eight lanes on each, at four heights."}}
figure, axes = plt.subplots(1, 2, sharey=True)
for axis, part, title in zip(
    axes, (of_value - value.data_ptr(), wide), ("4 bytes a thread", "16 bytes a lane"), strict=True
):
    for row in part[::8]:
        axis.plot(row // 128, ".", markersize=4)
    axis.set(xlabel="thread of the warp", title=title)
axes[0].set(ylabel="row of value, 128 bytes each")
plt.show()

# %% [markdown]
# *Figure {{n}}.2. Two requests of a warp, one a colour. Left, the naive kernel: one row of head 0 each.
# Right: the same row for lanes 0 to 7, and rows of heads 1 to 3 for the others.*
#
# Both move every byte once, with all sectors full. The right one needs a quarter of the requests,
# and a quarter of the instructions that compute addresses:

# %%
heads_in_a_warp = 32 // macros["LANES"]
print("requests for a head:", len(of_value), "and", len(wide) / heads_in_a_warp)
assert all(sectors(row) == 4 for row in of_value - of_value.min() + origin)
assert len(wide) / heads_in_a_warp == len(of_value) / 4

# %% [markdown]
# ## Exercise {{n}}.3  How many lanes?
#
# *difficulty ●●○ · 10 minutes · 4 lines*
#
# The number of lanes must be a power of two, so that heads tile a warp. Return, for heads of D
# channels of `size` bytes each (D a multiple of 16 / size, and at most 32 lanes), the lanes of a
# head at 16 bytes each, and how many bytes' worth of lanes stay idle.


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
# A head has `D * size` bytes. Double the lanes until they hold as much.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# D = 24 floats are 96 bytes: six lanes would do, eight is the next power of two, 32 bytes idle.
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
# ## {{n}}.8 Backward: a sum over lanes
#
# With $v_c$ the value at corner $c$ of a point, $b_c$ its bilinear weight, $a$ the attention weight
# and $g$ the gradient of the output,
#
# $$\frac{\partial}{\partial a} = \sum_c b_c \langle g, v_c\rangle, \qquad
# \frac{\partial}{\partial x} = a \sum_c \frac{\partial b_c}{\partial x} \langle g, v_c\rangle, \qquad
# \frac{\partial}{\partial v_c} \mathrel{+}= a\, b_c\, g .$$
#
# Everything follows from four inner products over channels. The channels of a head lie in different
# lanes. Lanes of a warp can read each other's registers: a **shuffle**. Three of them sum eight
# lanes. `put_sums` does it after the loop over a point's corners, so that no corner's load waits for
# another one's sum, and writes the inner products where the weights were: `__syncwarp` makes sure that
# all lanes have read those. (A GPU runs the loop once, `SUMS` and `PRODUCTS` both true. A CPU that has
# copied the tokens first, see {{chapter making_it_fast}}, runs it twice, with one buffer instead of two.)

# %%
show("backward_head")
show("put_sums")
print(SOURCE[SOURCE.index("__device__ REAL sum_over_lanes") :].split("\n}")[0] + "\n}")

# %% [markdown]
# Before you run: eight lanes hold 0 to 7. Each adds what the lane `i ^ 4` holds, then `i ^ 2`, then
# `i ^ 1`. What does every lane hold at the end, and who held 12 in between?

# %%
held = np.arange(8)
for step in (4, 2, 1):
    held = held + held[np.arange(8) ^ step]
    print(f"after step {step}:", *held)
assert (held == 28).all()

# %% [markdown]
# The gradient of value is different: many queries read one pixel, so many threads add to one number.
# `x = x + 1` is three steps, read, add, write, and two threads can both read before either writes:
# one addition is lost. An **atomic** addition cannot be torn apart. {{chapter making_it_fast}} loses some on purpose.
# Here are all three gradients from operating-system threads, against autograd:

# %%
leaves = [x.clone().requires_grad_() for x in (value, locations, weights)]
output = ms_deform_attn(leaves[0], shapes, *leaves[1:], backend="reference")
grad_output = torch.randn_like(output)
output.backward(grad_output)
gradients = threads.backward(value, shapes, locations, weights, grad_output)
for name, given, leaf in zip(("value", "locations", "weights"), gradients, leaves, strict=True):
    torch.testing.assert_close(given, leaf.grad, atol=1e-4, rtol=1e-4)
    print(name, tuple(given.shape), "equal")

# %% [markdown]
# ## Exercise {{n}}.4  The gradient of the attention weights
#
# *difficulty ●●● · 25 minutes · 26 lines*
#
# Return the text of a kernel with one thread for each attention weight. It adds up, over the
# channels, grad_output times the sample. Start from the naive kernel of section {{n}}.3.


# %% tags=["exercise"]
def grad_weights():
    """void grad_weights(const float* value, const int* shapes, const float* locations,
    const float* grad_output, float* result, int B, int S, int Q, int M, int D, int L, int K)
    """
    # BEGIN SOLUTION
    return r"""
__global__ void grad_weights(const float* value, const int* shapes, const float* locations,
                             const float* grad_output, float* result, int B, int S, int Q,
                             int M, int D, int L, int K) {
    int p = blockIdx.x * blockDim.x + threadIdx.x;
    if (p >= B * Q * M * L * K) return;
    int l = p / K % L, item = p / K / L;
    int m = item % M, b = item / M / Q;
    int start = 0;
    for (int i = 0; i < l; i++) start += shapes[2 * i] * shapes[2 * i + 1];
    int H = shapes[2 * l], W = shapes[2 * l + 1];
    float x = locations[2 * p] * W - 0.5f, y = locations[2 * p + 1] * H - 0.5f;
    float sum = 0;
    if (x > -1 && x < W && y > -1 && y < H) {
        int left = floorf(x), top = floorf(y);
        for (int corner = 0; corner < 4; corner++) {
            int u = left + corner % 2, v = top + corner / 2;
            if (u < 0 || u >= W || v < 0 || v >= H) continue;
            float bilinear = (1 - fabsf(x - u)) * (1 - fabsf(y - v));
            const float* row = value + ((b * S + start + v * W + u) * M + m) * D;
            for (int d = 0; d < D; d++) sum += bilinear * row[d] * grad_output[item * D + d];
        }
    }
    result[p] = sum;
}
"""
    # END SOLUTION


check("cuda_kernel.4", grad_weights)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Weight p belongs to point `p % K` of level `p / K % L` of item `p / K / L`, and the item tells the
# rest, as in the naive kernel. The loop over levels and points goes away, one over channels comes.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# The sample times grad_output, summed over d, is the same as: for each corner, its bilinear weight
# times the inner product of its row with grad_output. `item * D + d` is the gradient's index.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# A point outside the map has gradient zero, and still has to write it; a corner outside must not be
# read. Test for "inside" in the form that is false for NaN.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.9 On a real GPU
#
# No word of the kernel changes. What changes is who builds and who launches. **NVRTC**, NVIDIA's
# compiler as a library, takes the text at run time; CuPy's `RawModule` {cite}`okuta2017cupy` wraps
# it, so no build step and no toolkit is needed. This is what the library does, shortened:
#
# ```python
# module = cupy.RawModule(code=SOURCE, options=("--std=c++17", "-DD=32", ...), backend="nvrtc")
# stream = cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream, device)
# with cupy.cuda.Device(device), stream:
#     module.get_function("forward")((blocks,), (lanes, groups), (value.data_ptr(), ...))
# ```
#
# - A launch returns at once; the GPU works through its **stream** in order. The kernel must join the
#   stream on which PyTorch computes, or it may read values that are not there yet.
# - It must go to the GPU **where the tensors lie**. The official operator's lack of such a guard fits
#   the crashes that users of a second GPU report.
# - The 32 threads of a warp mostly run together. They may part at a branch, hence `__syncwarp()`, which
#   costs next to nothing.
# - Threads hide waiting: while one warp waits for memory, the next one computes. How many fit is
#   limited by registers and shared memory, which the compiler reports; {{chapter making_it_fast}} works it out.

# %%
available = cuda.why_not() is None
if available:
    on_gpu = [x.cuda() for x in (value, locations, weights)]
    result = ms_deform_attn(on_gpu[0], shapes, *on_gpu[1:], backend="cuda").cpu()
    torch.testing.assert_close(result, ms_deform_attn(value, shapes, locations, weights))

# %% [markdown]
# On a machine with a GPU and CuPy this cell has just run the kernel there, and would have failed had
# the numbers differed. On others it did nothing: `deformable_detr.backends()` says why.
#
# ## Summary
#
# - A kernel is a function with its own number; grid and block are two loops that a GPU runs side by side.
# - A warp's reads go out together: neighbours share sectors, strangers do not.
# - Two phases, a lane a point and a lane a vector, compute every coordinate once.
# - Lanes wait at barriers, talk through shared memory and shuffles, and add atomically.
# - The same text runs on CPU and GPU, so a laptop can test what a GPU will run.
#
# > **Differs from the paper.** It has no kernel in its text. **Differs from the official code.** There
# > one thread owns a channel, index arithmetic is repeated in each, six kernels serve backward by
# > size of D, the batch must be divisible by `im2col_step`, half precision is missing. Here: lanes
# > with 16 bytes, one backward, any D, any batch, float32 sums.
#
# ## Further reading
#
# - {cite}`zhu2021deformable`: the operation; its repository: the first kernel.
# - {cite}`okuta2017cupy`: CuPy.
# - {cite}`nickolls2008cuda`: the programming model, by those who made it.
