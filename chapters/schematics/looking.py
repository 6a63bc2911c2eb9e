"""The schematics and figures of chapter looking."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from schematics import CUT, LOSS, POINT, QUERY, QUIET, VALUE, arrow, block, canvas, running_example

SEVEN = (42.6, 62.0, 77.2, 115.6)  # xyxy in pixels, what the shipped detector finds


def frame(axes: Axes, box: tuple[float, float, float, float], colour: str = QUERY, **style) -> None:
    """A box, xyxy in the units of the axes."""
    x0, y0, x1, y1 = box
    style = {"lw": 1.6, "ec": colour, "fill": False} | style
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, **style))


def picture(axes: Axes, pale: float = 0.5, window: tuple[float, ...] | None = None) -> None:
    """The running example, so much nearer to white; window: (left, right, top, bottom)."""
    pixels = running_example() * (1 - pale) + 255 * pale
    axes.imshow(pixels.astype(np.uint8), extent=(0, 128, 128, 0))
    if window:
        axes.set(xlim=window[:2], ylim=(window[3], window[2]))
    axes.set_axis_off()


def two_questions() -> None:
    """Where did it read, and which pixels move the answer: forward to a layer, back to the image."""
    axes = canvas(7.4, 2.7)
    axes.imshow(running_example(), extent=(0.1, 1.7, 0.55, 2.15))
    axes.set(xlim=(0, 7.4), ylim=(0, 2.7))
    stages = (("backbone,\nencoder", VALUE, 2.65), ("decoder\nlayer", QUERY, 4.5))
    for name, colour, x in (*stages, ("x, y, w, h,\nscore", QUERY, 6.5)):
        block(axes, x, 1.35, name, colour, width=1.25, height=0.75, strong=colour == QUERY)
    for start, end, text, colour in (
        (1.72, 2.02, "", QUIET),
        (3.28, 3.87, "maps", VALUE),
        (5.13, 5.87, "", QUERY),
    ):
        arrow(axes, (start, 1.35), (end, 1.35), text, colour)
    axes.text(
        3.57,
        2.42,
        "1  Where did one query read the maps?  Points and weights.",
        ha="center",
        fontsize=9,
        color=POINT,
    )
    arrow(axes, (4.5, 1.75), (3.78, 1.78), colour=POINT, bend=0.6)
    axes.plot([3.42, 3.56, 3.68], [1.68, 1.83, 1.68], "o", color=POINT, ms=5, mec="black")
    arrow(axes, (6.5, 0.95), (6.5, 0.32), colour=LOSS, style="-")
    arrow(axes, (6.5, 0.32), (0.9, 0.32), colour=LOSS, style="-")
    arrow(axes, (0.9, 0.32), (0.9, 0.53), colour=LOSS)
    axes.text(
        3.7,
        0.08,
        "2  Which pixels would change the answer?  The gradient by pixels.",
        ha="center",
        fontsize=9,
        color=LOSS,
    )


def why_borders() -> None:
    """A row through an object: what a brighter border does to x and w, and a brighter middle."""
    panels = plt.subplots(1, 3, figsize=(7.2, 1.9), sharey=True)[1]
    places = np.arange(14)
    row = np.where((places >= 4) & (places <= 9), 1.0, 0.15)
    cases = (
        ("as it is", None, (3.5, 9.5), ""),
        ("brighter beside the left border", 3, (2.5, 9.5), "x moves left, w grows"),
        ("brighter in the middle", 6, (3.5, 9.5), "x and w stay"),
    )
    for axis, (title, brighter, (low, high), text) in zip(panels, cases, strict=True):
        shown = row.copy()
        if brighter is not None:
            shown[brighter] += 0.55
        colours = [CUT if place == brighter else VALUE for place in places]
        axis.bar(places, shown, 0.85, color=colours)
        axis.plot([low, low, high, high], [1.68, 1.78, 1.78, 1.68], color=QUERY)
        axis.plot((low + high) / 2, 1.78, "v", color=QUERY)
        axis.text((low + high) / 2, 1.92, text, ha="center", fontsize=8.5, color=QUERY)
        axis.set(xticks=[], yticks=[], ylim=(0, 2.2))
        axis.set_title(title, fontsize=9)
    panels[0].set_ylabel("brightness")
    panels[0].text(6.5, 1.92, "the box's x and w", ha="center", fontsize=8.5, color=QUERY)


def controls() -> None:
    """Four patterns in one box: the detector's own, and three with which it is compared."""
    generator = np.random.default_rng(3)
    box, K = (0.52, 0.55, 1.32, 1.85), 9
    angle = generator.uniform(0, 2 * np.pi, (2, K))
    far = generator.uniform(0.15, 1.05, (2, K))
    own, other = np.stack([far * np.cos(angle), far * np.sin(angle)], -1)
    weights, lent = (generator.dirichlet(np.full(K, 0.6)) for _ in range(2))
    arms = np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1]), -1).reshape(-1, 2)
    arms = arms[np.abs(arms).sum(1) == 1]
    star = (arms[:, None] * np.arange(1, 5)[:, None] / 4).reshape(-1, 2)
    cases = (
        ("own", "its points,\nits weights", own, weights, POINT),
        ("unweighted", "its points,\nall weights equal", own, np.full(K, 1 / K), QUIET),
        ("borrowed", "the pattern of another\nimage's detection", other, lent, QUIET),
        ("untrained", "the star at the\nstart of training", star, np.full(16, 1 / 16), QUIET),
    )
    for axis, case in zip(canvas(7.4, 2.3, 4), cases, strict=True):
        name, what, points, weight, colour = case
        x, y = (points * (0.4, 0.65) + (0.92, 1.2)).T
        frame(axis, box)
        axis.scatter(x, y, s=12 + 420 * weight, color=colour, edgecolors="black", zorder=3)
        axis.text(0.92, 2.05, name, ha="center", fontsize=9.5, weight="bold")
        axis.text(0.92, 0.4, what, ha="center", va="top", fontsize=8.5)
