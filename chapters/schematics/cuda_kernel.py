"""Schematics of the chapter "A CUDA kernel you can step through"."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from schematics import CUT, POINT, QUERY, QUIET, VALUE, arrow, block, canvas, cells

LIGHT = "#f3f3f3"


def grid_block_warp_lane() -> None:
    """A grid of blocks, one block of four warps, one warp of 32 lanes: four heads of eight."""
    axes = canvas(7, 3.1)
    axes.text(0.75, 2.95, "grid", ha="center", va="top", fontsize=10)
    for row in range(3):
        for column in range(2):
            here = (row, column) == (1, 1)
            number = 2 * row + column
            colour = QUERY if here else QUIET
            block(axes, 0.4 + 0.7 * column, 2.4 - 0.5 * row, f"block {number}", colour, 0.68, 0.42)
    axes.text(0.75, 0.95, "...", ha="center", fontsize=10)
    arrow(axes, (1.48, 1.9), (1.98, 1.9), colour=QUERY)
    axes.text(3.2, 2.95, "one block: 4 warps", ha="center", va="top", fontsize=10)
    for warp in range(4):
        colour, y = (POINT if warp == 1 else QUIET), 2.3 - 0.42 * warp
        for lane in range(32):
            _thread(axes, 2.05 + 0.073 * lane, y, 0.073, 0.26, LIGHT, colour)
    axes.text(3.2, 0.72, "threads 0 to 31, 32 to 63, 64 to 95, 96 to 127", ha="center", fontsize=8)
    arrow(axes, (4.42, 2.02), (4.92, 2.02), colour=POINT)
    axes.text(5.95, 2.95, "one warp: 32 lanes", ha="center", va="top", fontsize=10)
    for head in range(4):
        y = 2.3 - 0.42 * head
        for lane in range(8):
            _thread(axes, 5.0 + 0.2 * lane, y, 0.2, 0.26, VALUE if head == 2 else LIGHT, POINT)
            shade = "white" if head == 2 else "black"
            axes.text(
                5.1 + 0.2 * lane,
                y + 0.13,
                8 * head + lane,
                ha="center",
                va="center",
                fontsize=7,
                color=shade,
            )
    axes.text(5.8, 0.72, "(here drawn in rows of 8)", ha="center", fontsize=8)
    axes.text(
        3.5,
        0.25,
        "All threads run the same code. The 32 lanes of a warp run it together, line by line.",
        ha="center",
        fontsize=9,
    )


def two_layouts() -> None:
    """What one request of 32 threads touches: four full sectors, or 32 with one number each."""
    axes = canvas(7, 3.0)
    axes.text(0.05, 2.8, "channels last, (B, S, M, D): one pixel's channels lie side by side")
    for sector in range(6):
        used = 1 <= sector <= 4
        _sector(axes, 0.25 + 1.08 * sector, 2.25, range(8) if used else ())
    axes.text(3.5, 1.95, "32 numbers, 4 sectors fetched, every byte used", ha="center", fontsize=9)
    axes.text(0.05, 1.35, "channels first, (B, M, D, S): one channel's pixels lie side by side")
    for sector in range(6):
        _sector(axes, 0.25 + 1.08 * sector, 0.8, ((3 + 2 * sector) % 8,))
        if sector < 5:
            axes.text(1.28 + 1.08 * sector, 0.9, "...", ha="center", va="center", fontsize=8)
    axes.text(
        3.5,
        0.5,
        "32 numbers, 32 sectors fetched (6 are drawn), one number in eight used",
        ha="center",
        fontsize=9,
    )
    axes.text(
        3.5,
        0.1,
        "one cell: one number of 4 bytes; one frame: a sector of 32 bytes; orange: what a thread asks for",
        ha="center",
        fontsize=8,
        color=QUIET,
    )


def stride_and_sectors(stride: int) -> None:
    """Thread t of a warp reads number t * stride: which sectors is that?"""
    axes = canvas(7, 2.6)
    wanted = np.arange(32) * stride
    for sector in range(64):
        inside = [int(n) - 8 * sector for n in wanted if n // 8 == sector]
        x, y = 0.12 + 0.85 * (sector % 8), 2.1 - 0.22 * (sector // 8)
        _sector(axes, x, y, inside, 0.1, fetched=bool(inside))
    touched = len(np.unique(wanted // 8))
    share = f"{32 / (8 * touched):.0%}"
    axes.text(
        3.5, 2.42, f"stride {stride}: {touched} sectors, {share} of their bytes used", ha="center"
    )


def two_phases() -> None:
    """Eight lanes of a head: first a lane per point, then a lane per four channels."""
    axes = canvas(7, 3.5)
    axes.set_ylim(0.6, 3.5)
    axes.text(1.35, 3.3, "phase 1: one lane per point", ha="center", color=POINT, fontsize=10)
    for point in range(16):
        row, column = divmod(point, 8)
        x, y = 0.15 + 0.3 * column, 2.35 - 0.42 * row
        _thread(axes, x, y, 0.3, 0.36, LIGHT, POINT)
        axes.text(x + 0.15, y + 0.18, f"p{point}", ha="center", va="center", fontsize=8)
    for lane in range(8):
        axes.text(0.3 + 0.3 * lane, 2.86, lane, ha="center", fontsize=8, color=QUERY)
    axes.text(1.35, 3.05, "lane", ha="center", fontsize=8, color=QUERY)
    axes.text(
        1.35, 1.7, "Each lane finds the 4 corners\nof 2 points.", ha="center", va="top", fontsize=9
    )
    block(axes, 3.5, 2.35, "shared\nmemory:\n16 x 4 offsets\n16 x 4 weights", QUIET, 1.15, 1.1)
    arrow(axes, (2.6, 2.35), (2.94, 2.35), colour=POINT)
    arrow(axes, (4.06, 2.35), (4.42, 2.35), colour=VALUE)
    axes.plot([3.5, 3.5], [1.15, 1.72], color=CUT, linewidth=2)
    axes.plot([3.5, 3.5], [2.95, 3.4], color=CUT, linewidth=2)
    axes.text(
        3.5,
        1.1,
        "barrier: all points are found\nbefore anyone goes on",
        ha="center",
        va="top",
        fontsize=8,
        color=CUT,
    )
    axes.text(5.7, 3.3, "phase 2: one lane per 4 channels", ha="center", color=VALUE, fontsize=10)
    axes.text(5.7, 3.05, "lane", ha="center", fontsize=8, color=QUERY)
    for lane in range(8):
        axes.text(4.65 + 0.3 * lane, 2.86, lane, ha="center", fontsize=8, color=QUERY)
    for y in (2.5, 2.2, 1.6):
        for lane in range(8):
            cells(axes, 4.51 + 0.3 * lane, y, 1, 4, 0.07, VALUE)
            _thread(axes, 4.5 + 0.3 * lane, y - 0.03, 0.3, 0.13, "none", QUERY)
    axes.text(5.7, 1.9, "... 64 rows: 16 points, 4 corners ...", ha="center", fontsize=8)
    axes.text(5.7, 1.3, "Each lane adds up its own 4 channels.", ha="center", va="top", fontsize=9)


def shuffle() -> None:
    """Eight lanes add up what they hold in three steps."""
    axes = canvas(7, 3.2)
    held = np.arange(8)
    for row, step in enumerate((0, 4, 2, 1)):
        y = 2.8 - 0.8 * row
        if step:
            for lane in range(8):
                arrow(
                    axes,
                    (1.6 + 0.68 * (lane ^ step), y + 0.57),
                    (1.6 + 0.68 * lane, y + 0.22),
                    colour=QUERY,
                )
                arrow(
                    axes, (1.6 + 0.68 * lane, y + 0.57), (1.6 + 0.68 * lane, y + 0.22), colour=QUIET
                )
            held = held + held[np.arange(8) ^ step]
        label = f"+ lane ^ {step}" if step else "lanes hold"
        axes.text(0.1, y, label, va="center", fontsize=9, color=QUERY if step else "black")
        for lane in range(8):
            block(axes, 1.6 + 0.68 * lane, y, str(held[lane]), POINT, 0.5, 0.36, strong=step == 1)


def _thread(
    axes: Axes, x: float, y: float, width: float, height: float, fill: str, edge: str
) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=fill, edgecolor=edge, linewidth=0.8))


def _sector(axes: Axes, x: float, y: float, used, size: float = 0.12, fetched: bool = True) -> None:
    """Eight numbers side by side in a frame; used: those that a thread asks for."""
    cells(axes, x, y, 1, 8, size, "#cccccc", {(0, n): POINT for n in used})
    edge = VALUE if used or not fetched else QUIET
    frame = Rectangle((x, y), 8 * size, size, fill=False, edgecolor=edge if used else "#bbbbbb")
    frame.set_linewidth(2 if used else 0.8)
    axes.add_patch(frame)


def turned_picture(picture: np.ndarray, places: np.ndarray, drawn: np.ndarray) -> None:
    """A picture with the places sampled from it, (H, W, 2) in pixels, and what came out."""
    _, (before, after) = plt.subplots(1, 2, figsize=(6, 3))
    before.imshow(picture)
    before.plot(*places[[0, 0, -1, -1, 0], [0, -1, -1, 0, 0]].T, color=POINT)
    after.imshow(drawn)
    names = (
        f"value: {picture.shape[0]} x {picture.shape[1]}",
        f"output: {drawn.shape[0]} x {drawn.shape[1]}",
    )
    for axis, name in zip((before, after), names, strict=True):
        axis.set(title=name, xticks=[], yticks=[])
