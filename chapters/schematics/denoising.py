"""The schematics and figures of chapter denoising."""

import itertools
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from schematics import (
    CUT,
    LOSS,
    POINT,
    QUERY,
    QUIET,
    VALUE,
    arrow,
    block,
    canvas,
    running_example,
)


def two_kinds() -> None:
    """Training with noised objects beside the usual queries: two ways in, and two losses."""
    axes = canvas(7, 2.9)
    block(axes, 0.75, 2.3, "true objects", LOSS, 1.3, 0.42, strong=True)
    block(axes, 2.25, 2.3, "noise", LOSS, 0.9, 0.42)
    block(axes, 4.0, 2.3, "noised objects\nas queries", QUERY, 1.5, 0.52)
    block(axes, 4.0, 0.75, "learned queries", QUERY, 1.5, 0.42)
    block(axes, 5.55, 1.5, "decoder", QUERY, 0.9, 0.44, strong=True)
    arrow(axes, (1.42, 2.3), (1.78, 2.3), colour=LOSS)
    arrow(axes, (2.72, 2.3), (3.23, 2.3), colour=LOSS)
    arrow(axes, (4.77, 2.2), (5.4, 1.74), colour=QUERY)
    arrow(axes, (4.77, 0.85), (5.4, 1.26), colour=QUERY)
    arrow(axes, (5.7, 1.74), (6.15, 2.2), colour=QUERY)
    arrow(axes, (5.7, 1.26), (6.15, 0.82), colour=QUERY)
    block(axes, 6.35, 2.42, "loss, object known", LOSS, 1.65, 0.4, strong=True)
    block(axes, 6.35, 0.6, "matching, loss", LOSS, 1.4, 0.4, strong=True)
    axes.plot([0.75, 0.75, 6.35], [2.08, 0.16, 0.16], color=LOSS, lw=1.2)
    arrow(axes, (6.35, 0.16), (6.35, 0.39), colour=LOSS)
    axes.text(2.2, 1.86, "in training only", fontsize=8, color=LOSS, ha="center")
    axes.text(2.2, 0.24, "objects to be matched", fontsize=8, color=LOSS, ha="center")
    axes.plot([3.9, 3.9], [1.98, 1.06], color=QUIET, lw=1.2, ls=":")
    axes.text(3.8, 1.5, "the learned ones may\nnot look at the noised", fontsize=8, ha="right",
              va="center", color=QUIET)  # fmt: skip
    axes.set(xlim=(0, 7.3), ylim=(0, 2.8))


def flips(boxes: list[Tensor], asked: Sequence[int], costs: list[Sequence[float]]) -> None:
    """The seven and the boxes of two queries, xyxy in pixels, at two steps; asked: which of the two
    is matched."""
    places = plt.subplots(1, 2, figsize=(7, 3.4))[1]
    for step, (axes, pair, one) in enumerate(zip(places, boxes, asked, strict=True)):
        _picture(axes, window=(15, 112, 45, 128))
        for number, (box, name) in enumerate(zip(pair, "AB", strict=True)):
            colour, wanted = (QUERY, "seven") if number == one else (QUIET, "nothing")
            _box(axes, box, color=colour, lw=2.5)
            x, y = (box[0], box[1] - 2) if number == 0 else (box[2], box[3] - 2)
            side = ("left", "bottom") if number == 0 else ("right", "bottom")
            text = f"{name}: {wanted}, cost {costs[step][number]:.2f}"
            plate = {"facecolor": "white", "alpha": 0.75, "lw": 0, "pad": 1.5}
            axes.text(x, y, text, color=colour, ha=side[0], va=side[1], fontsize=9, weight="bold",
                      bbox=plate)  # fmt: skip
        axes.set_title("at one step" if step == 0 else "at the next")
    plt.show()


def instability(curves: dict[str, dict[int, list[float]]]) -> None:
    """The share of objects that changed their query since the time before: a line for each
    configuration, through the means of its seeds, which are dots. curves: by name, by step."""
    axes = plt.subplots(figsize=(6, 3))[1]
    for (name, curve), colour in zip(curves.items(), (CUT, QUIET, QUERY), strict=False):
        steps = sorted(curve)
        axes.plot(steps, [np.mean(curve[step]) for step in steps], color=colour, label=name)
        for step in steps:
            axes.plot([step] * len(curve[step]), curve[step], "o", color=colour, ms=4, alpha=0.7)
    axes.set(xlabel="training step", ylim=(0, None), ylabel="share with another query")
    if curves:
        axes.legend()
    plt.show()


def _picture(axes: Axes, window: tuple[float, ...] | None = None, pale: float = 0.45) -> None:
    """The running example, nearer to white; window: left, right, top, bottom in pixels."""
    pixels = running_example() * (1 - pale) + 255 * pale
    axes.imshow(pixels.astype(np.uint8), extent=(0, 128, 128, 0))
    left, right, top, bottom = window or (0, 128, 0, 128)
    axes.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[])


def _box(axes: Axes, box: Tensor, **style: object) -> None:
    """A box xyxy in pixels."""
    x, y, right, bottom = (float(value) for value in box)
    axes.add_patch(Rectangle((x, y), right - x, bottom - y, fill=False, **style))


def noised_boxes(true: Tensor, several: dict[str, Tensor]) -> None:
    """The seven and noised copies of its box, xyxy in pixels, one panel for each kind of noise."""
    places = plt.subplots(1, len(several), figsize=(3 * len(several), 3.2))[1]
    for axes, (title, boxes) in zip(places, several.items(), strict=True):
        _picture(axes)
        for box in boxes:
            _box(axes, box, color=QUERY, lw=1, alpha=0.9)
        _box(axes, true, color="black", lw=2.5)
        axes.set_title(title)
    plt.show()


def mask(forbidden: Tensor, groups: int, size: int) -> None:
    """Who may look at whom: rows look at columns; white is allowed."""
    axes = plt.subplots(figsize=(7, 4.3))[1]
    total, each = len(forbidden), size // groups
    for row in range(total):
        for column in range(total):
            if forbidden[row, column]:
                colour = CUT if row >= size else "#bbbbbb"
            else:
                colour = QUERY if column >= size else LOSS
            cell = Rectangle((column, row), 1, 1, facecolor=colour, edgecolor="white", lw=1.5)
            axes.add_patch(cell)
    for edge in [*range(0, size + 1, each), total]:
        axes.plot([0, total], [edge, edge], color="black", lw=1)
        axes.plot([edge, edge], [0, total], color="black", lw=1)
    middles = [each * (g + 0.5) for g in range(groups)] + [(size + total) / 2]
    names = [f"group {g}" for g in range(groups)] + ["learned"]
    axes.set(xlim=(0, total), ylim=(total, 0), aspect="equal")
    axes.set_xticks(middles, names)
    axes.set_yticks(middles, names)
    axes.set(xlabel="is looked at", ylabel="looks")
    axes.tick_params(length=0)
    notes = (
        ("own group: may look", LOSS),
        ("learned queries:\neverybody may look", QUERY),
        ("another group:\nmay not look", "#bbbbbb"),
        ("the answers:\nmay not look", CUT),
    )
    for number, (text, colour) in enumerate(notes):
        y = 0.9 + number * total / 4.4
        axes.add_patch(Rectangle((total + 0.7, y - 0.35), 0.7, 0.7, color=colour, clip_on=False))
        axes.text(total + 1.7, y, text, va="center", fontsize=9)
    plt.show()


def rings() -> None:
    """Where the edges of near and far copies lie, and three far copies."""
    axes = canvas(7, 2.5)
    x, y, half = 1.75, 1.65, 0.7
    for shift, colour, alpha in ((2 * half, CUT, 0.28), (half, VALUE, 0.5)):
        for sign in (-1, 1):
            edge = x + sign * half
            low = edge - shift
            axes.add_patch(Rectangle((low, y - 0.09 + 0.32 * sign), 2 * shift, 0.18, color=colour,
                                     alpha=alpha, lw=0))  # fmt: skip
    for sign, name, side in ((-1, "left edge", "right"), (1, "right edge", "left")):
        at = x + sign * (half + 0.08), y + 0.54 * sign
        axes.text(*at, name, ha=side, va="center", fontsize=8)
        axes.plot([x + sign * half], [y + 0.32 * sign], "o", color="black", ms=5)
    axes.add_patch(Rectangle((x - half, y - half), 2 * half, 2 * half, fill=False, lw=2.2))
    axes.text(x, y - half - 0.2, "the object", ha="center", fontsize=9)
    axes.text(x, 0.35, "green: near, within half a side\npale: far, half to a whole side",
              ha="center", fontsize=8.5)  # fmt: skip
    examples = (
        ("larger", (-1.3, 1.2, -1.25, 1.4)),
        ("beside it", (1.3, 1.5, -1.2, 1.1)),
        ("crossed, sorted", (1.5, -1.6, 1.3, -1.4)),
    )
    for number, (name, (left, right, low, high)) in enumerate(examples):
        cx, small = 4.5 + 1.2 * number + 0.15 * (number > 0), 0.26
        axes.add_patch(Rectangle((cx - small, y - small), 2 * small, 2 * small, fill=False, lw=1.8))
        xs = sorted((cx - small + left * small, cx + small + right * small))
        ys = sorted((y - small + low * small, y + small + high * small))
        axes.add_patch(
            Rectangle((xs[0], ys[0]), xs[1] - xs[0], ys[1] - ys[0], fill=False, ec=CUT, lw=1.8)
        )
        axes.text(cx, 0.62, name, ha="center", fontsize=8.5, color=CUT)
    axes.text(5.7, 2.4, "three far copies: no object", ha="center", fontsize=9, color=CUT)
    axes.set(xlim=(-0.5, 7.5), ylim=(0.2, 2.7))


def pairs(true: Tensor, near: Tensor, far: Tensor) -> None:
    """The seven with near copies of its box and with far ones, xyxy in pixels."""
    places = plt.subplots(1, 2, figsize=(7, 3.6))[1]
    for axes, boxes, title, colour in (
        (places[0], near, "near: find the seven", VALUE),
        (places[1], far, "far: say that there is nothing", CUT),
    ):
        _picture(axes)
        for box in boxes:
            _box(axes, box, color=colour, lw=1.4)
        _box(axes, true, color="black", lw=2.5)
        axes.set_title(title, color=colour)
    plt.show()


def twice() -> None:
    """Three layers: which heads the loss of a layer's boxes reaches, looking once and twice."""
    axes = canvas(7, 3.5)
    xs = (1.3, 3.3, 5.3)
    for number, x in enumerate(xs):
        block(axes, x, 2.95, f"head {number + 1}", QUERY, 0.95, 0.4)
        block(axes, x, 2.0, f"box {number + 1}", QUERY, 0.95, 0.4)
        block(axes, x, 0.85, f"loss {number + 1}", LOSS, 0.95, 0.4, strong=True)
        arrow(axes, (x - 0.1, 2.73), (x - 0.1, 2.22), colour=QUERY)
        arrow(axes, (x, 1.78), (x, 1.07), colour=QUERY)
        arrow(axes, (x + 0.14, 1.07), (x + 0.14, 1.78), colour=LOSS)
        arrow(axes, (x + 0.14, 2.22), (x + 0.14, 2.73), colour=LOSS)
    for number, (x, following) in enumerate(itertools.pairwise(xs)):
        arrow(axes, (x + 0.5, 2.1), (following - 0.5, 2.1), colour=POINT)
        arrow(axes, (following - 0.5, 1.88), (x + 0.5, 1.88), colour=LOSS)
        middle = (x + following) / 2
        axes.text(middle, 1.78, f"loss {number + 2} reaches\nhead {number + 1}", ha="center",
                  va="top", fontsize=8, color=LOSS)  # fmt: skip
        axes.text(middle, 2.2, "start of", ha="center", fontsize=8, color=POINT)
        arrow(axes, (x + 0.3, 2.24), (following - 0.5, 2.95), colour=POINT, dashed=True)
        axes.plot([middle - 0.1, middle + 0.02], [2.5, 2.74], color=CUT, lw=3)
        axes.plot([middle, middle + 0.12], [2.5, 2.74], color=CUT, lw=3)
    axes.text(2.3, 3.12, "where to look: cut", ha="center", fontsize=8, color=CUT)
    axes.text(3.5, 0.35, "no further: loss 3 does not reach head 1", ha="center", fontsize=9,
              color=LOSS)  # fmt: skip
    axes.set(xlim=(0.4, 6.3), ylim=(0.15, 3.4))


def family() -> None:
    """What each detector took from which."""
    axes = canvas(7, 2.9)
    boxes = {
        "DETR\n2020": (0.7, 1.45, QUIET),
        "Deformable DETR\n2021": (2.5, 2.4, VALUE),
        "DAB-DETR\n2022": (2.5, 0.55, QUERY),
        "DN-DETR\n2022": (4.35, 0.55, QUERY),
        "DINO\n2023": (6.3, 1.45, QUERY),
    }
    for name, (x, y, colour) in boxes.items():
        block(axes, x, y, name, colour, 1.5 if "Def" in name else 1.15, 0.58, "DINO" in name)
    arrow(axes, (1.2, 1.75), (1.75, 2.25), colour=QUIET)
    arrow(axes, (1.2, 1.15), (1.9, 0.75), colour=QUIET)
    arrow(axes, (3.1, 0.55), (3.75, 0.55), colour=QUERY)
    arrow(axes, (4.95, 0.7), (5.9, 1.13), colour=QUERY)
    arrow(axes, (3.28, 2.35), (5.72, 1.6), colour=VALUE)
    axes.text(4.75, 2.12, "attention, refinement,\ntwo stages", fontsize=8, color=VALUE)
    axes.text(3.4, 0.68, "boxes as\nqueries", fontsize=8, color=QUERY, ha="center")
    axes.text(5.55, 0.62, "denoising", fontsize=8, color=QUERY)
    axes.set(xlim=(0, 7), ylim=(0.1, 2.8))


def gains(values: dict[str, dict[str, list[float]]], titles: dict[str, str]) -> None:
    """One dot per seed: each configuration's figures, a panel for each metric.

    values: by metric, then by configuration. titles: of the panels, by metric.
    """
    places = plt.subplots(1, len(values), figsize=(9, 2.8), sharey=True)[1]
    for axes, (metric, found) in zip(np.atleast_1d(places), values.items(), strict=True):
        for number, (name, each) in enumerate(found.items()):
            colour = QUERY if name.startswith("D") and "DETR," not in name else QUIET
            axes.plot(each, [number] * len(each), "o", color=colour, alpha=0.8)
            if each:
                axes.plot([np.mean(each)] * 2, [number - 0.3, number + 0.3], color="black", lw=1.5)
        axes.set_yticks(range(len(found)), list(found))
        axes.set(ylim=(len(found) - 0.5, -0.5), title=titles[metric])
    plt.show()
