"""Builds the kernels that chapters cuda_kernel and making_it_fast ask for, for their checkers."""

import ctypes
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from deformable_detr.ops.build import compiler

WORDS = """
#include <cmath>
#include <algorithm>
#define __global__
#define READ(x) (x)
// Becomes 0 as an int where x is not a number, as on a GPU; C++ leaves that open.
static float gpu_floor(float x) { return x == x ? std::floor(x) : 0; }
#define floorf gpu_floor
struct Dim { int x, y, z; };
static Dim threadIdx, blockIdx, blockDim, gridDim;
"""


def build(kernel: str, name: str, flags: tuple[str, ...] = ("-O1",)) -> Callable[..., None]:
    """The kernel `name` in this CUDA text as run(blocks, threads, *arguments), on the CPU.

    Threads run one after the other, so it must not wait. Tensors pass as addresses. Raises
    AssertionError where the text has no such kernel or does not compile.
    """
    found = re.search(rf"__global__\s+void\s+{name}\((.*?)\)", kernel, re.S)
    assert found, f"the text has no `__global__ void {name}(...)`"
    parameters = found[1]
    arguments = ", ".join(p.split()[-1].lstrip("*") for p in parameters.split(","))
    launch = f"""extern "C" void launch(int blocks, int threads, {parameters}) {{
        gridDim.x = blocks, blockDim.x = threads;
        for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
            for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++) {name}({arguments});
    }}"""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "kernel.cpp"), Path(folder, "kernel.so")
        source.write_text(WORDS + kernel + launch)
        command = [*compiler(), "-std=c++17", "-shared", "-fPIC", *flags, str(source)]
        command += ["-o", str(library)]
        run = subprocess.run(command, capture_output=True, text=True)
        errors = re.findall(r"error: (.*)", run.stderr)
        assert run.returncode == 0, f"it does not compile: {''.join(errors[:1])}"
        loaded = ctypes.CDLL(str(library))
    return lambda *given: loaded.launch(*map(_as_c, given))


def _as_c(x: torch.Tensor | int) -> ctypes.c_void_p | ctypes.c_int:
    return ctypes.c_void_p(x.data_ptr()) if isinstance(x, torch.Tensor) else ctypes.c_int(x)
