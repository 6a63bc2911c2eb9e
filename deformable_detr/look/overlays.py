"""Points and gradient norms over a picture that stays visible, in grey too. Chapter looking."""

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from PIL import Image
from scipy.ndimage import gaussian_filter

Window = tuple[float, float, float, float]

COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7")  # Okabe and Ito's, of the levels,
MARKERS = "osD^"  # which have shapes as well, for prints without colour
SHARES = (0.9, 0.5)  # of a gradient's energy, inside the thin contour and inside the thick one
TITLES = {"x": "centre x", "y": "centre y", "w": "width", "h": "height", "score": "score"}


def draw_points(
    axes: Axes,
    image: Image.Image,
    points: np.ndarray,
    weights: np.ndarray,
    levels: np.ndarray,
    reference: np.ndarray,
    box: np.ndarray | None = None,
) -> None:
    """Each point as a mark, whose area is its weight, and whose shape and colour are its level.

    points: (..., 2) as (x, y). weights, levels: (...). reference: (4,) xyxy, a cross in its middle
    and, if it has a size, a dashed box. box: (4,) xyxy, a solid one. All in pixels of the image.
    """
    _draw_picture(axes, image, pale=0.5)
    points, weights, levels = points.reshape(-1, 2), weights.ravel(), levels.ravel()
    order = np.argsort(-weights)  # the lightest on top, because they are the smallest
    for i in order:
        kind = levels[i] % len(COLOURS)
        axes.plot(
            *points[i],
            marker=MARKERS[kind],
            markersize=2 + 12 * np.sqrt(weights[i] / weights.max()),
            color=COLOURS[kind],
            alpha=0.8,
            markeredgecolor="black",
            markeredgewidth=0.6,
        )
    if np.any(reference[:2] != reference[2:]):
        _draw_box(axes, reference, linestyle="--", linewidth=1)
    middle = reference.reshape(2, 2).mean(0)
    axes.plot(*middle, "+", color="white", markersize=15, markeredgewidth=4)
    axes.plot(*middle, "+", color="black", markersize=14, markeredgewidth=2)
    if box is not None:
        _draw_box(axes, box)
    marks = [
        Line2D([], [], linestyle="", marker=MARKERS[i], color=COLOURS[i], markeredgecolor="black")
        for i in np.unique(levels) % len(COLOURS)
    ]
    names = [f"level {i}" for i in np.unique(levels)]
    axes.legend(marks, names, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 0), frameon=False)


def draw_gradient(
    axes: Axes, image: Image.Image, norm: np.ndarray, box: np.ndarray | None = None
) -> None:
    """The picture pales where the norm is small, and contours hold SHARES of its energy.

    norm: (h, w), of the image in the size in which it was seen. box: (4,) xyxy in its pixels.
    """
    width, height = image.size
    h, w = norm.shape
    energy = gaussian_filter(np.square(norm), max(h, w) / 128)  # single pixels are noise
    _draw_picture(axes, image, pale=0.15)
    veil = 1 - np.sqrt(energy / (energy.max() or 1))
    white = np.ones((h, w, 3))
    axes.imshow(np.dstack([white, 0.65 * veil]), extent=(0, width, height, 0))
    if energy.any():
        x, y = (np.arange(w) + 0.5) * width / w, (np.arange(h) + 0.5) * height / h
        for share, thickness in zip(SHARES, (1.0, 2.4), strict=True):
            lines = axes.contour(x, y, energy, [holding(energy, share)], colors="black")
            lines.set(linewidths=thickness, path_effects=[_halo(thickness)])
    if box is not None:
        _draw_box(axes, box, linestyle="--")


def holding(energy: np.ndarray, share: float) -> float:
    """The level above which the pixels hold that share of the energy."""
    ordered = np.sort(energy, axis=None)[::-1]
    sums = np.cumsum(ordered)
    return float(ordered[np.searchsorted(sums, share * sums[-1])])


def draw_whole(
    axes: Axes, image: Image.Image, box: np.ndarray | None, window: Window | None = None
) -> None:
    """The whole picture, a box, and dotted the window that other figures show."""
    _draw_picture(axes, image)
    show(axes, None)
    if window is not None:
        _draw_box(axes, window, linestyle=":", linewidth=1.2)
    if box is not None:
        _draw_box(axes, box)


def show(axes: Axes, window: Window | None) -> None:
    """A part of the picture, xyxy in its pixels, or all of it, whatever else is drawn; no ticks."""
    if window is None:  # points outside the picture have widened the view
        left, right, bottom, top = axes.images[0].get_extent()
        window = (left, top, right, bottom)
    axes.set(xlim=window[::2], ylim=window[3::-2])
    axes.set(xticks=[], yticks=[])


def around(places: np.ndarray, size: tuple[int, int], margin: float = 0.3) -> Window:
    """A square around places, (N, 2) as (x, y), as far as a picture of that (W, H) has it."""
    low, high = places.min(0), places.max(0)
    half = (high - low).max() * (0.5 + margin) + 1
    ends = []
    for centre, side in zip((low + high) / 2, size, strict=True):
        start = min(max(0.0, centre - half), max(0.0, side - 2 * half))
        ends.append((start, min(side, start + 2 * half)))
    (left, right), (top, bottom) = ends
    return left, top, right, bottom


def _draw_picture(axes: Axes, image: Image.Image, pale: float = 0.0) -> None:
    """In its colours, so much nearer to white; (0, 0) is the corner of its first pixel."""
    pixels = np.asarray(image) * (1 - pale) + 255 * pale
    extent = (0, image.width, image.height, 0)
    axes.imshow(pixels.astype(np.uint8), extent=extent, interpolation="nearest")


def _draw_box(axes: Axes, box: np.ndarray, **style: object) -> None:
    """A rectangle, black with a white halo."""
    x0, y0, x1, y1 = box
    style = {"linewidth": 1.6, "edgecolor": "black"} | style
    effects = [_halo(style["linewidth"])]
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, path_effects=effects, **style))


def _halo(thickness: float) -> patheffects.AbstractPathEffect:
    return patheffects.withStroke(linewidth=thickness + 2, foreground="white")
