"""Schematics of chapter deformable_attention."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Circle, Rectangle

from schematics import CUT, POINT, QUERY, QUIET, VALUE, arrow, block, canvas, running_example

REFERENCE = np.array([60.0, 88.0])  # pixels of the running example
OFFSETS = np.array([(-14.0, -10.0), (9.0, -20.0), (16.0, 8.0), (-5.0, 17.0)])
WEIGHTS = np.array([0.1, 0.5, 0.1, 0.3])


def colour_at(point: np.ndarray) -> np.ndarray:
    """The running example's colour at a whole pixel (x, y), in [0, 1]."""
    column, row = point.round().astype(int)
    return running_example()[row, column] / 255


def one_query() -> None:
    """One query on the running example: four points, their colours, their weights, the sum."""
    _, (left, right) = plt.subplots(1, 2, figsize=(7.4, 2.9), width_ratios=(1, 1.5))
    draw_points(left)
    right.set(xlim=(0, 5.2), ylim=(0, 3.4), aspect="equal")
    right.axis("off")
    for title, x in (("sample", 0.6), ("weight", 1.75), ("output", 4.2)):
        right.text(x, 3.2, title, ha="center", fontsize=9)
    total = np.zeros(3)
    for k, (offset, weight) in enumerate(zip(OFFSETS, WEIGHTS, strict=True)):
        y, colour = 2.6 - 0.75 * k, colour_at(REFERENCE + offset)
        right.text(0.1, y, str(k + 1), va="center", fontsize=9, color="black")
        swatch(right, 0.6, y, colour)
        right.text(1.75, y, f"× {weight}", va="center", ha="center", fontsize=10, color=QUERY)
        arrow(right, (2.2, y), (3.65, 1.48), colour=POINT)
        total += weight * colour
    swatch(right, 4.2, 1.48, total, 0.9)
    right.text(4.2, 0.75, "their weighted sum", ha="center", fontsize=8)
    plt.show()


def draw_points(axes: Axes) -> None:
    """The digit of the running example, the reference and the four points around it."""
    picture = running_example()[46:122, 26:102] / 255
    axes.imshow(0.35 + 0.65 * picture, extent=(25.5, 101.5, 121.5, 45.5))
    axes.set(xticks=[], yticks=[])
    for k, (offset, weight) in enumerate(zip(OFFSETS, WEIGHTS, strict=True)):
        end = REFERENCE + offset
        line = {"arrowstyle": "-", "color": "black", "linewidth": 1}
        axes.annotate("", end, REFERENCE, arrowprops=line)
        size = 40 + 320 * weight
        axes.scatter(*end, s=size, color=POINT, edgecolors="black", zorder=3)
        axes.annotate(str(k + 1), end, ha="center", va="center", fontsize=8, zorder=4)
    axes.plot(*REFERENCE, "+", color=QUERY, markersize=13, markeredgewidth=2.5)


def swatch(axes: Axes, x: float, y: float, colour: np.ndarray, side: float = 0.55) -> None:
    """A square of one colour around (x, y)."""
    corner = (x - side / 2, y - side / 2)
    axes.add_patch(Rectangle(corner, side, side, facecolor=colour, edgecolor="black"))


def the_module() -> None:
    """The four linear layers of the module, with the shapes of what flows between them."""
    axes = canvas(7.4, 3.3)
    block(axes, 0.7, 2.55, "query $z_q$\n(Q, C)", QUERY, 1.1, 0.75)
    block(axes, 0.7, 0.65, "feature map\n(HW, C)", VALUE, 1.1, 0.75)
    block(axes, 2.6, 2.95, "Linear\nC to 2MK", QUERY, 1.1, 0.6)
    block(axes, 2.6, 2.1, "Linear, softmax\nC to MK", QUERY, 1.35, 0.6)
    block(axes, 2.6, 0.65, "Linear $W'$\nC to C", VALUE, 1.1, 0.6)
    block(axes, 4.65, 1.4, "sample", POINT, 0.95, 0.6)
    block(axes, 5.85, 1.4, "weigh,\nadd over $k$", POINT, 1.05, 0.7)
    block(axes, 5.85, 0.35, "Linear $W$\nC to C", QUIET, 1.05, 0.55)
    arrow(axes, (1.27, 2.65), (2.05, 2.95), colour=QUERY)
    arrow(axes, (1.27, 2.45), (1.92, 2.1), colour=QUERY)
    arrow(axes, (1.27, 0.65), (2.05, 0.65), colour=VALUE)
    arrow(axes, (3.17, 2.95), (4.65, 1.75), colour=QUERY, bend=-0.25)
    arrow(axes, (3.3, 2.1), (5.85, 1.8), colour=QUERY, bend=-0.2)
    arrow(axes, (3.17, 0.65), (4.3, 1.1), colour=VALUE, bend=0.1)
    arrow(axes, (5.15, 1.4), (5.32, 1.4), colour=POINT)
    arrow(axes, (5.85, 1.04), (5.85, 0.65), colour=POINT)
    arrow(axes, (6.4, 0.35), (6.85, 0.35), colour=QUIET)
    for x, y, text, colour in (
        (4.2, 3.0, "offsets $\\Delta p$\n(Q, M, K, 2)", QUERY),
        (5.6, 2.2, "weights $A$ (Q, M, K)", QUERY),
        (3.5, 1.13, "values\n(HW, M, D)", VALUE),
        (4.65, 0.95, "(Q, M, K, D)", POINT),
        (6.2, 0.85, "(Q, M·D)", POINT),
        (7.08, 0.35, "(Q, C)", QUIET),
    ):
        axes.text(x, y, text, color=colour, fontsize=8, ha="center", va="center")
    arrow(axes, (3.75, 1.55), (4.15, 1.45), colour=QUERY)
    axes.text(3.7, 1.58, "$p_q$ (Q, 2)", fontsize=8, ha="right", va="center", color=QUERY)
    plt.show()


def who_decides() -> None:
    """What the weights of dense and of deformable attention are made of."""
    axes = canvas(7.4, 2.3)
    for left, name in ((0.1, "dense attention"), (3.9, "deformable attention")):
        axes.text(left + 1.7, 2.15, name, ha="center", fontsize=10)
        block(axes, left + 0.6, 1.5, "query", QUERY, 0.9, 0.5)
        block(axes, left + 0.6, 0.55, "content\nof the map", VALUE, 1.1, 0.6)
        block(axes, left + 2.5, 1.5, "where, and\nhow much", POINT, 1.1, 0.6)
        block(axes, left + 2.5, 0.55, "output", QUIET, 0.9, 0.5)
        arrow(axes, (left + 1.08, 1.5), (left + 1.92, 1.5), colour=QUERY)
        arrow(axes, (left + 1.18, 0.55), (left + 2.02, 0.55), "values", VALUE)
        arrow(axes, (left + 2.5, 1.17), (left + 2.5, 0.82), colour=POINT)
    arrow(axes, (1.2, 0.85), (2.05, 1.3), colour=VALUE)
    axes.text(1.62, 1.18, "keys", fontsize=8, color=VALUE, ha="right")
    arrow(axes, (5.0, 0.85), (5.85, 1.3), colour=CUT, dashed=True)
    axes.text(5.46, 1.18, "no keys", fontsize=8, color=CUT, ha="right")
    plt.show()


def two_orders() -> None:
    """Project every pixel and then sample, or sample and then project."""
    _, axes = plt.subplots(1, 2, figsize=(7.4, 2.2))
    rows, columns, points = 6, 8, [(1.6, 1.3), (3.4, 3.7), (5.7, 2.2), (6.4, 4.5)]
    titles = ("project all pixels, then sample", "sample, then project")
    for axis, title, projected in zip(axes, titles, (True, False), strict=True):
        axis.set(xlim=(-0.2, 13), ylim=(-0.9, rows + 0.1), aspect="equal")
        axis.axis("off")
        axis.set_title(title, fontsize=9)
        for row in range(rows):
            for column in range(columns):
                shade = VALUE if projected else "white"
                square = Rectangle((column, row), 1, 1, facecolor=shade, edgecolor=VALUE, alpha=0.5)
                axis.add_patch(square)
        for x, y in points:
            axis.add_patch(Circle((x, y), 0.25, facecolor=POINT, edgecolor="black", zorder=3))
        for y in (1.2, 2.4, 3.6, 4.8):
            shade = "white" if projected else VALUE
            patch = Rectangle((10.3, y - 0.4), 0.8, 0.8, facecolor=shade, edgecolor=VALUE)
            axis.add_patch(patch)
            axis.plot(10.7, y, "o", color=POINT, markeredgecolor="black", markersize=6)
        arrow(axis, (8.3, 3), (9.9, 3), colour=POINT)
        where = "$HW$ products with $W'$" if projected else "$Q K$ products with $W'$"
        axis.text(4 if projected else 10.7, -0.55, where, ha="center", fontsize=8, color=VALUE)
    plt.show()
