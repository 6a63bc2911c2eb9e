"""The schematics of chapter sampling: pixels and points between them."""

import math

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from . import POINT, QUERY, QUIET, VALUE, canvas, running_example

CORNERS = np.array([[10.0, 20.0], [50.0, 80.0]])
WIDTH = 5


def between_pixels() -> None:
    """The running example, and a few of its pixels with a point between them."""
    picture = running_example()
    left, top, width, height = 47, 59, 8, 6
    _, (whole, close) = plt.subplots(1, 2, figsize=(7, 2.9), width_ratios=(1, 1.55))
    whole.imshow(picture)
    whole.add_patch(
        Rectangle((left - 0.5, top - 0.5), width, height, fill=False, edgecolor="white", lw=1.5)
    )
    whole.set(xlabel="x in pixels", ylabel="y in pixels")
    close.imshow(picture)
    for row in range(top, top + height):
        for column in range(left, left + width):
            number = picture[row, column, 1]
            close.text(column, row, number, ha="center", va="center", fontsize=8)
    close.plot(51.25, 61.5, "o", color=POINT, ms=9, mec="black")
    close.annotate("?", (51.25, 61.5), (3, 5), textcoords="offset points", fontsize=13)
    close.set(xlim=(left - 0.5, left + width - 0.5), ylim=(top + height - 0.5, top - 0.5))
    close.set(xticks=range(left, left + width), yticks=range(top, top + height))
    close.set(xlabel="x", ylabel="y", title="the pixels in the frame, and how green they are")
    plt.show()


def four_pixels(x: float = 0.25, y: float = 0.5) -> None:
    """A frame of one pixel around a point: its area over each pixel is that pixel's weight."""
    left, right = plt.subplots(1, 2, figsize=(7, 2.9), width_ratios=(1, 1))[1]
    _frame_over_pixels(left, x, y)
    _bill(right, x, y)
    plt.show()


def point_and_gradient(x: float, y: float) -> None:
    """The same for any point, with the direction in which the value rises; for sliders."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 3.1), width_ratios=(1, 1.15))
    _frame_over_pixels(left, x, y)
    steps = np.linspace(0, 1, 60)
    surface = _value(steps[None, :], steps[:, None])
    shown = right.imshow(surface, extent=(0, 1, 1, 0), vmin=10, vmax=80)
    figure.colorbar(shown, ax=right, label="value")
    by_x, by_y = _slopes(x, y)
    right.plot(x, y, "o", color=POINT, ms=9, mec="black")
    right.annotate(
        "",
        (x + by_x / 150, y + by_y / 150),
        (x, y),
        arrowprops={"arrowstyle": "-|>", "color": "white", "lw": 2, "shrinkA": 4, "shrinkB": 0},
    )
    right.set(xlabel="x", ylabel="y", xlim=(0, 1), ylim=(1, 0))
    right.set_title(f"value {_value(x, y):.1f}, slopes {by_x:.0f} along x, {by_y:.0f} along y")
    plt.show()


def rulers() -> None:
    """One row of five pixels, and where four conventions have their zero and their end."""
    axes = canvas(7, 2.75)
    left, size = 1.95, 0.9
    for column in range(WIDTH):
        corner = (left + column * size, 2.15)
        axes.add_patch(Rectangle(corner, size, 0.42, facecolor="white", edgecolor=VALUE, lw=1.5))
        axes.plot(corner[0] + size / 2, 2.36, "o", color=VALUE, ms=4)
    edges, centres = (0, WIDTH), (0.5, WIDTH - 0.5)
    lines = (
        ("pixels", QUIET, centres, ("0", "W - 1"), edges, ("-0.5", "W - 0.5")),
        ("this book", POINT, edges, ("0", "1"), centres, ("0.5 / W", "1 - 0.5 / W")),
        ("align_corners=False", QUERY, edges, ("-1", "1"), centres, ("-1 + 1 / W", "1 - 1 / W")),
        ("align_corners=True", QUERY, centres, ("-1", "1"), (), ()),
    )
    for number, (name, colour, ends, labels, others, notes) in enumerate(lines):
        y = 1.78 - number * 0.5
        axes.text(left - 0.35, y, name, ha="right", va="center", fontsize=9, color=colour)
        places = [left + size * end for end in (*ends, *others)]
        axes.plot([left, left + WIDTH * size], [y, y], color=QUIET, lw=0.8)
        axes.plot([left + size * end for end in ends], [y, y], color=colour, lw=2.5)
        for place, text in zip(places, (*labels, *notes), strict=True):
            strong = text in labels
            axes.plot([place, place], [y - 0.07, y + 0.07], color=colour, lw=2.5 if strong else 1)
            axes.text(
                place,
                y - 0.1,
                text,
                ha="left" if text == "W - 0.5" else "center",
                va="top",
                fontsize=9 if strong else 7.5,
                weight="bold" if strong else "normal",
                color=colour,
            )
    plt.show()


def turned_box() -> None:
    """What the last exercise makes: a turned box on the picture, and the picture in the box."""
    picture = running_example()
    centre, size, angle = (60.0, 88.5), (36.0, 62.0), math.radians(20)
    _, (left, right) = plt.subplots(1, 2, figsize=(6, 3.2), width_ratios=(1.2, 1))
    left.imshow(picture)
    places = _grid(centre, size, angle, (8, 5))
    left.scatter(*places.reshape(-1, 2).T, color=POINT, s=14, edgecolors="black", linewidths=0.5)
    corners = _grid(centre, size, angle, (2, 2), corners=True)
    left.plot(*corners[[0, 0, 1, 1, 0], [0, 1, 1, 0, 0]].T, color="white", lw=1.5)
    left.set(title="a box, turned by 20 degrees", xlabel="x in pixels", ylabel="y in pixels")
    points = _grid(centre, size, angle, (93, 54)) + 0.5
    grid = torch.tensor(points / 64 - 1, dtype=torch.float32)[None]
    image = torch.tensor(picture).permute(2, 0, 1)[None] / 255
    cut = F.grid_sample(image, grid, align_corners=False)[0]
    right.imshow(cut.permute(1, 2, 0))
    right.set(title="cut out, 93 rows of 54 pixels", xlabel="column", ylabel="row")
    plt.show()


def _frame_over_pixels(axes: Axes, x: float, y: float) -> None:
    """Four pixels around their centres at 0 and 1, and the frame around (x, y)."""
    weights = _weights(x, y)
    for row in (0, 1):
        for column in (0, 1):
            corner = (column - 0.5, row - 0.5)
            axes.add_patch(Rectangle(corner, 1, 1, facecolor="white", edgecolor=VALUE, lw=1.5))
            place = (-0.42 if column == 0 else 1.42, -0.42 if row == 0 else 1.42)
            axes.text(
                *place,
                f"{CORNERS[row, column]:.0f}",
                ha="left" if column == 0 else "right",
                va="top" if row == 0 else "bottom",
                color=VALUE,
                fontsize=12,
                weight="bold",
            )
    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=POINT, alpha=0.35))
    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor=POINT, lw=2.5))
    axes.plot([0.5, 0.5], [-0.5, 1.5], color=VALUE, lw=1.5)
    axes.plot([-0.5, 1.5], [0.5, 0.5], color=VALUE, lw=1.5)
    for row in (0, 1):
        for column in (0, 1):
            if weights[row, column] > 0.02:
                middle = (
                    (x - 0.5 + 0.5) / 2 if column == 0 else (x + 0.5 + 0.5) / 2,
                    (y - 0.5 + 0.5) / 2 if row == 0 else (y + 0.5 + 0.5) / 2,
                )
                text = f"{weights[row, column]:.3f}"
                narrow = (1 - x if column == 0 else x) < 0.35
                turn = 90 if narrow and (1 - y if row == 0 else y) > 0.35 else 0
                axes.text(*middle, text, ha="center", va="center", fontsize=10, rotation=turn)
    axes.plot([0, 1, 0, 1], [0, 0, 1, 1], ".", color=VALUE, ms=4)
    axes.plot(x, y, "o", color=POINT, ms=9, mec="black")
    axes.set(xlim=(-0.6, 1.6), ylim=(1.6, -0.6), aspect="equal", xlabel="x", ylabel="y")
    axes.set(xticks=(0, 1), yticks=(0, 1))
    axes.spines[["left", "bottom"]].set_visible(False)


def _bill(axes: Axes, x: float, y: float) -> None:
    """Weight times value, four lines and their sum."""
    axes.axis("off")
    axes.set(xlim=(0, 3.2), ylim=(0, 2.9))
    weights = _weights(x, y)
    for number, (row, column) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        height = 2.5 - 0.42 * number
        axes.text(0.95, height, f"{weights[row, column]:.3f}", ha="right", color="#9A6A00")
        axes.text(1.15, height, "×", ha="center")
        axes.text(1.65, height, f"{CORNERS[row, column]:.0f}", ha="right", color=VALUE)
        axes.text(1.85, height, "=", ha="center")
        axes.text(2.6, height, f"{weights[row, column] * CORNERS[row, column]:.2f}", ha="right")
    axes.plot([1.9, 2.65], [1.08, 1.08], color="black", lw=1)
    axes.text(2.6, 0.72, f"{_value(x, y):.2f}", ha="right", weight="bold")
    axes.text(0.95, 0.72, "1.000", ha="right", color="#9A6A00")
    axes.plot([0.45, 1.0], [1.08, 1.08], color="black", lw=1)
    axes.text(0.7, 0.3, "areas", ha="center", fontsize=9, color="#9A6A00")
    axes.text(1.55, 0.3, "pixels", ha="center", fontsize=9, color=VALUE)
    axes.text(2.4, 0.3, "their sum", ha="center", fontsize=9)


def _weights(x: float, y: float) -> np.ndarray:
    return np.outer([1 - y, y], [1 - x, x])


def _value(x, y):
    top = (1 - x) * CORNERS[0, 0] + x * CORNERS[0, 1]
    bottom = (1 - x) * CORNERS[1, 0] + x * CORNERS[1, 1]
    return (1 - y) * top + y * bottom


def _slopes(x: float, y: float) -> tuple[float, float]:
    (a, b), (c, d) = CORNERS
    return (1 - y) * (b - a) + y * (d - c), (1 - x) * (c - a) + x * (d - b)


def _grid(centre, size, angle, shape, corners: bool = False) -> np.ndarray:
    """The pixel coordinates, (rows, columns, 2), of a grid of `shape` in a turned box."""
    rows, columns = (
        np.linspace(-0.5, 0.5, n) if corners else (np.arange(n) + 0.5) / n - 0.5 for n in shape
    )
    v, u = np.meshgrid(rows * size[1], columns * size[0], indexing="ij")
    x = centre[0] + math.cos(angle) * u - math.sin(angle) * v
    y = centre[1] + math.sin(angle) * u + math.cos(angle) * v
    return np.stack([x, y], -1)
