"""Schematics of chapter many_scales."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from schematics import POINT, QUERY, QUIET, VALUE, arrow, block, canvas, running_example

STRIDES = (8, 16, 32)
LEVEL_COLOURS = ("#00533D", "#009E73", "#86D1BC")  # shades of VALUE, fine to coarse
REFERENCE = np.array([60.0, 88.0]) / 128  # on the seven, normalised
OFFSETS = np.array(
    [[(1.5, -2.5), (-1.5, 2.0)], [(-1.2, 0.2), (1.4, -0.6)], [(0.5, -1.0), (-1.0, 0.4)]]
)
WEIGHTS = np.array([[0.1, 0.25], [0.3, 0.15], [0.15, 0.05]])  # level, point: they sum to one


def at_stride(stride: int) -> np.ndarray:
    """The running example as averages of stride x stride pixels, (H, W, 3) in [0, 1]."""
    side = 128 // stride
    return running_example().reshape(side, stride, side, stride, 3).mean((1, 3)) / 255


def draw_level(axes: Axes, stride: int, light: float = 0.3) -> None:
    """The picture in cells of a level over the normalised square, with lines between the cells."""
    side = 128 // stride
    axes.imshow(light + (1 - light) * at_stride(stride), extent=(0, 1, 1, 0))
    for line in np.arange(1, side) / side:
        axes.axhline(line, color="white", linewidth=0.4)
        axes.axvline(line, color="white", linewidth=0.4)
    axes.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(1, 0))


def one_sequence() -> None:
    """The picture on three levels, and their cells one after another."""
    figure = plt.figure(figsize=(7.2, 3.1))
    grid = figure.add_gridspec(2, 3, height_ratios=(3.4, 1))
    for level, stride in enumerate(STRIDES):
        axes, side = figure.add_subplot(grid[0, level]), 128 // stride
        draw_level(axes, stride)
        axes.set_title(f"level {level}: {side} x {side} = {side**2} cells", fontsize=9)
        for spine in axes.spines.values():
            spine.set(visible=True, color=LEVEL_COLOURS[level], linewidth=3)
    strip, start = figure.add_subplot(grid[1, :]), 0
    for level, stride in enumerate(STRIDES):
        count = (128 // stride) ** 2
        colours = at_stride(stride).reshape(1, count, 3)
        strip.imshow(colours, extent=(start, start + count, 0, 1), aspect="auto")
        frame = Rectangle((start, 0), count, 1, fill=False, edgecolor=LEVEL_COLOURS[level], lw=3)
        strip.add_patch(frame)
        strip.text(start, -0.15, str(start), ha="center", va="top", fontsize=9)
        start += count
    strip.text(start + 3, 0.5, f"S = {start}", va="center", fontsize=9)
    strip.set(xlim=(-3, start + 32), ylim=(-0.6, 1.1))
    strip.axis("off")
    plt.show()


def points_on_levels() -> None:
    """One query on three levels: two points on each, and one softmax over all six."""
    _, axes = plt.subplots(1, 4, figsize=(7.4, 2.3), width_ratios=(1, 1, 1, 0.9))
    for level, (axis, stride) in enumerate(zip(axes, STRIDES, strict=False)):
        draw_level(axis, stride, 0.45)
        axis.set_title(f"level {level}", fontsize=9)
        for offset, weight in zip(OFFSETS[level], WEIGHTS[level], strict=True):
            end = REFERENCE + offset * stride / 128
            axis.plot(*np.stack([REFERENCE, end]).T, color="black", linewidth=1)
            axis.scatter(*end, s=30 + 500 * weight, color=POINT, edgecolors="black", zorder=3)
        axis.plot(*REFERENCE, "+", color=QUERY, markersize=12, markeredgewidth=2.5)
    last = axes[3]
    bars = last.barh(range(6), WEIGHTS.flatten(), color=np.repeat(LEVEL_COLOURS, 2))
    last.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
    last.set(ylim=(5.7, -0.7), xlim=(0, 0.4), xticks=[], yticks=[0.5, 2.5, 4.5])
    last.set_yticklabels(["0", "1", "2"], fontsize=8)
    last.set_title("weights sum to 1", fontsize=9)
    last.set_ylabel("level", fontsize=8)
    plt.show()


def two_levels(dx: float, dy: float) -> None:
    """One offset in pixels of its level, on a fine and on a coarse level."""
    _, axes = plt.subplots(1, 2, figsize=(6.2, 3.2))
    for level, (axis, stride) in enumerate(zip(axes, (8, 32), strict=True)):
        draw_level(axis, stride)
        end = REFERENCE + np.array([dx, dy]) * stride / 128
        axis.plot(*np.stack([REFERENCE, end]).T, color="black", linewidth=1.2, clip_on=False)
        axis.plot(*REFERENCE, "+", color=QUERY, markersize=14, markeredgewidth=2.5)
        axis.plot(*end, "o", color=POINT, markeredgecolor="black", markersize=9, clip_on=False)
        axis.set(xlim=(-0.35, 1.35), ylim=(1.35, -0.35))
        axis.spines[:].set_visible(False)
        inside = ((end >= 0) & (end <= 1)).all()
        moved = np.array([dx, dy]) * stride
        axis.set_title(
            f"level {level}, cells of {stride} pixels\n"
            f"moves by ({moved[0]:.0f}, {moved[1]:.0f}) pixels of the image"
            + ("" if inside else "\nand leaves it: reads zero" if far(end, stride) else ""),
            fontsize=9,
        )


def far(end: np.ndarray, stride: int) -> bool:
    """Whether a point lies so far outside that none of its four pixels is on the map."""
    return bool((np.abs(end - 0.5) > 0.5 + stride / 256).any())


def in_the_box() -> None:
    """Offsets on a head that looks right, in boxes of three sizes: K of them reach the edge."""
    axes = canvas(7.2, 1.9)
    for x, width, height in ((1.0, 1.5, 1.3), (3.7, 2.6, 0.8), (6.2, 0.8, 1.6)):
        corner = (x - width / 2, 0.95 - height / 2)
        axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=QUERY, linewidth=1.8))
        axes.plot(x, 0.95, "+", color=QUERY, markersize=11, markeredgewidth=2)
        for k in range(1, 5):
            for side in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1), (1, -1), (-1, 1)):
                place = (x + side[0] * k / 4 * width / 2, 0.95 + side[1] * k / 4 * height / 2)
                strong = side == (1, 0)
                axes.plot(
                    *place,
                    "o",
                    color=POINT if strong else "#F5D9A0",
                    markersize=5 if strong else 3.5,
                )
                if strong and width > 1:
                    axes.text(place[0], 0.82, str(k), ha="center", va="top", fontsize=8)
    plt.show()


def every_query() -> None:
    """One layer for the tokens of all levels: the level embedding tells it who is asking."""
    axes = canvas(7.4, 2.1)
    for level, y in enumerate((1.75, 1.05, 0.35)):
        block(axes, 1.0, y, f"token of level {level}", LEVEL_COLOURS[level], 1.7, 0.5)
        axes.text(1.98, y, f"+ level embedding {level}", va="center", fontsize=8)
        arrow(axes, (3.25, y), (3.95, 1.05 + 0.2 * (1 - level)), colour=QUERY)
    block(axes, 4.75, 1.05, "the same layer:\noffsets and\nweights", QUERY, 1.5, 1.1)
    for level, y in enumerate((1.75, 1.05, 0.35)):
        arrow(axes, (5.5, 1.05 + 0.2 * (1 - level)), (6.0, y), colour=POINT)
        axes.text(6.05, y, f"K points on level {level}", va="center", fontsize=8, color=QUIET)
    plt.show()


def divide_then_multiply() -> None:
    """A place on a padded level, in the image, and on another padded level."""
    axes = canvas(7.4, 1.9)
    panels = (
        (0.1, 8, 12, 5, 8, 0.13, "its own level, padded", (7.5 / 12, 4.5 / 8)),
        (3.0, 1, 1, 1, 1, 0, "the image, without padding", (7.5 / 8, 4.5 / 5)),
        (5.6, 2, 3, 2, 2, 0.52, "another level, padded", (7.5 / 8 * 2 / 3, 4.5 / 5 * 2 / 2)),
    )
    for x, rows, columns, valid_rows, valid_columns, size, title, place in panels:
        width, height = (columns * size, rows * size) if size else (1.4, 0.95)
        y = 0.85 - height / 2
        for row in range(rows):
            for column in range(columns):
                valid = row < valid_rows and column < valid_columns
                shade = "#CFE9DF" if valid else "#DDDDDD"
                corner = (x + column * width / columns, y + (rows - 1 - row) * height / rows)
                cell = Rectangle(corner, width / columns, height / rows, facecolor=shade)
                cell.set(edgecolor=VALUE if valid else QUIET, linewidth=0.6)
                axes.add_patch(cell)
        axes.plot(
            x + place[0] * width, y + (1 - place[1]) * height, "x", color=QUERY, ms=9, mew=2.5
        )
        axes.text(x + width / 2, 1.55, title, ha="center", fontsize=9)
    arrow(axes, (1.85, 0.85), (2.85, 0.85), "$/\\ r_{own}$", QUERY)
    arrow(axes, (4.5, 0.85), (5.5, 0.85), "$\\cdot\\ r_{l}$", QUERY)
    plt.show()
