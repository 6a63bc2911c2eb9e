"""Schematics of chapter dat, and how its results are drawn."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from deformable_detr.evaluation.intervals import interval

from . import CUT, POINT, QUERY, QUIET, VALUE, arrow, block, canvas, running_example

# along the seven's strokes, in pixels
SEVEN = np.array([[54, 66], [64, 66], [74, 68], [70, 80], [62, 90], [50, 90], [58, 104], [54, 112]])


def pale(axes: Axes, picture: np.ndarray) -> None:
    """A picture as background, without ticks."""
    axes.imshow(picture, alpha=0.45, extent=(0, picture.shape[1], picture.shape[0], 0))
    axes.set(xlim=(0, picture.shape[1]), ylim=(picture.shape[0], 0))
    axes.set_xticks([])
    axes.set_yticks([])


def two_attentions() -> None:
    """Private points of three queries, and keys that all three share; places set by hand."""
    _, (left, right) = plt.subplots(1, 2, figsize=(7, 3.6))
    picture = running_example()
    queries = np.array([[20, 76], [78, 48], [108, 92]])
    around = np.array([[-13, -10], [14, -7], [9, 13], [-10, 14]])
    for axes, title in (
        (left, "Deformable DETR: each query's own points"),
        (right, "DAT: shared keys"),
    ):
        pale(axes, picture)
        axes.set_title(title, fontsize=10)
        axes.plot(*queries.T, "+", color=QUERY, markersize=13, markeredgewidth=2.5, zorder=4)
    for query, turn in zip(queries, (0, 1, 2), strict=True):
        points = query + np.roll(around, turn, 1) * (1 if turn != 1 else 0.8)
        for point in points:
            left.plot(*np.stack([query, point]).T, color=QUERY, linewidth=0.9)
        left.scatter(*points.T, s=34, color=POINT, edgecolor="black", linewidth=0.5, zorder=3)
    steps = (np.arange(4) + 0.5) * 32
    grid = np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2)
    nearest = SEVEN[np.linalg.norm(grid[:, None] - SEVEN, axis=-1).argmin(1)]
    moved = grid + (nearest - grid).clip(-14, 14)
    for start, end in zip(grid, moved, strict=True):
        arrow(right, tuple(start), tuple(end), colour=QUIET)
    for query in queries:
        for key in moved:
            right.plot(*np.stack([query, key]).T, color=QUERY, linewidth=0.5, alpha=0.6)
    right.plot(*grid.T, "x", color=QUIET, markersize=5)
    right.scatter(*moved.T, s=34, color=POINT, edgecolor="black", linewidth=0.5, zorder=3)
    plt.show()


def the_module() -> None:
    """What flows in DAT's attention, with shapes; one group."""
    axes = canvas(7, 2.95)
    axes.set(ylim=(0.7, 3.65))

    def label(x: float, y: float, text: str, colour: str, side: str = "center") -> None:
        axes.text(x, y, text, fontsize=8, color=colour, ha=side)

    block(axes, 0.55, 1.1, "map x", VALUE, 0.9)
    arrow(axes, (0.7, 1.37), (1.3, 2.62), "", VALUE)
    label(0.8, 2.05, "HW x C", VALUE, "right")
    block(axes, 1.55, 2.9, "$W_q$", QUERY, 0.7)
    arrow(axes, (1.9, 2.9), (2.5, 2.9), "q", QUERY)
    block(axes, 3.2, 2.9, "offset network", QUERY, 1.4)
    arrow(axes, (3.2, 2.64), (3.2, 2.24), "", QUERY)
    label(3.3, 2.38, "offsets, $N_s$ x 2", QUERY, "left")
    block(axes, 1.75, 2.0, "grid", QUIET, 0.8)
    arrow(axes, (2.15, 2.0), (2.75, 2.0), "$N_s$ x 2", QUIET)
    block(axes, 3.2, 2.0, "places", QUERY, 0.9)
    arrow(axes, (3.2, 1.74), (3.2, 1.36), "", QUERY)
    arrow(axes, (1.0, 1.1), (2.72, 1.1), "HW x C", VALUE)
    block(axes, 3.2, 1.1, "sample", POINT, 0.95)
    arrow(axes, (3.68, 1.1), (4.3, 1.1), "$N_s$ x C", POINT)
    block(axes, 4.75, 1.1, "$W_k$, $W_v$", POINT, 0.9)
    arrow(axes, (5.2, 1.15), (5.6, 1.42), "", POINT)
    label(5.45, 1.1, "k, v", POINT, "left")
    arrow(axes, (3.66, 2.0), (3.97, 2.0), "", QUERY)
    block(axes, 4.6, 2.0, "bias table, read\nbetween its cells", QUIET, 1.25, 0.6)
    arrow(axes, (5.23, 1.9), (5.6, 1.68), "", QUIET)
    label(4.6, 1.53, "HW x $N_s$", QUIET)
    axes.plot([1.55, 1.55, 5.98], [3.16, 3.45, 3.45], color=QUERY, linewidth=1.4)
    arrow(axes, (5.98, 3.45), (5.98, 1.82), "", QUERY)
    label(6.05, 2.6, "q, HW x C", QUERY, "left")
    block(axes, 5.98, 1.55, "attend", QUIET, 0.75)
    arrow(axes, (6.36, 1.55), (6.53, 1.55), "")
    block(axes, 6.75, 1.55, "$W_o$", QUIET, 0.45)
    plt.show()


def grid_and_reach(s: float) -> None:
    """Reference points of a map of 8 x 8 on the running example, and how far one key may go."""
    axes = plt.subplots(figsize=(3.6, 3.6))[1]
    pale(axes, running_example())
    pixel = 16
    places = ((np.arange(8) + 0.5) / 8 * 7 + 0.5) * pixel  # 0 and 1 are the outer pixels' centres
    grid = np.stack(np.meshgrid(places, places), -1).reshape(-1, 2)
    axes.plot(*(np.indices((8, 8)).reshape(2, -1) * pixel + 8), ".", color=VALUE, markersize=4)
    axes.plot(*grid.T, "x", color=POINT, markersize=6, markeredgewidth=1.6)
    reach = s / 2 / 8 * 7 * pixel
    x, y = places[5], places[1]
    square = Rectangle((x - reach, y - reach), 2 * reach, 2 * reach, fill=False, edgecolor=CUT)
    square.set_linewidth(2)
    axes.add_patch(square)
    plt.show()


def backbone() -> None:
    """The four stages of DAT-T on an image of 224 x 224."""
    axes = canvas(7, 2.4)
    names = ("W S", "W S", "W D W D W D", "W D")
    maps, widths = ("56 x 56", "28 x 28", "14 x 14", "7 x 7"), (96, 192, 384, 768)
    block(axes, 0.45, 1.5, "image\n224 x 224", QUIET, 0.85, 0.7)
    x = 1.25
    for stage, (letters, size, width) in enumerate(zip(names, maps, widths, strict=True), 1):
        wide = 0.35 + 0.24 * len(letters.split())
        colour = POINT if "D" in letters else VALUE
        arrow(axes, (x - 0.35, 1.5), (x - 0.02, 1.5), "")
        block(axes, x + wide / 2, 1.5, letters, colour, wide, 0.7)
        axes.text(x + wide / 2, 2.1, f"stage {stage}", ha="center", fontsize=9)
        axes.text(x + wide / 2, 0.95, f"{size}\nC = {width}", ha="center", va="top", fontsize=8)
        x += wide + 0.36
    axes.text(0.1, 0.15, "W: windows   S: shifted windows   D: shared keys that move", fontsize=8)
    plt.show()


def alike(picture: np.ndarray, weights: dict[str, np.ndarray]) -> None:
    """One picture, and the attention (Q, Q) of five of its queries, in the corners and the middle
    of the square maps of some stages."""
    axes = plt.subplots(len(weights), 6, figsize=(7, 1.3 * len(weights) + 0.3))[1]
    for row, (name, attention) in zip(axes, weights.items(), strict=True):
        side = round(len(attention) ** 0.5)
        queries = [
            (0, 0),
            (0, side - 1),
            (side // 2, side // 2),
            (side - 1, 0),
            (side - 1, side - 1),
        ]
        maps = [attention[y * side + x].reshape(side, side) for y, x in queries]
        row[0].imshow(picture)
        row[0].set_ylabel(name, fontsize=9)
        for each, one, (y, x) in zip(row[1:], maps, queries, strict=True):
            each.imshow(one, vmin=0, vmax=np.max(maps), cmap="Greens")
            each.plot(x, y, "+", color=QUERY, markersize=11, markeredgewidth=2)
    for each in axes.flat:
        each.set_xticks([])
        each.set_yticks([])
    plt.show()


def compared(values: dict[str, list[float]], first: str) -> None:
    """Accuracy of each configuration: a dot per seed, and the mean's interval."""
    axes = plt.subplots(figsize=(7, 3.2))[1]
    names = list(values)
    for place, name in enumerate(names):
        colour = POINT if name == first else QUERY
        axes.plot(values[name], [place] * len(values[name]), "o", color=colour, alpha=0.5)
        found = interval(values[name])
        axes.plot([found.low, found.high], [place, place], color=colour, linewidth=2)
        axes.plot(found.mean, place, "|", color=colour, markersize=14, markeredgewidth=2.5)
    axes.axvline(np.mean(values[first]), color=QUIET, linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel="accuracy on test")
    plt.show()


def shared_keys(
    pictures: np.ndarray, places: np.ndarray, attention: np.ndarray, titles: Sequence[str]
) -> None:
    """Keys (N, 2) of some pictures (H, W, 3), as discs whose area is the attention (N,) they get."""
    axes = plt.subplots(1, len(pictures), figsize=(7, 7 / len(pictures) + 0.3))[1]
    for each, picture, where, much, title in zip(
        axes, pictures, places, attention, titles, strict=True
    ):
        height, width = picture.shape[:2]
        each.imshow(picture, extent=(0, width, height, 0))
        size = 30 * much * len(much)
        each.scatter(*(where * (width, height)).T, s=size, color=POINT, edgecolor="white", lw=0.6)
        each.set(xlim=(0, width), ylim=(height, 0))
        each.set_title(title, fontsize=9)
        each.set_xticks([])
        each.set_yticks([])
    plt.show()


def offsets_over_training(curves: dict[str, dict[int, list[float]]]) -> None:
    """Mean length of offsets by step, of each layer; a line per seed."""
    axes = plt.subplots(figsize=(5, 2.6))[1]
    for number, (name, by_step) in enumerate(curves.items()):
        steps = sorted(by_step)
        for seed, lengths in enumerate(zip(*(by_step[step] for step in steps), strict=True)):
            label = name if seed == 0 else None
            axes.plot(steps, lengths, color=f"C{number}", linewidth=1, label=label)
    axes.set(xlabel="step", ylabel="mean offset, in pixels", ylim=(0, None))
    axes.legend()
    plt.show()
