"""Builds kernels for a CPU: those of the chapters on kernels, and for their checkers."""

import ctypes
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from deformable_detr.ops.build import compiler

WORDS = """
#include <cmath>
#include <algorithm>
#define __global__
// Becomes 0 as an int where x is not a number, as on a GPU; C++ leaves that open.
static float gpu_floor(float x) { return x == x ? std::floor(x) : 0; }
#define floorf gpu_floor
struct Dim { int x, y, z; };
static Dim threadIdx, blockIdx, blockDim, gridDim;
"""


LOOPS = """
extern "C" void launch(int blocks, int threads, PARAMETERS) {
    blockDim.x = threads, gridDim.x = blocks;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++) CALL;
}
"""

# Every CUDA thread is a thread of the operating system; a block is one warp, or a part of one.
TEAM_WORDS = """
#include <atomic>
#include <barrier>
#include <cmath>
#include <thread>
#include <vector>
#define __global__
#define __device__ static
#define __shared__ static
struct Dim { int x, y, z; };
static Dim blockIdx, blockDim, gridDim;
static thread_local Dim threadIdx;
static std::barrier<>* meeting;
static void __syncwarp() { meeting->arrive_and_wait(); }
static float held[32];
static float __shfl_xor_sync(unsigned, float x, int step) {
    held[threadIdx.x] = x;
    __syncwarp();
    float other = held[threadIdx.x ^ step];
    __syncwarp();  // before anyone overwrites what another lane has yet to read
    return other;
}
static void atomicAdd(float* pointer, float x) { std::atomic_ref<float>(*pointer).fetch_add(x); }
"""

TEAM = """
extern "C" void launch(int blocks, int threads, PARAMETERS) {
    blockDim.x = threads, gridDim.x = blocks;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
        std::barrier<> all(threads);
        meeting = &all;
        std::vector<std::thread> team;
        for (int t = 0; t < threads; t++) team.emplace_back([=] { threadIdx.x = t; CALL; });
        for (std::thread& one : team) one.join();
    }
}
"""


@dataclass(frozen=True)
class Kernel:
    """A kernel that runs on the CPU, and the library that it was compiled into."""

    library: ctypes.CDLL

    def __call__(self, blocks: int, threads: int, *arguments: torch.Tensor | int) -> None:
        """Run the grid; tensors pass as addresses."""
        self.library.launch(*map(_as_c, (blocks, threads, *arguments)))


def build(
    kernel: str,
    name: str = r"\w+",
    flags: tuple[str, ...] = ("-O1",),
    *,
    words: str = WORDS,
    grid: str = LOOPS,
) -> Kernel:
    """The kernel `name` in this CUDA text, or its first one, compiled for the CPU.

    words: what C++ lacks. grid: a function `launch` that CALLs every thread with the kernel's
    PARAMETERS; LOOPS runs one after the other, so that none may wait for another. Raises
    AssertionError where the text has no such kernel or does not compile.
    """
    found = re.search(rf"__global__\s+void\s+({name})\((.*?)\)", kernel, re.S)
    assert found, f"the text has no `__global__ void {name}(...)`"
    arguments = ", ".join(p.split()[-1].lstrip("*") for p in found[2].split(","))
    launch = grid.replace("PARAMETERS", found[2]).replace("CALL", f"{found[1]}({arguments})")
    return Kernel(library_of(words + kernel + launch, *flags))


def library_of(text: str, *flags: str) -> ctypes.CDLL:
    """C++ text, compiled and loaded; AssertionError with the compiler's first error if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "text.cpp"), Path(folder, "text.so")
        source.write_text(text)
        command = [*compiler(), "-std=c++17", "-shared", "-fPIC", *flags, str(source)]
        run = subprocess.run([*command, "-o", str(library)], capture_output=True, text=True)
        errors = re.findall(r"error: (.*)", run.stderr)
        assert run.returncode == 0, f"it does not compile: {''.join(errors[:1])}"
        return ctypes.CDLL(str(library))


def build_team(kernel: str) -> Kernel:
    """The text's first kernel, its threads those of the operating system, which may wait for one
    another: __shared__, __syncwarp, __shfl_xor_sync and atomicAdd work. A block has at most 32."""
    flags = ("-O1", "-std=c++20", "-pthread")
    return build(kernel, flags=flags, words=TEAM_WORDS, grid=TEAM)


def _as_c(x: torch.Tensor | int) -> ctypes.c_void_p | ctypes.c_int:
    return ctypes.c_void_p(x.data_ptr()) if isinstance(x, torch.Tensor) else ctypes.c_int(x)
