"""What NVRTC makes of the kernel, for every architecture that it knows; no GPU is needed.

The suite builds a part of all specialisations. The rest, and data/results/cuda_build.json:

    python -m tests.test_cuda_build
"""

import importlib.metadata
import itertools
import json
import re
import subprocess
import sys
import types
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch

from deformable_detr.ops import cuda

nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")
try:
    VERSION = ".".join(map(str, nvrtc.nvrtcVersion()[1:]))
    KNOWN = [arch for arch in nvrtc.nvrtcGetSupportedArchs()[1] if arch >= 75]
except RuntimeError as error:  # the bindings without the library
    pytest.skip(f"NVRTC does not load: {error}", allow_module_level=True)

RESULTS = Path(__file__).parent.parent / "data" / "results" / "cuda_build.json"
DTYPES = tuple(cuda.NAMES)
WIDTHS = (7, 32, 64)  # D: a channel at a time with a lane to spare, and two of the field's
POINTS = 16
FTZ = "-ftz=true"  # CuPy adds it


@dataclass(frozen=True)
class Built:
    """One kernel: registers of a thread, bytes of shared memory of a block, spilled bytes."""

    registers: int
    shared: int
    spilled: int
    stack: int


def build(macros: dict[str, str | int], arch: int) -> tuple[bytes, dict[str, Built]]:
    """The machine code for one architecture, and what ptxas says of each kernel in it.

    Raises AssertionError with NVRTC's log where it does not compile.
    """
    _, program = nvrtc.nvrtcCreateProgram(cuda.source().encode(), b"kernel.cu", 0, [], [])
    options = (*cuda.options(macros), FTZ, f"-arch=sm_{arch}", "--ptxas-options=-v")
    (result,) = nvrtc.nvrtcCompileProgram(program, len(options), [x.encode() for x in options])
    log = _read(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).decode()
    assert result == nvrtc.nvrtcResult.NVRTC_SUCCESS, log
    code = _read(program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
    nvrtc.nvrtcDestroyProgram(program)
    return code, _read_log(log)


def _read(program, size, content) -> bytes:
    buffer = b" " * size(program)[1]  # the bindings write into it
    content(program, buffer)
    return buffer


def _read_log(log: str) -> dict[str, Built]:
    kernels = {}
    for part in log.split("Compiling entry function '")[1:]:
        stack, *spills = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        ).groups()
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        shared = int(re.search(r"(\d+) bytes smem", part)[1])
        kernels[part.split("'")[0]] = Built(registers, shared, sum(map(int, spills)), int(stack))
    return kernels


def check(macros: dict[str, str | int], arch: int) -> dict[str, Built]:
    """Builds, and asserts that both kernels are there, spill nothing, and share what was meant."""
    _, kernels = build(macros, arch)
    assert set(kernels) == {"forward", "backward"}
    real, offset = (8 if macros[name].endswith(("double", "long")) else 4 for name in MEMORY)
    corners = 4 * macros["POINTS"] * (real + offset) + max(real, offset)
    for name, kernel in kernels.items():
        assert kernel.shared == macros["GROUPS"] * corners
        assert kernel.spilled == kernel.stack == 0, (name, arch, macros, kernel)
        assert kernel.registers * macros["LANES"] * macros["GROUPS"] <= 65536, (name, macros)
    return kernels


MEMORY = ("REAL", "OFFSET")


@pytest.mark.parametrize("arch", KNOWN)
def test_every_architecture_builds_without_spills(arch):
    for dtype in (torch.float32, torch.float16):
        check(cuda.specialise(dtype, 32, POINTS, False, False, arch), arch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", [min(KNOWN), 90])
def test_every_dtype_and_mode_builds_without_spills(arch, dtype):
    for D, deterministic in ((1, False), (33, True), (256, False)):
        check(cuda.specialise(dtype, D, POINTS, False, deterministic, arch), arch)


@pytest.mark.parametrize("huge", [False, True])
def test_as_many_points_as_it_takes(huge):
    check(cuda.specialise(torch.float64, 32, cuda.MAX_POINTS, huge, False, 90), 90)
    with pytest.raises(ValueError, match=rf"L \* K <= {cuda.MAX_POINTS}, got 513; backend='ref"):
        cuda.specialise(torch.float64, 32, cuda.MAX_POINTS + 1, huge, False, 90)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_of_a_warp_read_different_banks(dtype):
    """Shared memory has 32 banks of 4 bytes; a warp's heads read their own corner of one point."""
    macros = cuda.specialise(dtype, 32, POINTS, False, False, 90)
    stride = check(macros, 90)["forward"].shared // macros["GROUPS"] // 4  # between heads
    heads, words = 32 // macros["LANES"], 2 if dtype == torch.float64 else 1
    banks = {(head * stride + word) % 32 for head in range(heads) for word in range(words)}
    assert len(banks) == heads * words


def test_specialisations_fit_the_machine():
    """Every D to 300: 16 bytes a lane at most, whole vectors, whole blocks, 48 KiB of memory."""
    for dtype, D, points in itertools.product(DTYPES, range(1, 301), (1, 16, 60, 512)):
        m = cuda.specialise(dtype, D, points, False, False, 90)
        assert D % m["VECTOR"] == 0 and m["VECTOR"] * dtype.itemsize <= 16
        assert m["LANES"] in (1, 2, 4, 8, 16, 32) and 1 <= m["LANES"] * m["GROUPS"] <= cuda.THREADS
        assert m["LANES"] == 32 or D <= m["LANES"] * m["VECTOR"] < 2 * D  # no lane idle for long
        assert ("VECTOR_REDUCTION" in m) <= (m["VECTOR"] % 4 == 0)


# The generated instructions.


def tool(name: str) -> str:
    """The path of one of NVIDIA's programs inside its wheel; skips where it is not installed."""
    try:
        files = importlib.metadata.files(f"nvidia-cuda-{name}") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == name:
            return str(file.locate())
    pytest.skip(f"{name} is not here: pip install nvidia-cuda-{name}")


def dump(tmp_path: Path, macros: dict[str, str | int], arch: int, what: str) -> dict[str, str]:
    """What cuobjdump prints of each kernel: with -sass its instructions, with -elf its record."""
    path = tmp_path / "kernel.cubin"
    path.write_bytes(build(macros, arch)[0])
    disassembler = Path(tool("nvdisasm")).parent
    text = subprocess.run(
        [tool("cuobjdump"), what, str(path)],
        env={"PATH": str(disassembler)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    mark = r"Function : (\w+)\n" if what == "-sass" else r"\n\.nv\.info\.(\w+)\n"
    parts = re.split(mark, text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def instructions(tmp_path: Path, dtype: torch.dtype, deterministic: bool = False):
    """The sm_90 instructions of forward and of backward, without their operands."""
    macros = cuda.specialise(dtype, 32, POINTS, False, deterministic, 90)
    kernels = dump(tmp_path, macros, 90, "-sass")
    pattern = r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z]\S+)"
    return tuple(re.findall(pattern, kernels[name]) for name in ("forward", "backward"))


def starting(found: list[str], prefix: str) -> list[str]:
    return [x for x in found if x.startswith(prefix)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_channels_are_moved_16_bytes_at_once(tmp_path, dtype):
    forward, backward = instructions(tmp_path, dtype)
    # value alone is loaded in 16 bytes; narrower ones are a coordinate or weight each
    assert len(starting(forward, "LDG.E.128")) == 4  # a point's corners
    assert len(starting(forward, "LDG")) == 4 + 3
    assert len(starting(forward, "STG.E.128")) == len(starting(forward, "STG")) == 1
    assert len(starting(backward, "LDG.E.128")) == 1 + 4  # grad_output, a point's corners
    multiply_add = "DFMA" if dtype == torch.float64 else "FFMA"  # halves are summed in float32
    assert len(starting(forward, multiply_add)) >= 4 * 16 // dtype.itemsize
    for kernel in (forward, backward):
        assert not starting(kernel, "LDL") + starting(kernel, "STL")  # nothing in local memory


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_value_are_reduced_in_vectors(tmp_path, dtype):
    _, backward = instructions(tmp_path, dtype)
    wide = 16 // dtype.itemsize
    reductions = starting(backward, "RED")
    if dtype == torch.float64:  # there is no wider one
        assert len(reductions) == len(starting(backward, "REDG.E.ADD.F64")) == 4 * wide
    else:
        assert len(reductions) == len(starting(backward, "REDG.E.ADD.F32x4")) == wide
    assert not starting(backward, "ATOM")  # which would wait for the old value
    steps = (32 // wide).bit_length() - 1  # of the sum over a head's lanes
    assert len(starting(backward, "SHFL.BFLY")) == 4 * steps * (2 if dtype.itemsize == 8 else 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_corner_waits_for_another_ones_sum(tmp_path, dtype):
    _, backward = instructions(tmp_path, dtype)
    shuffles = [i for i, x in enumerate(backward) if x.startswith("SHFL")]
    loads = [i for i, x in enumerate(backward) if x.startswith("LDG.E.128")]
    assert max(loads) < min(shuffles)


def test_deterministic_gradients_are_integers(tmp_path):
    _, backward = instructions(tmp_path, torch.float32, deterministic=True)
    reductions = starting(backward, "RED") + starting(backward, "ATOM")
    assert reductions == ["REDG.E.ADD.64.STRONG.GPU"] * 16


def test_host_passes_what_the_kernels_take(tmp_path, monkeypatch):
    """The sizes of the arguments, struct Levels by value among them, against the machine code's."""
    given = record_launches(monkeypatch)
    value, shapes = torch.zeros(2, 50, 3, 32), [(5, 7), (3, 5)]
    locations, weights = torch.zeros(2, 4, 3, 2, 3, 2), torch.zeros(2, 4, 3, 2, 3)
    monkeypatch.setattr(torch.Tensor, "device", types.SimpleNamespace(index=0), raising=False)
    inputs = value, cuda._levels(shapes, 3), locations, weights
    cuda._launch("forward", ("spec",), (*inputs, value), (2, 50, 4, 3))
    gradients = value, locations, weights, value
    cuda._launch("backward", ("spec",), (*inputs, value, *gradients), (2, 50, 4, 3))
    record = dump(tmp_path, cuda.specialise(torch.float32, 32, 6, False, False, 90), 90, "-elf")
    for name, (grid, block, arguments) in given.items():
        sizes = re.findall(r"Ordinal : 0x(\w+)\s+Offset\s+: \w+\s+Size\s+: 0x(\w+)", record[name])
        expected = {int(place, 16): int(size, 16) for place, size in sizes}
        passed = [8 if isinstance(x, int) else x.nbytes for x in arguments]
        assert passed == [expected[place] for place in range(len(expected))]
        assert (grid, block) == ((2,), (8, 16))  # 24 heads, 16 a block
        assert arguments[1].size == 1  # CuPy refuses arrays of more
        fields = list(arguments[1].tobytes()[::4])
        assert fields == [5, 5, 5, 3, 3, 3, 7, 7, 7, 5, 5, 5, 0, 0, 0, 35, 35, 35]


def record_launches(monkeypatch) -> dict[str, tuple]:
    """What each kernel is launched with, in place of CuPy and a device."""
    given = {}

    def get_function(name):
        return lambda grid, block, arguments: given.update({name: (grid, block, arguments)})

    module = types.SimpleNamespace(get_function=get_function)
    stand_in = types.SimpleNamespace(cuda=types.SimpleNamespace(Device=nullcontext))
    monkeypatch.setitem(sys.modules, "cupy", stand_in)
    monkeypatch.setattr(cuda, "load", lambda *spec: (module, 8, 16))
    monkeypatch.setattr(cuda, "_stream", nullcontext)
    return given


def test_recorded_results_are_of_this_kernel():
    """data/results/cuda_build.json has every dtype and architecture, and no spill."""
    rows = json.loads(RESULTS.read_text())["kernels"]
    assert {row["dtype"] for row in rows} == {str(d).removeprefix("torch.") for d in DTYPES}
    assert not any(row["spilled"] or row["stack"] for row in rows)
    newest = cuda.specialise(torch.float32, 32, POINTS, False, False, 90)
    if json.loads(RESULTS.read_text())["nvrtc"] == VERSION:
        kernels = check(newest, 90)
        of_this = {"dtype": "float32", "D": 32, "deterministic": False, "architecture": 90}
        for row in rows:
            if of_this.items() <= row.items():
                assert row["registers"] == kernels[row["kernel"]].registers


def main() -> None:
    """Every dtype, D of WIDTHS, mode and architecture; writes data/results/cuda_build.json."""
    rows = []
    for arch, dtype in itertools.product(KNOWN, DTYPES):
        for D, deterministic in itertools.product(WIDTHS, (False, True)):
            about = {"architecture": arch, "dtype": str(dtype).removeprefix("torch."), "D": D}
            macros = cuda.specialise(dtype, D, POINTS, False, deterministic, arch)
            for name, kernel in check(macros, arch).items():
                threads = macros["LANES"] * macros["GROUPS"]
                about |= {"deterministic": deterministic, "kernel": name, "threads": threads}
                rows.append(about | asdict(kernel))
        print(f"sm_{arch} {dtype}: built", flush=True)
    head = {"command": "python -m tests.test_cuda_build", "nvrtc": VERSION, "points": POINTS}
    lines = ",\n".join("    " + json.dumps(row) for row in rows)
    RESULTS.write_text(json.dumps(head)[:-1] + ', "kernels": [\n' + lines + "\n]}\n")


if __name__ == "__main__":
    main()
