"""Schematics of the chapter "Making it fast"."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from schematics import CUT, LOSS, POINT, QUERY, QUIET, VALUE, arrow, block, canvas, cells

SETS = 64  # of a first-level cache of 32 KiB: 64 sets of 8 lines of 64 bytes


def two_limits() -> None:
    """A roofline by hand: 10 GB and 40 billion operations per second."""
    axes = plt.subplots(figsize=(6, 2.7))[1]
    intensity = np.array([0.5, 4, 32])
    axes.loglog(intensity, np.minimum(10 * intensity, 40), color="black")
    axes.plot([1, 16], [10, 40], "o", color=POINT, markersize=8)
    axes.annotate(
        "1 operation per byte:\nbytes limit, 10 GFLOP/s", (1, 10), (1.15, 5.6), color=POINT
    )
    axes.annotate(
        "16 operations per byte:\narithmetic limits, 40 GFLOP/s", (16, 40), (5.5, 19), color=POINT
    )
    axes.text(0.55, 16, "slope: 10 GB/s", color=QUIET)
    axes.text(5, 46, "ceiling: 40 GFLOP/s", color=QUIET)
    axes.set(xlabel="operations per byte", ylabel="GFLOP/s", ylim=(4, 70))
    axes.set_xticks([0.5, 1, 2, 4, 8, 16, 32], ["0.5", "1", "2", "4", "8", "16", "32"])
    axes.set_yticks([5, 10, 20, 40], ["5", "10", "20", "40"])
    axes.minorticks_off()


def sets_used(stride: int, rows: int = 64) -> set[int]:
    """The sets that rows of 128 bytes, two lines, fall into when they begin `stride` bytes apart."""
    return {(row * stride + byte) // 64 % SETS for row in range(rows) for byte in (0, 64)}


def places_of_a_cache(with_gaps: int, without: int) -> None:
    """Which of a cache's sets 64 rows of one head use, for two strides in bytes."""
    axes = canvas(7, 2.5)
    for x, stride, name in ((0.5, with_gaps, "other heads between"), (4.0, without, "no gaps")):
        used = sets_used(stride)
        filled = {(n // 16, n % 16): VALUE for n in used}
        cells(axes, x, 0.85, 4, 16, 0.16, QUIET, filled)
        axes.text(x + 1.28, 2.15, f"rows {stride} bytes apart: {name}", ha="center")
        axes.text(x + 1.28, 1.72, "64 sets of a cache", ha="center", fontsize=8, color=QUIET)
        share = f"64 rows, 128 lines: {len(used)} sets used,\n{128 // len(used)} lines want each of them"
        axes.text(x + 1.28, 0.7, share, ha="center", va="top", fontsize=9, color=VALUE)


def who_writes() -> None:
    """Forward each output has one writer; backward several queries add to one pixel."""
    axes = canvas(7, 2.7)
    _queries(axes, 0.2, "forward: gather")
    for q in range(3):
        block(axes, 0.6 + 0.75 * q, 0.9, f"output {q}", QUERY, 0.66, 0.4)
        arrow(axes, (0.6 + 0.75 * q, 1.68), (0.6 + 0.75 * q, 1.12), colour=QUERY)
    axes.text(1.35, 0.45, "one writer per number", ha="center", fontsize=9)
    _queries(axes, 2.6, "backward: scatter")
    cells(axes, 2.9, 0.8, 1, 6, 0.3, VALUE, {(0, 2): "#f5c9a8", (0, 3): "#f5c9a8"})
    for q, pixels in enumerate(((0, 1, 2, 3), (1, 2, 3), (2, 3, 4, 5))):
        for pixel in pixels:
            colour = CUT if pixel in (2, 3) else QUIET
            arrow(axes, (3.0 + 0.75 * q, 1.68), (3.05 + 0.3 * pixel, 1.12), colour=colour)
    axes.text(3.8, 0.45, "three writers for one pixel", ha="center", fontsize=9, color=CUT)
    axes.text(6.1, 2.5, "three ways out", ha="center", fontsize=10)
    for row, text in enumerate(("atomic additions", "one owner per head", "sums of integers")):
        block(axes, 6.1, 2.0 - 0.55 * row, text, LOSS, 1.6, 0.45)


def lost_addition() -> None:
    """Two threads add 1 to the same number, and one addition is lost."""
    axes = canvas(7, 2.0)
    for y, name, colour in ((1.55, "thread A", QUERY), (0.45, "thread B", POINT)):
        axes.text(0.1, y, name, va="center", color=colour)
    steps = (("A", 1.5, "reads 5"), ("B", 2.5, "reads 5"), ("A", 3.5, "5 + 1"), ("B", 4.2, "5 + 1"))
    for who, x, text in (*steps, ("A", 5.0, "writes 6"), ("B", 6.0, "writes 6")):
        y, colour = (1.55, QUERY) if who == "A" else (0.45, POINT)
        block(axes, x, y, text, colour, 0.9, 0.4)
    cells_at = ((0.95, "5"), (5.5, "6"), (6.6, "6"))
    for x, text in cells_at:
        axes.text(x, 1.0, text, ha="center", va="center", color=VALUE, fontsize=11)
    axes.plot([1.1, 5.35], [1.0, 1.0], color=VALUE, linewidth=1)
    axes.plot([5.65, 6.45], [1.0, 1.0], color=VALUE, linewidth=1)
    axes.text(3.1, 1.05, "the number in memory", ha="center", va="bottom", fontsize=8, color=VALUE)
    axes.text(6.6, 0.08, "should be 7", ha="center", fontsize=9, color=CUT)


def ladder(times: dict[str, np.ndarray]) -> None:
    """Median and range of the milliseconds of each version."""
    axes = plt.subplots(figsize=(7, 2.8))[1]
    for row, (name, given) in enumerate(times.items()):
        colour = QUIET if name == "PyTorch" else VALUE
        axes.plot([given.min(), given.max()], [row, row], color=colour, linewidth=5, alpha=0.4)
        axes.plot(np.median(given), row, "o", color=colour)
        axes.annotate(
            f"{np.median(given):.1f}", (given.max(), row), (5, -4), textcoords="offset points"
        )
    axes.set(xscale="log", xlabel="milliseconds, one thread (logarithmic)")
    axes.set_yticks(range(len(times)), list(times))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.12, y=0.1)
    axes.invert_yaxis()


def roofline(
    machine: dict[str, float],
    kernels: dict[str, float],
    intensity: float,
    others: dict[str, tuple[float, float]],
) -> None:
    """The machine's limits; kernels' GFLOP/s at one intensity; others as (intensity, GFLOP/s)."""
    axes = plt.subplots(figsize=(7, 3.8))[1]
    x = np.logspace(np.log10(0.8 * intensity), 3, 200)
    for name, style in (("cache", "-"), ("memory", "--")):
        roof = np.minimum(x * machine[name], machine["GFLOP/s"])
        axes.loglog(x, roof, style, color="black", label=f"bytes from {name}")
    height = 0.0
    for name, speed in sorted(kernels.items(), key=lambda item: item[1]):
        colour = QUIET if name == "PyTorch" else VALUE
        height = max(speed, 1.35 * height)  # no label on another
        axes.plot([0.16, intensity], [height, speed], color=colour, linewidth=0.6)
        axes.plot(intensity, speed, "o", color=colour)
        axes.text(0.15, height, name, ha="right", va="center", fontsize=8, color=colour)
    for row, (name, (place, speed)) in enumerate(others.items()):
        axes.plot(place, speed, "o", color=LOSS)
        where = {"ha": "left", "xytext": (4, -16)} if row else {"ha": "right", "xytext": (-4, -16)}
        axes.annotate(
            name, (place, speed), textcoords="offset points", fontsize=8, color=LOSS, **where
        )
    axes.set(xlabel="operations per byte", ylabel="GFLOP/s (useful operations)", xlim=(0.008, 2000))
    axes.legend(loc="lower right")


def _queries(axes: Axes, x: float, title: str) -> None:
    axes.text(x + 1.15, 2.5, title, ha="center", fontsize=10)
    for q in range(3):
        block(axes, x + 0.4 + 0.75 * q, 1.9, f"query {q}", QUERY, 0.66, 0.4, strong=True)
