"""Schematics of chapter deformable_convolution."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from schematics import POINT, QUERY, QUIET, VALUE, arrow, block, canvas, running_example

CENTRE = np.array([58.0, 84.0])  # on the seven, in pixels of the running example
GRID = np.array([(x, y) for y in (-1, 0, 1) for x in (-1, 0, 1)], dtype=float)
STEP = 9.0  # pixels of the image between taps: one cell of a coarse map
ALONG_THE_SEVEN = np.array(
    [(54, 67), (63, 68), (72, 66), (49, 90), (58, 88), (68, 77), (54, 108), (59, 100), (66, 92)],
    dtype=float,
)


def pale_picture(
    axes: Axes, left: int = 26, right: int = 100, top: int = 48, low: int = 122
) -> None:
    """The part of the running example around its digit, so light that points stand out."""
    picture = running_example()[top:low, left:right] / 255
    extent = (left - 0.5, right - 0.5, low - 0.5, top - 0.5)
    axes.imshow(0.45 + 0.55 * picture, extent=extent)
    axes.set(xticks=[], yticks=[], xlim=extent[:2], ylim=extent[2:])


def draw_taps(axes: Axes, points: np.ndarray) -> None:
    """The fixed grid as rings, the points as discs, and an arrow from each ring to its point."""
    fixed = CENTRE + STEP * GRID
    for start, end in zip(fixed, points, strict=True):
        if np.abs(end - start).max() > 2:
            line = {"arrowstyle": "-|>", "color": "black", "linewidth": 0.9, "shrinkB": 3}
            axes.annotate("", end, start, arrowprops=line)
    axes.plot(*fixed.T, "o", color="black", fillstyle="none", markersize=5, markeredgewidth=0.9)
    axes.plot(*points.T, "o", color=POINT, markeredgecolor="black", markersize=7)


def moved_taps() -> None:
    """One place on the running example, and where four kinds of convolution read for it."""
    angle = np.radians(30)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    panels = {
        "convolution": CENTRE + STEP * GRID,
        "spread out (dilation 2)": CENTRE + 2 * STEP * GRID,
        "turned and spread": CENTRE + 1.7 * STEP * GRID @ turn.T,
        "each on its own": ALONG_THE_SEVEN,
    }
    _, axes = plt.subplots(1, 4, figsize=(7.4, 2.1))
    for axis, (name, points) in zip(axes, panels.items(), strict=True):
        pale_picture(axis)
        draw_taps(axis, points)
        axis.set_title(name, fontsize=9)
    plt.show()


def one_layer() -> None:
    """A deformable convolution as blocks, with the shape of what flows at each arrow."""
    axes = canvas(7.4, 2.3)
    block(axes, 0.75, 0.65, "feature\nmap $x$", VALUE, 1.1, 0.8)
    block(axes, 2.75, 1.75, "small\nconvolution", QUERY, 1.3, 0.7)
    block(axes, 4.2, 0.65, "read 9 points\nfor each place", POINT, 1.5, 0.8)
    block(axes, 6.7, 0.65, "weigh and add:\n$\\sum_k w_k \\, x(\\cdot)$", VALUE, 1.3, 0.8)
    arrow(axes, (1.35, 0.65), (3.4, 0.65), "(C, H, W)", VALUE)
    arrow(axes, (0.75, 1.1), (2.05, 1.75), "", VALUE, bend=-0.25)
    arrow(axes, (3.45, 1.75), (4.2, 1.1), "", QUERY, bend=-0.25)
    axes.text(4.2, 1.72, "offsets $\\Delta p_k$ (H, W, 9, 2)", color=QUERY, fontsize=8, va="center")
    arrow(axes, (5.0, 0.65), (6.0, 0.65), "", POINT)
    axes.text(5.5, 0.8, "(H, W, 9, C)", color=POINT, fontsize=8, ha="center", va="center")
    axes.text(6.7, 0.1, "out: (O, H, W)", color=QUIET, fontsize=8, ha="center", va="center")
    plt.show()


def towards_green(points: np.ndarray, steps: int) -> np.ndarray:
    """Points after small steps to where the picture is greener; a rule of ours, not a learned one.

    points: (N, 2) as (x, y) in pixels of the running example.
    """
    picture = running_example().astype(float)
    green = picture[..., 1] - picture[..., [0, 2]].mean(-1)
    kernel = np.exp(-(np.arange(-18.0, 19) ** 2) / (2 * 5.0**2))
    for axis in (0, 1):
        green = np.apply_along_axis(np.convolve, axis, green, kernel / kernel.sum(), "same")
    slope_y, slope_x = np.gradient(green)
    points = points.copy()
    for _ in range(steps):
        column, row = points.round().astype(int).clip(0, 127).T
        slope = np.stack([slope_x[row, column], slope_y[row, column]], -1)
        points += slope / np.maximum(np.abs(slope).max(-1, keepdims=True), 0.02)
    return points


def on_the_seven(points: np.ndarray) -> float:
    """The share of points (N, 2), pixels of the running example, that lie on its digit."""
    column, row = points.round().astype(int).clip(0, 127).T
    red, green, blue = running_example()[row, column].astype(float).T / 255
    return float((green - (red + blue) / 2 > 0.2).mean())


def three_layers() -> None:
    """What one output sees through three layers: fixed taps, and taps that follow the digit."""
    _, axes = plt.subplots(1, 2, figsize=(6.2, 3.1))
    for axis, name in zip(axes, ("three convolutions", "three deformable ones"), strict=True):
        points = CENTRE[None]
        for _ in range(3):
            points = (points[:, None] + STEP * GRID).reshape(-1, 2)
            if name.endswith("ones"):
                points = towards_green(points, steps=5)
        pale_picture(axis, 14, 114, 32, 128)
        axis.plot(*points.T, "o", color=POINT, markersize=2.6, alpha=0.8, markeredgewidth=0)
        axis.plot(*CENTRE, "k+", markersize=10)
        places = len(np.unique(points.round(), axis=0))
        title = f"{name}: {places} places,\n{on_the_seven(points):.0%} of 729 samples on the seven"
        axis.set_title(title, fontsize=9)
    plt.show()
