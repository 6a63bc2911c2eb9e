"""The schematics of chapter attention: one query and its keys, heads, cells, gradients."""

import math

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from . import LOSS, POINT, QUERY, QUIET, VALUE, arrow, block, canvas, running_example

QUERY_NUMBERS = (1, 2, 0, 1)
KEYS = ((2, 1, 3, 0), (0, 1, 1, 0), (1, -1, 0, 1))
VALUES = ((10, 0), (0, 10), (-10, -10))
DIGIT_CELLS = (9, 10, 13)  # with most of the seven, of the running example at stride 32


def query_key_value() -> None:
    """One query and three keys with numbers: scores, weights, and the sum of the values."""
    axes = canvas(7.4, 2.5)
    scores = [sum(a * b for a, b in zip(QUERY_NUMBERS, key, strict=True)) / 2 for key in KEYS]
    total = sum(math.exp(score) for score in scores)
    weights = [math.exp(score) / total for score in scores]
    heights = (2.0, 1.35, 0.7)
    _numbers(axes, 0.1, 1.35, QUERY_NUMBERS, QUERY, "query (4)")
    for height, key, value, score, weight in zip(
        heights, KEYS, VALUES, scores, weights, strict=True
    ):
        arrow(axes, (1.2, 1.35), (1.62, height), colour=QUERY)
        _numbers(axes, 1.7, height, key, VALUE, "keys (3, 4)" if height == 2.0 else "")
        arrow(axes, (2.77, height), (3.12, height))
        axes.text(3.3, height, f"{score:.0f}", ha="center", va="center", fontsize=11)
        arrow(axes, (3.48, height), (3.85, height))
        axes.add_patch(
            Rectangle((3.95, height - 0.12), 0.8 * weight / weights[0], 0.24, facecolor=QUERY)
        )
        axes.text(4.85, height, f"{weight:.3f}", va="center", fontsize=9, color=QUERY)
        axes.text(5.38, height, "×", ha="center", va="center", fontsize=11)
        _numbers(axes, 5.5, height, value, VALUE, "values (3, 2)" if height == 2.0 else "", 0.36)
        arrow(axes, (6.26, height), (6.55, 1.35 + (height - 1.35) * 0.25))
    output = [sum(w * v[i] for w, v in zip(weights, VALUES, strict=True)) for i in (0, 1)]
    for row, number in enumerate(output):
        corner = (6.62, 1.35 - row * 0.28)
        axes.add_patch(Rectangle(corner, 0.55, 0.28, facecolor="white", edgecolor=QUERY, lw=1.5))
        axes.text(6.895, corner[1] + 0.14, f"{number:.2f}", ha="center", va="center", fontsize=9)
    axes.text(6.895, 1.75, "output (2)", ha="center", fontsize=8.5, color=QUERY)
    for x, text in (
        (2.2, "compare"),
        (3.3, "scores (3)"),
        (4.5, "weights (3)"),
        (6.0, "average"),
    ):
        axes.text(x, 0.2, text, ha="center", fontsize=8.5, color=QUIET)
    plt.show()


def heads() -> None:
    """Multi-head attention as blocks, with the shape of what flows at each arrow."""
    axes = canvas(7.8, 3.0)
    block(axes, 0.6, 2.4, "queries\n$z$", QUERY, 0.95, 0.7)
    block(axes, 0.6, 0.9, "features\n$x$", VALUE, 0.95, 0.7)
    for y, name, colour in ((2.4, "$U$", QUERY), (1.35, "$V$", VALUE), (0.45, "$W'$", VALUE)):
        block(axes, 2.05, y, name, colour, 0.6, 0.55, strong=True)
        start = 2.4 if colour == QUERY else 0.9 + 0.2 * (1 if y > 1 else -1)
        arrow(axes, (1.1, start), (1.72, y), colour=colour)
    axes.text(1.4, 2.5, "(Q, C)", ha="center", fontsize=8, color=QUERY)
    axes.text(1.12, 1.38, "(N, C)", ha="center", fontsize=8, color=VALUE)
    block(axes, 4.05, 1.9, "scores,\nsoftmax", QUERY, 0.95, 0.75)
    arrow(axes, (2.38, 2.4), (3.55, 2.1), "", QUERY)
    axes.text(2.95, 2.4, "(M, Q, D)", ha="center", fontsize=8, color=QUERY)
    arrow(axes, (2.38, 1.35), (3.55, 1.75), "", VALUE)
    axes.text(3.05, 1.33, "(M, N, D)", ha="center", fontsize=8, color=VALUE)
    block(axes, 5.4, 1.2, "weighted\nsum", QUERY, 0.95, 0.75)
    arrow(axes, (4.55, 1.75), (4.93, 1.42), "", QUERY)
    axes.text(4.8, 1.66, "$A$ (M, Q, N)", ha="left", fontsize=8, color=QUERY)
    arrow(axes, (2.38, 0.45), (4.91, 0.95), "", VALUE)
    axes.text(3.7, 0.5, "(M, N, D)", ha="center", fontsize=8, color=VALUE)
    block(axes, 6.95, 1.2, "$W$", QUERY, 0.6, 0.55, strong=True)
    arrow(axes, (5.9, 1.2), (6.62, 1.2), "", QUERY)
    axes.text(6.26, 1.26, "(M, Q, D)\n= (Q, C)", ha="center", fontsize=8, color=QUERY)
    arrow(axes, (7.28, 1.2), (7.75, 1.2), "", QUERY)
    axes.text(7.52, 1.28, "(Q, C)", ha="center", fontsize=8, color=QUERY)
    plt.show()


def list_of_cells() -> None:
    """The running example, its map at stride 32, and the map as a list of 16 tokens."""
    picture = running_example()
    coarse = picture.reshape(4, 32, 4, 32, 3).mean((1, 3)) / 255
    figure = plt.figure(figsize=(7.2, 3.5))
    upper, lower = figure.subfigures(2, 1, height_ratios=(2.3, 1))
    whole, grid = upper.subplots(1, 2)
    whole.imshow(picture)
    for edge in (32, 64, 96):
        whole.axvline(edge - 0.5, color="white", lw=1)
        whole.axhline(edge - 0.5, color="white", lw=1)
    whole.set(title="image, 128 x 128 pixels", xticks=[], yticks=[])
    grid.imshow(coarse)
    grid.set(title="map at stride 32, (C, 4, 4)", xticks=[], yticks=[])
    for cell in range(16):
        row, column = divmod(cell, 4)
        grid.text(column, row, cell, ha="center", va="center", fontsize=9)
        if cell in DIGIT_CELLS:
            grid.add_patch(_outline(column, row))
    tokens = lower.subplots()
    tokens.imshow(coarse.reshape(1, 16, 3))
    for cell in range(16):
        tokens.text(cell, 0, cell, ha="center", va="center", fontsize=9)
        if cell in DIGIT_CELLS:
            tokens.add_patch(_outline(cell, 0))
    tokens.set(title="the same as a list of tokens, (16, C)", xticks=[], yticks=[])
    plt.show()


def who_hears() -> None:
    """The gradient that comes back from the output, shared out among four keys and among 24."""
    left, right = canvas(7.2, 2.6, columns=2)
    for axes, count in ((left, 4), (right, 24)):
        for key in range(count):
            x = 0.25 + 3.1 * (key + 0.5) / count
            width = 0.9 * 3.1 / count
            axes.plot(
                [1.8, x], [1.85, 0.78], color=LOSS, lw=max(16 / count, 0.7), solid_capstyle="butt"
            )
            axes.add_patch(
                Rectangle(
                    (x - width / 2, 0.45),
                    width,
                    0.3,
                    facecolor=POINT if key == count // 3 else "white",
                    edgecolor=VALUE,
                    lw=1.2,
                )
            )
        block(axes, 1.8, 2.05, "output", QUERY, 0.9, 0.42)
        axes.text(2.4, 2.05, "gradient $g$", fontsize=9, color=LOSS, va="center")
        axes.text(1.8, 0.15, f"{count} keys, each receives $g$ / {count}", ha="center", fontsize=9)
    plt.show()


def _numbers(
    axes: Axes,
    x: float,
    y: float,
    numbers: tuple[int, ...],
    colour: str,
    label: str,
    size: float = 0.26,
) -> None:
    """A row of numbers in boxes that starts at x, centred on y, with a label above it."""
    for index, number in enumerate(numbers):
        corner = (x + index * size, y - 0.14)
        axes.add_patch(Rectangle(corner, size, 0.28, facecolor="white", edgecolor=colour, lw=1.2))
        axes.text(corner[0] + size / 2, y, number, ha="center", va="center", fontsize=9)
    axes.text(x + len(numbers) * size / 2, y + 0.24, label, ha="center", fontsize=8.5, color=colour)


def _outline(column: float, row: float) -> Rectangle:
    return Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, fill=False, edgecolor=POINT, lw=2)
