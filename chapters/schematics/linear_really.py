"""The schematics and figures of chapter linear_really."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullFormatter

from schematics import CUT, POINT, QUERY, QUIET, VALUE, arrow, block, canvas, running_example

CELLS, STRIDE, QUERY_CELL = 16, 8, (7, 10)  # of the running example: cells of 8 pixels, (x, y)
COLOURS = {
    "dense": "C1",
    "windowed": "C2",
    "deformable": "C0",
    "deformable of 4 levels": "C5",
    "dense, weights kept": "C3",
    "deformable, plain PyTorch": "C4",
}
MARKERS = dict(zip(COLOURS, "osv^Dx", strict=True))


def what_each_reads() -> None:
    """One query of the running example and what it reads: all cells, a window, a few points."""
    _, axes = plt.subplots(1, 3, figsize=(7.4, 2.75))
    titles = ("dense: all S cells", "windowed: 64 cells", "deformable: M × K points")
    for axis, title in zip(axes, titles, strict=True):
        axis.imshow(0.4 + 0.6 * running_example() / 255, extent=(0, CELLS, CELLS, 0))
        axis.set(xticks=[], yticks=[], title=title, xlim=(0, CELLS), ylim=(CELLS, 0))
        for line in range(CELLS + 1):
            axis.axhline(line, color="white", lw=0.4)
            axis.axvline(line, color="white", lw=0.4)
    shade = {"facecolor": VALUE, "alpha": 0.4, "edgecolor": VALUE, "linewidth": 1.5}
    axes[0].add_patch(Rectangle((0, 0), CELLS, CELLS, **shade))
    axes[1].add_patch(Rectangle((0, 8), 8, 8, **shade))
    angles = np.arange(8) * np.pi / 4
    for distance in (1, 2, 3, 4):
        ring = 0.8 * distance * np.stack([np.cos(angles), np.sin(angles)])
        x, y = QUERY_CELL[0] + 0.5 + ring[0], QUERY_CELL[1] + 0.5 + ring[1]
        axes[2].scatter(x, y, s=14, color=POINT, edgecolors="black", linewidths=0.4, zorder=3)
    for axis in axes:
        axis.add_patch(Rectangle(QUERY_CELL, 1, 1, facecolor="none", edgecolor=QUERY, lw=2.5))
    plt.show()


def three_orders() -> None:
    """One query and one head: where among reading, weighing and adding the projection stands."""
    axes = canvas(7.4, 2.6)
    axes.set(ylim=(0.3, 2.9))
    rows = (
        ("tokens first\n(the code)", ("project", "read", "weigh, add"), "S", ("D", "D", "D")),
        (
            "samples first\n(the paper's\nother order)",
            ("read", "project", "weigh, add"),
            "K",
            "CDD",
        ),
        ("sums first", ("read", "weigh, add", "project"), "1", "CCD"),
    )
    for number, (name, steps, products, widths) in enumerate(rows):
        y = 2.5 - 0.95 * number
        axes.text(0.0, y, name, va="center", fontsize=8.5)
        axes.text(1.65, y + 0.05, "C", fontsize=8, color=VALUE, va="bottom", ha="center")
        for place, (step, width) in enumerate(zip(steps, widths, strict=True)):
            x = 2.35 + 1.45 * place
            strong = step == "project"
            arrow(axes, (x - 0.82, y), (x - 0.58, y), colour=VALUE)
            block(axes, x, y, step, VALUE if strong else POINT, 1.1, 0.42, strong)
            axes.text(x + 0.74, y + 0.05, width, fontsize=8, color=VALUE, va="bottom", ha="center")
        arrow(axes, (5.83, y), (6.07, y), colour=VALUE)
        plural = "s" * (products != "1")
        axes.text(6.2, y, f"{products} product{plural}\nwith W′", va="center", fontsize=9)


def counted(curves: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]) -> None:
    """For each quantity, by the name of its panel, a curve for each kind of attention."""
    figure, axes = plt.subplots(1, len(curves), figsize=(7.4, 3.2))
    for axis, (title, lines) in zip(axes, curves.items(), strict=True):
        for name, (tokens, values) in lines.items():
            axis.loglog(tokens, values, MARKERS[name] + "-", color=COLOURS[name], label=name, ms=4)
        axis.set(title=title, xlabel="tokens")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=4, fontsize=8)
    plt.show()


def clocked(panels: dict[str, dict[str, list[tuple[np.ndarray, np.ndarray]]]]) -> None:
    """Microseconds per token against tokens, one line per seed."""
    figure, axes = plt.subplots(1, len(panels), figsize=(7.4, 3.6))
    for axis, (title, kinds) in zip(axes, panels.items(), strict=True):
        for name, seeds in kinds.items():
            for number, (tokens, milliseconds) in enumerate(seeds):
                label = None if number else name
                style = {"color": COLOURS[name], "marker": MARKERS[name], "ms": 4, "lw": 1.2}
                axis.loglog(tokens, 1e3 * milliseconds / tokens, label=label, **style)
        axis.set(title=title, xlabel="tokens")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
    axes[0].set_ylabel("microseconds per token")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=3, fontsize=8)
    plt.show()


def two_shares(counts: dict[str, float], times: dict[str, float]) -> None:
    """Two bars, each of which sums to one: a layer's multiply-adds and its seconds, by step."""
    _, axis = plt.subplots(figsize=(7, 2.3))
    colours = dict(zip(times, (VALUE, QUERY, CUT, POINT, QUIET), strict=True))
    for y, shares in ((1, counts), (0, times)):
        left, whole = 0.0, sum(shares.values())
        for name, value in shares.items():
            width = value / whole
            axis.barh(y, width, left=left, color=colours[name], label=name if y else None)
            if width > 0.05:
                axis.text(left + width / 2, y, f"{width:.0%}", ha="center", va="center", color="w")
            left += width
    axis.set(yticks=[0, 1], yticklabels=["seconds", "multiply-adds"], xlim=(0, 1), xticks=[])
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=3, fontsize=8)
    axis.spines[:].set_visible(False)
    plt.show()


def orders_by_tokens(lines: dict[str, tuple[list[int], list[float]]]) -> None:
    """Multiply-adds of the decoder's attention against the tokens, one line per order."""
    _, axis = plt.subplots(figsize=(6, 3))
    for (name, (tokens, values)), mark in zip(lines.items(), "osv", strict=True):
        axis.loglog(tokens, values, mark + "-", label=name)
    axis.set(xlabel="tokens", ylabel="million multiply-adds")
    axis.legend(fontsize=8)
    plt.show()


def parts_of_the_detector(parts: dict[str, dict[str, float]]) -> None:
    """Stacked bars: the multiply-adds per pixel of each part, one bar per detector and size."""
    _, axis = plt.subplots(figsize=(7.2, 3.3))
    colours = {"backbone": QUIET, "encoder": VALUE, "decoder": QUERY, "rest": "#dddddd"}
    for place, values in enumerate(parts.values()):
        bottom = 0.0
        for name, colour in colours.items():
            label = None if place else name
            axis.bar(place, values[name], 0.75, bottom=bottom, color=colour, label=label)
            bottom += values[name]
    axis.set(xticks=range(len(parts)), ylabel="thousand multiply-adds\nper pixel of the image")
    axis.set_xticklabels(parts, fontsize=8)
    axis.legend(loc="upper left", fontsize=8)
    plt.show()
