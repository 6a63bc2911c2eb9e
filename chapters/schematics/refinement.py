"""The schematics and figures of chapter refinement."""

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
    cells,
    running_example,
)

LEVEL_COLOURS = (QUERY, POINT, VALUE)  # finest first


def plain_and_refined() -> None:
    """Where the boxes of each layer start: always from one point, or from the last box."""
    axes = canvas(7, 3.5)
    xs = (1.75, 3.5, 5.25)
    for top, name in ((2.85, "plain"), (1.1, "refined")):
        axes.text(0.02, top + 0.52, name, fontsize=9, color=QUIET)
        block(axes, 0.5, top - 0.55, "reference", POINT, 0.9, 0.36)
        block(axes, 0.5, top + 0.2, "query", QUERY, 0.9, 0.36)
        for number, x in enumerate(xs):
            block(axes, x, top + 0.2, f"layer {number + 1}", QUERY, 0.9, 0.36)
            arrow(
                axes, (xs[number - 1] + 0.47 if number else 0.97, top + 0.2), (x - 0.47, top + 0.2)
            )
            arrow(axes, (x + 0.2, top), (x + 0.55, top - 0.36), colour=QUERY)
            axes.text(x + 0.46, top - 0.14, f"Δ{number + 1}", fontsize=8, color=QUERY)
            block(axes, x + 0.7, top - 0.55, f"box {number + 1}", QUERY, 0.66, 0.36)
    y = 2.3
    for number, x in enumerate(xs):
        level = y - 0.3 - 0.07 * number
        axes.plot([0.5, 0.5], [y - 0.18, level], color=POINT, lw=1.4)
        axes.plot([0.5, x + 0.7], [level, level], color=POINT, lw=1.4)
        arrow(axes, (x + 0.7, level), (x + 0.7, y - 0.17), colour=POINT)
        arrow(axes, (x - 0.2, level), (x - 0.2, y + 0.56), colour=POINT)
    y = 0.55
    starts = (0.97, xs[0] + 1.05, xs[1] + 1.05)
    for start, x in zip(starts, xs, strict=True):
        arrow(axes, (start, y), (x + 0.37, y), colour=POINT)
        arrow(axes, (x - 0.2, y), (x - 0.2, y + 0.56), colour=POINT)
    axes.text(6.35, 2.05, "all around\none point", fontsize=8, color=POINT, va="center")
    axes.text(6.35, 0.55, "each from the\nlast box", fontsize=8, color=POINT, va="center")
    axes.set(xlim=(0, 7.2), ylim=(0.1, 3.6))


def gradient_cut() -> None:
    """The way back of layer 2's loss: through the content, but not through the reference."""
    axes = canvas(7, 3.1)
    for number, x in enumerate((1.6, 4.6)):
        block(axes, x, 2.6, f"layer {number + 1}", QUERY, 1.1, 0.44)
        block(axes, x, 1.75, f"head {number + 1}", QUERY, 1.0, 0.4)
        block(axes, x, 0.85, f"box {number + 1}", QUERY, 1.0, 0.4)
        block(axes, x + 1.15, 0.85, f"loss {number + 1}", LOSS, 0.9, 0.4, strong=True)
        arrow(axes, (x, 2.36), (x, 1.97), colour=QUERY)
        arrow(axes, (x, 1.53), (x, 1.07), colour=QUERY)
        axes.text(x + 0.08, 1.27, f"Δ{number + 1}", fontsize=8, color=QUERY)
        arrow(axes, (x + 0.67, 0.75), (x + 0.53, 0.75), colour=LOSS)
        arrow(axes, (x - 0.2, 1.07), (x - 0.2, 1.53), colour=LOSS)
        arrow(axes, (x - 0.2, 1.97), (x - 0.2, 2.36), colour=LOSS)
    arrow(axes, (0.5, 2.6), (1.03, 2.6), colour=QUERY)
    arrow(axes, (2.17, 2.66), (4.03, 2.66), "content", colour=QUERY)
    arrow(axes, (4.03, 2.5), (2.17, 2.5), colour=LOSS)
    axes.text(3.1, 2.32, "gradient flows back", ha="center", fontsize=8, color=LOSS, va="top")
    axes.plot([1.6, 1.6, 3.5, 3.5], [0.63, 0.3, 0.3, 0.85], color=POINT, lw=1.4)
    arrow(axes, (3.5, 0.85), (4.08, 0.92), colour=POINT)
    arrow(axes, (3.5, 1.0), (4.1, 2.4), colour=POINT)
    axes.plot([3.5, 3.5], [0.85, 1.0], color=POINT, lw=1.4)
    axes.text(2.75, 0.12, "reference of layer 2", fontsize=8, color=POINT, va="center", ha="right")
    axes.plot([2.85, 3.05], [0.14, 0.46], color=CUT, lw=3)
    axes.plot([2.95, 3.15], [0.14, 0.46], color=CUT, lw=3)
    axes.text(3.25, 0.12, "detach: no gradient", fontsize=9, color=CUT, va="center")


def first_stage() -> None:
    """From the memory to references and queries, with the first stage's own loss."""
    axes = canvas(7, 3.7)
    cells(axes, 0.1, 2.35, 4, 4, 0.2, VALUE)
    cells(axes, 0.3, 1.75, 2, 2, 0.2, VALUE)
    axes.text(0.5, 3.24, "memory\nS × C", ha="center", fontsize=8)
    arrow(axes, (0.98, 2.55), (1.24, 2.55), colour=VALUE)
    block(axes, 1.8, 2.55, "linear,\nnorm", VALUE, 1.0, 0.5)
    block(axes, 1.8, 1.45, "anchors\nS × 4", POINT, 1.0, 0.5)
    for y, name in ((2.95, "class head"), (2.15, "box head")):
        arrow(axes, (2.33, 2.55), (2.62, y), colour=VALUE)
        block(axes, 3.12, y, name, QUERY, 0.95, 0.4)
    arrow(axes, (3.62, 2.95), (3.95, 2.95), colour=QUERY)
    axes.text(4.0, 2.95, "S scores", va="center", fontsize=9, color=QUERY)
    arrow(axes, (3.62, 2.15), (3.95, 2.15), colour=QUERY)
    axes.text(3.72, 2.25, "Δ", fontsize=9, color=QUERY)
    arrow(axes, (2.33, 1.45), (3.95, 2.05), colour=POINT)
    axes.text(4.0, 2.15, "S boxes", va="center", fontsize=9, color=QUERY)
    arrow(axes, (4.66, 2.95), (5.35, 2.8), colour=LOSS)
    arrow(axes, (4.62, 2.15), (5.35, 2.6), colour=LOSS)
    block(axes, 6.1, 2.7, "its own matching\nand loss", LOSS, 1.45, 0.52, strong=True)
    arrow(axes, (4.3, 1.98), (4.3, 1.58), colour=QUERY, style="-")
    axes.text(4.4, 1.72, "the Q of best score", fontsize=8, color=QUERY, va="center")
    axes.plot([4.1, 4.5], [1.52, 1.6], color=CUT, lw=3)
    axes.plot([4.1, 4.5], [1.42, 1.5], color=CUT, lw=3)
    axes.text(3.98, 1.5, "detach", ha="right", va="center", fontsize=9, color=CUT)
    arrow(axes, (4.3, 1.4), (4.3, 1.1), colour=POINT)
    block(axes, 4.3, 0.85, "references\nQ × 4", POINT, 1.0, 0.48)
    arrow(axes, (3.77, 0.85), (3.4, 0.85), colour=POINT)
    block(axes, 2.75, 0.85, "sine code,\nlinear, norm", QUERY, 1.25, 0.48)
    arrow(axes, (2.1, 0.85), (1.75, 0.85), colour=QUERY)
    axes.text(1.7, 0.85, "queries:\nposition, content", ha="right", va="center", fontsize=8)
    block(axes, 4.3, 0.15, "decoder", QUERY, 1.0, 0.34, strong=True)
    arrow(axes, (4.3, 0.6), (4.3, 0.34), colour=POINT)
    axes.plot([1.2, 1.2], [0.66, 0.15], color=QUERY, lw=1.4)
    arrow(axes, (1.2, 0.15), (3.77, 0.15), colour=QUERY)
    axes.set(ylim=(-0.1, 3.7))


def _picture(axes: Axes, picture: np.ndarray, alpha: float = 1.0) -> None:
    """A picture in its own pixels, without ticks."""
    height, width = np.asarray(picture).shape[:2]
    axes.imshow(picture, extent=(0, width, height, 0), alpha=alpha)
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])


def _box(axes: Axes, box: Sequence[float], **style: object) -> None:
    """A box xyxy in pixels."""
    x, y, right, bottom = (float(value) for value in box)
    axes.add_patch(Rectangle((x, y), right - x, bottom - y, fill=False, **style))


def anchors_of_three(shapes: list[tuple[int, int]], size: float) -> None:
    """The running example with the token centres of each level and the anchor of one of them."""
    for level, axes in enumerate(plt.subplots(1, len(shapes), figsize=(7, 2.6))[1]):
        _picture(axes, running_example())
        height, width = shapes[level]
        x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
        axes.plot(128 * x.ravel(), 128 * y.ravel(), ".", color=LEVEL_COLOURS[level], ms=2 + level)
        column, row = int(0.47 * width), int(0.69 * height)
        centre = 128 * np.array([(column + 0.5) / width, (row + 0.5) / height])
        half = 64 * size * 2**level
        _box(axes, (*(centre - half), *(centre + half)), color="white", lw=2)
        axes.plot(*centre, "P", color="white", ms=7)
        axes.set_title(f"level {level}: {2 * half:.0f} pixels")
    plt.show()


def steps_of_one(
    picture: np.ndarray, true: Tensor, steps: Tensor, overlaps: Sequence[float]
) -> None:
    """A close-up of one object, once per step: its true box, and the box of one query, xyxy."""
    low = np.minimum(true[:2], steps[:, :2].amin(0)) - 6
    high = np.maximum(true[2:], steps[:, 2:].amax(0)) + 6
    places = plt.subplots(1, len(steps), figsize=(9, 2.8))[1]
    for step, (axes, found, overlap) in enumerate(zip(places, steps, overlaps, strict=True)):
        _picture(axes, picture)
        _box(axes, true, color="white", ls="--", lw=2)
        _box(axes, found, color=QUERY, lw=2)
        axes.set(xlim=(low[0], high[0]), ylim=(high[1], low[1]))
        axes.set_title(f"{f'layer {step}' if step else 'proposal'}: {overlap:.2f}")
    plt.show()


def proposals_and_scores(
    picture: np.ndarray, boxes: Tensor, levels: Tensor, scores: list[Tensor]
) -> None:
    """Proposed boxes, xyxy in pixels, in their level's colour; the scores of each level, (H, W)."""
    places = plt.subplots(1, 1 + len(scores), figsize=(9, 2.5))[1]
    _picture(places[0], picture, alpha=0.6)
    for box, level in zip(boxes, levels.tolist(), strict=True):
        _box(places[0], box, color=LEVEL_COLOURS[level], lw=1.5)
    places[0].set_title("best thirty proposals")
    for level, (axes, score) in enumerate(zip(places[1:], scores, strict=True)):
        axes.imshow(score, vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.set_title(f"scores of level {level}", color=LEVEL_COLOURS[level])
    plt.show()


def gains(runs: list[dict]) -> None:
    """AP of each seed, and the GIoU loss of the last layer over the steps, one line per seed."""
    left, right = plt.subplots(1, 2)[1]
    variants = list(dict.fromkeys(run["variant"] for run in runs))
    for index, variant in enumerate(variants):
        mine = [run for run in runs if run["variant"] == variant]
        left.plot([index] * len(mine), [run["val"]["ap"] for run in mine], "o", color=f"C{index}")
        for number, run in enumerate(mine):
            steps, losses = zip(*run["last_layer_giou"], strict=True)
            label = None if number else variant
            right.plot(steps, losses, color=f"C{index}", lw=1.2, label=label)
    names = ["plain", "refined", "two stages"]
    left.set(xticks=range(len(variants)), xticklabels=names, ylabel="AP on val", xlim=(-0.4, 2.4))
    right.set(xlabel="step", ylabel="GIoU loss of the last layer")
    right.legend()
    plt.show()


def cut_and_open(study: dict) -> None:
    """Gradient norm and GIoU losses with the cut and without, one line per seed."""
    places = plt.subplots(1, 3, figsize=(9, 2.8))[1]
    titles = ("gradient norm", "GIoU loss, layer 1", f"GIoU loss, layer {study['layers']}")
    names = ("gradient_norm", "loss_giou_0", "loss_giou")
    every = study["steps_per_point"]
    for axes, title, name in zip(places, titles, names, strict=True):
        for variant, colour, style in (("cut", QUERY, "-"), ("open", CUT, "--")):
            mine = [run for run in study["runs"] if run["variant"] == variant]
            for number, run in enumerate(mine):
                curve = run["curves"][name]
                steps = every * (0.5 + np.arange(len(curve)))
                label = None if number else variant
                axes.plot(steps, curve, style, color=colour, lw=1.2, label=label)
        axes.set(title=title, xlabel="step")
    places[0].set_ylim(bottom=0)
    places[0].legend()
    plt.show()
