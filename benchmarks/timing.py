"""What the benchmarks share: calls timed in turn, their spread, peak memory, where results go."""

import ctypes
import gc
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "data" / "results"
STATUS = Path("/proc/self/status")  # Linux
CALM = 0.25  # the distance of the quartiles over the median, above which a section is run again

Call = Callable[[], object]


def results_path(benchmark: str) -> Path:
    """The file of a benchmark's results on processors like this one: a file for each set of vector
    instructions, operator_avx2.json beside operator_avx512.json."""
    vectors = torch.backends.cpu.get_cpu_capability().lower().replace(" ", "_")
    return RESULTS / f"{benchmark}_{vectors}.json"


def side_by_side(
    calls: dict[str, Call],
    rounds: dict[str, int],
    attempts: int = 2,
    repeats: int = 1,
    finish: Call | None = None,
    warm: bool = True,
    memory: bool = False,
) -> dict[str, dict]:
    """Milliseconds of each call, in an order that is shuffled in every round.

    rounds: how many of them each call takes part in. repeats: how often it is called in a round,
    before `finish`, which waits for a device. warm: call each once before. memory: also tell the
    median of each call's peaks, as `peak_mib` does; free memory is then given back before every
    call. All of it is repeated, up to `attempts` times, while any call's quartiles lie further
    apart than CALM; the calmest attempt is returned. Calls of fewer than five rounds have no say in
    that.
    """
    for call in calls.values() if warm else ():
        call()
    best: dict[str, dict] = {}
    for attempt in range(attempts):
        times, peaks = _rounds(calls, rounds, attempt, repeats, finish or (lambda: None), memory)
        result = {name: summary(*times[name]) | _median(peaks[name]) for name in calls}
        if not best or worst_spread(result) < worst_spread(best):
            best = result
        if worst_spread(best) <= CALM:
            break
    return best


def _rounds(
    calls: dict[str, Call],
    rounds: dict[str, int],
    seed: int,
    repeats: int,
    finish: Call,
    memory: bool,
) -> tuple[dict[str, tuple[list[float], list[float]]], dict[str, list[float]]]:
    order = random.Random(seed)
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in calls}
    peaks: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(max(rounds.values())):
        names = [name for name in calls if number < rounds[name]]
        order.shuffle(names)
        for name in names:
            before = reset_peak() if memory else None
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(repeats):
                calls[name]()
            finish()
            times[name][0].append((time.perf_counter() - wall) * 1e3 / repeats)
            times[name][1].append((time.process_time() - cpu) * 1e3 / repeats)
            if before is not None:
                peaks[name].append(peak_above(before))
    return times, peaks


def _median(peaks: list[float]) -> dict[str, float]:
    return {"extra_mib": statistics.median(peaks)} if peaks else {}


def summary(wall: list[float], cpu: list[float]) -> dict[str, float | int | list[float]]:
    """Median, minimum and quartiles of wall-clock times, and the median of the processor's time,
    which other programs on the machine disturb less. All in milliseconds."""
    median = statistics.median(wall)
    low, _, high = statistics.quantiles(wall, method="inclusive") if len(wall) > 1 else wall * 3
    return {
        "median_ms": round(median, 3),
        "minimum_ms": round(min(wall), 3),
        "quartiles_ms": [round(low, 3), round(high, 3)],
        "spread": round((high - low) / median, 3),
        "cpu_median_ms": round(statistics.median(cpu), 3),
        "rounds": len(wall),
    }


def worst_spread(result: dict[str, dict]) -> float:
    """The largest spread among the calls of five rounds and more."""
    return max((r["spread"] for r in result.values() if r["rounds"] >= 5), default=0.0)


def peak_mib(call: Call) -> float | None:
    """What the process holds at most while `call`, which is warm, runs, above what it held before,
    in MiB: its result, its gradients and all between; the median of five runs, since the process
    holds now more, now less besides. None but on Linux, which keeps count."""
    peaks = []
    for _ in range(5):
        before = reset_peak()
        kept = call()
        peaks.append(peak_above(before))
        del kept
    return None if before is None else statistics.median(peaks)


def reset_peak() -> int | None:
    """Start counting afresh; what the process holds, in KiB."""
    if not STATUS.exists():
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or memory freed before would be used again, unseen
    STATUS.with_name("clear_refs").write_text("5")
    return _kib("VmRSS")


def peak_above(before: int | None) -> float | None:
    """The most that was held since `reset_peak`, above what that returned, in MiB."""
    return None if before is None else round((_kib("VmHWM") - before) / 1024, 1)


def _kib(field: str) -> int:
    return next(int(x.split()[1]) for x in STATUS.read_text().splitlines() if x.startswith(field))
