"""The schematics and figures of chapter detr."""

import itertools
from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
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

COLOURS = {"DETR": CUT, "one map": QUERY}


def the_whole() -> None:
    """DETR from image to losses, with what Deformable DETR changes."""
    axes = canvas(9, 3.5)
    middle = 2.3
    block(axes, 0.55, middle, "image", VALUE, 0.8, 0.5)
    block(axes, 1.65, middle, "backbone", VALUE, 1.0, 0.5)
    cells(axes, 2.5, middle - 0.3, 4, 4, 0.15, VALUE)
    axes.text(2.8, middle + 0.4, "one map,\nstride 32", ha="center", va="bottom", fontsize=8)
    block(axes, 4.1, middle, "encoder × 6\ndense", VALUE, 1.25, 0.6, strong=True)
    block(axes, 6.1, middle, "decoder × 6\ndense", QUERY, 1.25, 0.6, strong=True)
    block(axes, 7.75, middle + 0.45, "class head", QUERY, 1.05, 0.42)
    block(axes, 7.75, middle - 0.45, "box head", QUERY, 1.05, 0.42)
    for start, end, text in (
        (0.95, 1.13, ""),
        (2.15, 2.45, ""),
        (3.15, 3.46, ""),
        (4.74, 5.46, "S × 256"),
    ):
        arrow(axes, (start, middle), (end, middle), text, VALUE)
    for side in (0.45, -0.45):
        arrow(axes, (6.73, middle + side / 4), (7.21, middle + side), colour=QUERY)
        block(axes, 8.65, middle + side, "loss", LOSS, 0.5, 0.38, strong=True)
        arrow(axes, (8.28, middle + side), (8.39, middle + side), colour=LOSS)
    axes.text(7.75, middle + 0.7, "100 × 92", ha="center", fontsize=8, color=QUERY)
    axes.text(7.75, middle - 0.82, "100 × 4, sigmoid", ha="center", fontsize=8, color=QUERY)
    block(axes, 6.1, 0.95, "100 learned\nqueries", QUERY, 1.25, 0.55)
    arrow(axes, (6.1, 1.23), (6.1, middle - 0.31), colour=QUERY)
    block(axes, 4.1, 0.95, "place codes", QUIET, 1.1, 0.45)
    arrow(axes, (4.1, 1.18), (4.1, middle - 0.31))
    arrow(axes, (4.66, 1.1), (5.5, middle - 0.28))
    for x, y, text in (
        (2.8, 1.55, "several maps"),
        (5.1, 3.1, "a few samples instead of all tokens"),
        (6.1, 0.35, "with a reference point each"),
        (8.0, 0.95, "sigmoid per class,\nbox from reference"),
    ):
        axes.text(x, y, text, ha="center", va="center", fontsize=8.5, color=CUT)
    for x in (4.1, 6.1):
        arrow(axes, (5.1, 3.0), (x, middle + 0.33), colour=CUT, style="-")


def one_query_of_each(weights: Tensor, points: Tensor, place: Tensor) -> None:
    """Where one query looks: weights (H, W) of dense attention; of deformable attention, points
    (K, 2) and the query's place (2,)."""
    left, right = plt.subplots(1, 2, figsize=(6.4, 3.2))[1]
    side = running_example().shape[0]
    extent = (0, side, side, 0)
    for axes in (left, right):
        axes.imshow(running_example(), extent=extent, alpha=0.45)
        axes.set(xlim=(0, side), ylim=(side, 0), xticks=[], yticks=[])
    tint = np.zeros((*weights.shape, 4))
    tint[..., :3] = [int(POINT[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    tint[..., 3] = 0.75 * (weights / weights.max()).numpy()
    left.imshow(tint, extent=extent)
    for line in range(1, weights.shape[0]):
        left.axhline(line * side / weights.shape[0], color="white", lw=0.7)
        left.axvline(line * side / weights.shape[1], color="white", lw=0.7)
    x, y = (points * side).unbind(-1)
    right.scatter(x, y, s=70, color=POINT, edgecolors="black", zorder=3)
    right.plot(*(place * side).tolist(), "P", color=QUERY, ms=11, mec="white", zorder=4)
    left.set_title(f"DETR: {weights.min():.3f} to {weights.max():.3f} per cell")
    right.set_title(f"one map: {len(points)} samples of {1 / len(points):.2f}")
    plt.show()


def at_the_start(rows: list[dict]) -> None:
    """Effective keys and the gradient's tokens before training, by the number of tokens."""
    places = plt.subplots(1, 2, figsize=(7, 3.2))[1]
    titles = {
        "decoder_effective_keys": "effective keys in the decoder",
        "encoder_gradient_tokens": "tokens that the gradient reaches",
    }
    for axes, (metric, title) in zip(places, titles.items(), strict=True):
        for name, colour in (("dense", CUT), ("deformable, one map", QUERY)):
            mine = [row for row in rows if row["configuration"] == name]
            tokens = {row["at"]: row["value"] for row in mine if row["metric"] == "tokens"}
            found = [row for row in mine if row["metric"] == metric]
            x, y = [tokens[row["at"]] for row in found], [row["value"] for row in found]
            axes.loglog(x, y, "o", color=colour, mfc="none", label=name)
        ends = np.array([64, 1024])
        axes.loglog(ends, ends, "--", color=QUIET, lw=1, label="all tokens")
        axes.set(xlabel="tokens", title=title, xticks=[64, 256, 1024], ylim=(2, 2000))
        axes.set_xticklabels(["64", "256", "1,024"])
        axes.minorticks_off()
    handles, labels = places[0].get_legend_handles_labels()
    places[0].figure.legend(handles, labels, loc="outside upper center", ncols=3)
    plt.show()


def all_boxes(boxes: dict[str, Tensor]) -> None:
    """All boxes, (Q, 4) cxcywh, of several detectors on the running example."""
    side = running_example().shape[0]
    places = plt.subplots(1, len(boxes), figsize=(6.4, 3.2))[1]
    for axes, (name, found) in zip(places, boxes.items(), strict=True):
        axes.imshow(running_example(), extent=(0, side, side, 0), alpha=0.6)
        for cx, cy, w, h in (found * side).tolist():
            corner = (cx - w / 2, cy - h / 2)
            axes.add_patch(Rectangle(corner, w, h, fill=False, ec=COLOURS[name], lw=1.2))
        axes.set(xlim=(0, side), ylim=(side, 0), xticks=[], yticks=[])
        axes.set_title(f"{name}: {len(found)} boxes")
    plt.show()


def a_match_that_moves() -> None:
    """Costs of four queries for two objects at two moments; one match moves."""
    axes = canvas(7, 2.6)
    for left, title, costs, chosen in (
        (0.9, "at one moment", ((6.0, 6.2), (4.2, 6.1), (4.3, 5.8), (5.9, 3.1)), {1: 0, 3: 1}),
        (4.3, "a few steps later", ((6.0, 6.1), (4.3, 6.0), (4.2, 5.7), (5.9, 3.0)), {2: 0, 3: 1}),
    ):
        axes.text(left + 0.75, 2.4, title, ha="center", fontsize=9)
        for column, name in enumerate("AB"):
            text = f"object {name}"
            axes.text(left + 0.38 + 0.76 * column, 2.08, text, ha="center", fontsize=8, color=LOSS)
        for row, values in enumerate(costs):
            y = 1.5 - 0.44 * row
            label = f"query {row + 1}"
            axes.text(left - 0.1, y + 0.21, label, ha="right", va="center", fontsize=8, color=QUERY)
            for column, cost in enumerate(values):
                mine = chosen.get(row) == column
                shade = (CUT if column == 0 else LOSS) if mine else "white"
                corner = (left + 0.76 * column, y)
                axes.add_patch(Rectangle(corner, 0.76, 0.42, facecolor=shade, edgecolor=QUIET))
                ink = "white" if mine else "black"
                x, height = left + 0.38 + 0.76 * column, y + 0.21
                axes.text(x, height, f"{cost:.1f}", ha="center", va="center", fontsize=9, color=ink)
    arrow(axes, (2.6, 1.3), (3.5, 1.3), "small change", QUIET)
    axes.text(6.05, 1.3, "1 of 2\nobjects has\nchanged", va="center", fontsize=9, color=CUT)


def the_first_steps(live: dict[str, list[tuple]], moved: Callable[..., float]) -> None:
    """Spread of centres, distance of matched boxes and changed matches over the first steps."""
    places = plt.subplots(1, 3, figsize=(9, 2.9))[1]
    titles = ("spread of centres", "distance of matched boxes", "objects with another query")
    for name, seen in live.items():
        steps, spread, far, matches = zip(*seen, strict=True)
        pairs = itertools.pairwise(matches)
        shares = [moved(before, now) for before, now in pairs]
        curves = ((steps, spread), (steps, far), (steps[1:], shares))
        for axes, (x, y) in zip(places, curves, strict=True):
            axes.plot(x, y, "o-", color=COLOURS[name], label=name)
    for axes, title in zip(places, titles, strict=True):
        axes.set(title=title, xlabel="step", xlim=(-0.05 * steps[-1], 1.05 * steps[-1]))
        axes.set_ylim(bottom=0)
    places[2].set_ylim(0, 1)
    places[1].legend(loc="upper right")
    plt.show()


def the_task() -> None:
    """A query on a map, and the cell whose number it must say."""
    axes = canvas(5, 2.7)
    side, size, left, low = 6, 0.4, 0.3, 0.15
    cells(axes, left, low, side, side, size, VALUE)

    def centre(column: int, row: int) -> tuple[float, float]:
        return left + (column + 0.5) * size, low + (side - row - 0.5) * size

    start, end = centre(1, 2), centre(3, 3)
    axes.plot(*start, "P", color=QUERY, ms=12)
    axes.plot(*end, "o", mfc="none", mec=POINT, mew=3, ms=14)
    arrow(axes, (start[0] + 0.12, start[1] - 0.06), (end[0] - 0.2, end[1] + 0.1), dashed=True)
    axes.text(3.0, 1.75, "the query stands here", color=QUERY, fontsize=9, va="center")
    axes.text(3.0, 1.3, "and must say the number here", color=POINT, fontsize=9, va="center")
    axes.text(3.0, 0.85, "every cell holds a number", color=VALUE, fontsize=9, va="center")


def steps_and_cells(needed: dict[tuple[bool, int], list[int]], most: int) -> None:
    """Steps that each learner needed, by the number of cells."""
    axes = plt.subplots(figsize=(5.5, 3.2))[1]
    for dense, name, colour, shift in (
        (True, "dense", CUT, 0.97),
        (False, "deformable", QUERY, 1.03),
    ):
        for (kind, side), found in needed.items():
            if kind == dense:
                x = np.full(len(found), shift * side * side)
                axes.loglog(x, found, "o", color=colour, mfc="none", mew=1.6)
        axes.plot([], [], "o", color=colour, mfc="none", mew=1.6, label=name)
    axes.axhline(most, color=QUIET, ls="--", lw=1)
    axes.text(23, most * 1.1, "gave up", fontsize=8, color=QUIET, va="bottom")
    numbers = sorted({side * side for _, side in needed})
    axes.set(xlabel="cells of the map", ylabel="steps", xticks=numbers, ylim=(8, 6000))
    axes.set_xlim(13, 80)
    axes.set_xticklabels([str(number) for number in numbers])
    axes.minorticks_off()
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    plt.show()
