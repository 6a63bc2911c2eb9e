"""The book's schematics: drawings by code, in one style. A chapter's own stand in the module with
the chapter's name; here is what all share.

Colours keep their meaning in the whole book:
- QUERY (blue): a query, and what is made from it (offsets, weights).
- VALUE (green): feature maps, values, memory; what is sampled.
- POINT (orange): sampling points and samples.
- LOSS (purple): targets, matching, losses.
- CUT (red): what is wrong, or where a gradient ends.
- QUIET (grey): everything that is not the subject.
"""

import os
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from PIL import Image

QUERY, VALUE, POINT, LOSS, CUT, QUIET = (
    "#0072B2",
    "#009E73",
    "#E69F00",
    "#CC79A7",
    "#D55E00",
    "#777777",
)
EXAMPLE = Path(__file__).resolve().parents[2] / "data" / "samples" / "000010.png"
STILL = "BOOK_STILL" in os.environ  # book/chapters.py sets it
STAGES = ("image", "backbone", "tokens", "encoder", "queries", "decoder", "boxes, classes")


def running_example() -> np.ndarray:
    """The picture that the whole book follows, a seven on wood: (128, 128, 3), uint8."""
    return np.asarray(Image.open(EXAMPLE).convert("RGB"))


def canvas(width: float = 7, height: float = 2.5, columns: int = 1) -> Axes | np.ndarray:
    """Axes to draw on: no ticks, equal units, (0, 0) at the lower left, one unit per inch."""
    axes = plt.subplots(1, columns, figsize=(width, height))[1]
    for axis in np.atleast_1d(axes):
        axis.set(xlim=(0, width / columns), ylim=(0, height), aspect="equal")
        axis.axis("off")
    return axes


def block(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    colour: str = QUIET,
    width: float = 1.0,
    height: float = 0.5,
    strong: bool = False,
) -> None:
    """A rounded box around (x, y) with its text; strong: filled."""
    patch = FancyBboxPatch(
        (x - width / 2 + 0.05, y - height / 2 + 0.05),
        width - 0.1,
        height - 0.1,
        boxstyle="round,pad=0.05",
        facecolor=colour if strong else "white",
        edgecolor=colour,
        linewidth=1.5,
    )
    axes.add_patch(patch)
    shade = "white" if strong else "black"
    axes.text(x, y, text, ha="center", va="center", color=shade, fontsize=9)


def arrow(
    axes: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    text: str = "",
    colour: str = QUIET,
    bend: float = 0.0,
    style: str = "-|>",
    dashed: bool = False,
) -> None:
    """An arrow; its text, a shape most often, stands above its middle."""
    patch = FancyArrowPatch(
        start,
        end,
        arrowstyle=style,
        mutation_scale=11,
        color=colour,
        linewidth=1.4,
        linestyle="--" if dashed else "-",
        connectionstyle=f"arc3,rad={bend}",
        shrinkA=0,
        shrinkB=0,
    )
    axes.add_patch(patch)
    if text:
        x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        axes.text(x, y + 0.08, text, ha="center", va="bottom", fontsize=8, color=colour)


def cells(
    axes: Axes,
    x: float,
    y: float,
    rows: int,
    columns: int,
    size: float = 0.2,
    colour: str = VALUE,
    filled: dict[tuple[int, int], str] | None = None,
) -> None:
    """A feature map as a grid with its lower left corner at (x, y); filled: colours by (row,
    column), row 0 on top."""
    for row in range(rows):
        for column in range(columns):
            shade = (filled or {}).get((row, column), "white")
            corner = (x + column * size, y + (rows - 1 - row) * size)
            axes.add_patch(
                Rectangle(corner, size, size, facecolor=shade, edgecolor=colour, linewidth=0.8)
            )


def where_in_the_detector(*here: str) -> None:
    """The detector as a row of stages, those that a chapter is about filled."""
    axes = canvas(7, 0.6)
    for index, stage in enumerate(STAGES):
        x = 0.5 + index
        block(axes, x, 0.3, stage.replace(", ", ",\n"), QUERY, 0.86, 0.46, strong=stage in here)
        if index:
            arrow(axes, (x - 0.57, 0.3), (x - 0.43, 0.3))


def slider(draw: Callable[..., None], **ranges: tuple[float, float, float]) -> None:
    """Call `draw` with values that the reader moves: name=(lowest, highest, at first).

    In JupyterLab these are sliders. Where the book is made there is one still figure, with the
    values at first.
    """
    first = {name: start for name, (_, _, start) in ranges.items()}
    if STILL:
        draw(**first)
        return
    import ipywidgets

    def drawn(**values: float) -> None:
        draw(**values)
        plt.show()

    controls = {
        name: (ipywidgets.IntSlider if isinstance(start, int) else ipywidgets.FloatSlider)(
            value=start,
            min=low,
            max=high,
            step=1 if isinstance(start, int) else (high - low) / 100,
            continuous_update=True,
        )
        for name, (low, high, start) in ranges.items()
    }
    ipywidgets.interact(drawn, **controls)
