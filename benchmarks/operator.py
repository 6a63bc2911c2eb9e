"""The operator against what else one can install, side by side in one process.

    python benchmarks/operator.py                     # all of it, some minutes
    python benchmarks/operator.py --part kept         # or a part: its rows alone are replaced

Writes data/results/operator_avx2.json and operator_avx2.png, or what the processor's vectors are
called, and where there is a CUDA device operator_cuda.json. Each part is a process of its own,
since the C library reads its allocator's settings when a process starts: "default" is the allocator
as it comes, "kept" is told to keep its memory, which spares the peers that make large temporaries
their page faults. Memory is counted in a third, "mapped", where every tensor is a mapping of its
own: the heap, once told to use pages of 2 MiB, holds up to 4 MiB more, now in one call, now in
another.

torch-ms-deform-attn takes part where it can be imported. It is built for this alone:
    pip install --no-build-isolation --target FOLDER torch-ms-deform-attn   # setuptools>=77
    PYTHONPATH=FOLDER python benchmarks/operator.py
"""

import os
import sys

if __name__ == "__main__":  # this file's folder would hide Python's own module called operator
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import itertools
import json
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import timing
from benchmarks.operator_results import merge, plot
from benchmarks.peers import (
    CASES,
    COMPILED,
    MODES,
    OURS,
    PACKAGE,
    D,
    K,
    L,
    M,
    call,
    inputs,
    peers,
    progress,
)
from deformable_detr.files import write_json
from deformable_detr.provenance import provenance

COMMAND = "python benchmarks/operator.py"
PARTS = {
    "default": {},
    "kept": {
        "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
        "MALLOC_TOP_PAD_": str(256 << 20),
    },
    "mapped": {"MALLOC_MMAP_THRESHOLD_": str(64 << 10)},
}
COPY = 4 << 20  # bytes copied to as many others: what the nearest shared cache can hold


def measure(part: str, name: str, threads: list[int], attempts: int, compiled: bool) -> list[dict]:
    """Times at one shape, in a process that has this part's allocator."""
    rows = []
    case, tensors = CASES[name], inputs(CASES[name])
    for mode in MODES:
        for count in threads:
            torch.set_num_threads(count)
            found = peers(case.levels, compiled=compiled)
            calls = {peer: call(operator, tensors, mode) for peer, operator in found.items()}
            rounds = {peer: 3 if peer == COMPILED else case.rounds for peer in calls}
            result = timing.side_by_side(calls, rounds, attempts)
            where = {"shape": name, "mode": mode, "threads": count, "allocator": part}
            rows += [{**where, "peer": peer, **figures} for peer, figures in result.items()]
            progress(f"{where} {dict((p, r['median_ms']) for p, r in result.items())}")
    return rows


def measure_memory(name: str, compiled: bool) -> list[dict]:
    """What each peer holds at most beside its inputs, one thread."""
    torch.set_num_threads(1)
    memory = []
    case, tensors = CASES[name], inputs(CASES[name])
    for mode in MODES:
        for peer, operator in peers(case.levels, compiled=compiled).items():
            run = call(operator, tensors, mode)
            run()  # builds, compiles and imports
            where = {"shape": name, "mode": mode, "peer": peer}
            memory.append(where | {"extra_mib": timing.peak_mib(run)})
            progress(str(memory[-1]))
    return memory


def cache_limit() -> dict[str, float]:
    """A model of the least time at the encoder's shape, one thread: every corner's channels pass
    once through the cache that all heads' values fit, at the best rate of a copy there. The
    backward pass reads them, and reads and writes their gradients: three times as many bytes."""
    torch.set_num_threads(1)
    source = torch.ones(COPY // 4)
    target = torch.empty_like(source)
    times = []
    for _ in range(300):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    rate = 2 * COPY / min(times)  # read and written
    case = CASES["encoder"]
    queries = case.batch * sum(height * width for height, width in case.levels)
    corners = queries * M * L * K * 4 * D * 4  # bytes
    return {
        "copy_gb_per_s": round(rate / 1e9, 1),
        "forward_gb": round(corners / 1e9, 2),
        "backward_gb": round(3 * corners / 1e9, 2),
        "forward_ms": round(corners / rate * 1e3, 1),
        "forward + backward_ms": round(4 * corners / rate * 1e3, 1),
    }


# torch imports its compiler at the first call of any custom operator: two seconds that are not ours
FIRST_CALL = """
import time, torch, torch._dynamo
from deformable_detr import ms_deform_attn
x = torch.zeros(1, 30, 8, 32), [(4, 5), (2, 3), (1, 2), (1, 2)], torch.zeros(1, 2, 8, 4, 4, 2)
x += (torch.zeros(1, 2, 8, 4, 4),)
start = time.perf_counter()
ms_deform_attn(*x, backend="cpu")
print(time.perf_counter() - start)
"""


def build_seconds() -> dict[str, float]:
    """The first call, which builds the kernel, and that of a process which finds it built."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"DEFORMABLE_DETR_CACHE": folder, "PYTHONPATH": str(timing.ROOT)}
        command = [sys.executable, "-c", FIRST_CALL]
        times = [
            float(
                subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout
            )
            for _ in range(2)
        ]
    return {"first_call_s": round(times[0], 2), "cached_first_call_s": round(times[1], 3)}


def scaling(shapes: list[str]) -> list[dict]:
    """How many times as fast two threads are as one, in turn: ours at these shapes, and what the
    machine itself can do: a product of matrices that its caches hold, a copy that they do not."""
    matrix, source = torch.ones(512, 512), torch.ones(16 << 20)
    target = torch.empty_like(source)
    works: dict[str, timing.Call] = {
        "product of matrices": lambda: [matrix @ matrix for _ in range(20)],
        "copy of 64 MiB": lambda: target.copy_(source),
    }
    for name in shapes:
        case = CASES[name]
        operator, tensors = peers(case.levels)[OURS], inputs(case)
        works |= {f"{name}, {mode}": call(operator, tensors, mode) for mode in MODES}

    def with_threads(count: int, work: timing.Call) -> timing.Call:
        def run() -> None:
            torch.set_num_threads(count)
            work()

        return run

    calls = {f"{n}: {x}": with_threads(n, work) for x, work in works.items() for n in (1, 2)}
    times = timing.side_by_side(calls, dict.fromkeys(calls, 21), attempts=1)
    result = []
    for work in works:
        one, two = times[f"1: {work}"], times[f"2: {work}"]
        ratios = {
            "times": round(one["median_ms"] / two["median_ms"], 2),
            "times_of_quartiles": round(one["quartiles_ms"][0] / two["quartiles_ms"][0], 2),
            "times_of_minima": round(one["minimum_ms"] / two["minimum_ms"], 2),
        }
        result.append({"work": work, **ratios})
        progress(str(result[-1]))
    return result


def measure_cuda() -> dict:
    """The same shapes on a GPU, from a CUDA graph where a peer can be captured: no time of Python's
    is counted. Coordinates and weights stay float32 for ours, as under autocast; the others get
    them in value's dtype."""
    rows = []
    for name, case in CASES.items():
        value, locations, weights = inputs(case, "cuda")
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for mode in MODES:
                calls, graphs = {}, {}
                for peer, operator in peers(case.levels, "cuda").items():
                    rest = [x if peer == OURS else x.to(dtype) for x in (locations, weights)]
                    run = call(operator, (value.to(dtype), *rest), mode)
                    calls[peer], graphs[peer] = captured(run)
                rounds = dict.fromkeys(calls, 11)
                result = timing.side_by_side(calls, rounds, 2, 50, torch.cuda.synchronize)
                where = {"shape": name, "mode": mode, "dtype": str(dtype).removeprefix("torch.")}
                rows += [
                    {**where, "peer": peer, "graph": graphs[peer], **figures}
                    for peer, figures in result.items()
                ]
                progress(f"{where} {dict((p, r['median_ms']) for p, r in result.items())}")
    about = provenance(COMMAND, ("transformers", PACKAGE))
    return about | {"device": torch.cuda.get_device_name(), "rows": rows}


def captured(run: timing.Call) -> tuple[timing.Call, bool]:
    """The call as a CUDA graph's replay and True, or itself and False where it cannot be one."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # builds kernels and fills caches, which a capture must not
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return run, False
    return graph.replay, True


def measure_apart(part: str, shape: str, arguments: list[str]) -> dict:
    """What a process of its own, with this part's allocator, measures."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "rows.json"
        command = [sys.executable, __file__, *arguments, "--worker", part, shape, str(output)]
        subprocess.run(command, env=os.environ | PARTS[part], check=True)
        return json.loads(output.read_text())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shapes", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--attempts", type=int, default=2, help="where times spread widely")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        part, shape, output = arguments.worker
        compiled = part != "kept" and not arguments.no_compile
        result = {"rows": [], "memory": []}
        if part == "mapped":
            result["memory"] = measure_memory(shape, compiled)
        else:
            result["rows"] = measure(part, shape, arguments.threads, arguments.attempts, compiled)
        Path(output).write_text(json.dumps(result))
        return
    path = timing.results_path("operator")
    about = provenance(COMMAND, ("transformers", PACKAGE))
    about |= {"build": build_seconds(), "limit": cache_limit()}
    if "default" in arguments.part and 2 in arguments.threads:
        about["scaling"] = scaling(arguments.shapes)
    for part, shape in itertools.product(arguments.part, arguments.shapes):
        new = about | measure_apart(part, shape, sys.argv[1:])
        old = json.loads(path.read_text()) if path.exists() else {}
        write_json(path, merge(old, new))  # what is measured is safe if the rest is stopped
    plot(json.loads(path.read_text()), path.with_suffix(".png"))
    if torch.cuda.is_available():
        write_json(timing.RESULTS / "operator_cuda.json", measure_cuda())


if __name__ == "__main__":
    main()
