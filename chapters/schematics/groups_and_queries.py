"""The schematics and figures of chapter groups_and_queries."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle
from torch import Tensor

from deformable_detr.evaluation.intervals import interval
from schematics import LOSS, POINT, QUERY, QUIET, VALUE, arrow, block, canvas, running_example


def one_of_thirty(boxes: Tensor, matched: int) -> None:
    """The running example with all boxes of a detector, xyxy in pixels, and the one matched."""
    left, right = plt.subplots(1, 2, figsize=(7, 3), width_ratios=(1, 1.25))[1]
    left.imshow(running_example() // 2 + 128)
    for index, box in enumerate(boxes.tolist()):
        style = {"ec": LOSS, "lw": 3, "zorder": 3} if index == matched else {"ec": QUIET, "lw": 0.7}
        corner, size = box[:2], (box[2] - box[0], box[3] - box[1])
        left.add_patch(Rectangle(corner, *size, fill=False, **style))
    left.set(xlim=(0, 128), ylim=(128, 0), xticks=[], yticks=[], title="the boxes of 30 queries")
    right.set(xlim=(-0.6, 10), ylim=(-0.8, 3.2), aspect="equal", title="what each is told")
    right.axis("off")
    for index in range(len(boxes)):
        x, y = index % 10, 2 - index // 10
        colour = LOSS if index == matched else QUIET
        right.add_patch(
            plt.Circle((x, y), 0.36, fc=colour if index == matched else "white", ec=colour)
        )
    words = (("class seven, and this box", LOSS, 0), ("nothing is here", QUIET, 6.2))
    for text, colour, x in words:
        right.text(x - 0.4, -0.75, text, color=colour, fontsize=9, va="center")
    plt.show()


def groups() -> None:
    """Three groups of queries through one decoder, each matched with the same two objects."""
    axes = canvas(7, 3.3)
    axes.text(0.1, 3.1, "queries, in training", fontsize=9, color=QUIET)
    chosen = ((1, 3), (0, 4), (3, 2))
    for group, found in enumerate(chosen):
        y = 2.65 - 0.85 * group
        for index in range(5):
            axes.add_patch(plt.Circle((0.35 + 0.3 * index, y), 0.11, fc="white", ec=QUERY, lw=1.4))
        axes.add_patch(Rectangle((0.15, y - 0.24), 1.6, 0.48, fill=False, ec=QUERY, ls=":", lw=1.2))
        axes.text(0.95, y - 0.38, f"group {group}", fontsize=8, color=QUERY, ha="center")
        arrow(axes, (1.8, y), (2.2, y), colour=QUERY)
        arrow(axes, (3.5, y), (3.9, y), colour=QUERY)
        for index in range(5):
            hit = index in found
            centre = (4.1 + 0.3 * index, y)
            face = LOSS if hit else "white"
            axes.add_patch(plt.Circle(centre, 0.11, fc=face, ec=LOSS if hit else QUIET, lw=1.4))
            if hit:
                target = (6.6, 2.25 - 0.95 * found.index(index))
                line = (centre[0], target[0] - 0.2), (y, target[1])
                axes.plot(*line, color=LOSS, lw=0.8, alpha=0.7, zorder=0)
    block(axes, 2.85, 1.8, "one decoder:\nall weights\nshared", QUERY, 1.3, 2.2, strong=True)
    for number, name in enumerate(("seven", "three")):
        block(axes, 6.6, 2.25 - 0.95 * number, name, LOSS, 0.72, 0.42, strong=True)
    axes.text(4.0, 3.1, "predictions, each group matched by itself", fontsize=9, color=QUIET)
    axes.add_patch(Rectangle((0.05, 2.2), 1.8, 0.78, fill=False, ec=VALUE, lw=1.6))
    axes.text(0.1, 0.2, "after training only group 0 is left", fontsize=9, color=VALUE)
    axes.set(ylim=(0, 3.3))


def mask_and_folding(mask: Tensor, groups: int) -> None:
    """The mask of self-attention between groups, and the same as a batch that is larger."""
    left, right = plt.subplots(1, 2, figsize=(7, 2.9), width_ratios=(1, 1.5))[1]
    total = len(mask)
    size = total // groups
    left.imshow(mask, cmap="Greys", vmin=0, vmax=2.2)
    for group in range(groups):
        start = group * size - 0.5
        left.add_patch(Rectangle((start, start), size, size, fill=False, ec=QUERY, lw=2))
    ticks = [size * g + (size - 1) / 2 for g in range(groups)]
    names = [f"group {g}" for g in range(groups)]
    left.set_xticks(ticks, names)
    left.set_yticks(ticks, names, rotation=90, va="center")
    left.set(xlabel="is looked at", ylabel="looks", title="grey: forbidden")
    left.tick_params(length=0)
    right.set(xlim=(0, 4.2), ylim=(0, 2.9), aspect="equal", title="the same without a mask")
    right.axis("off")
    for group in range(groups):
        for x, y in ((0.2 + 0.42 * group, 1.35), (2.9, 1.85 - 0.5 * group)):
            right.add_patch(Rectangle((x, y), 0.42, 0.3, fc="white", ec=QUERY, lw=1.5))
            right.text(x + 0.21, y + 0.15, f"g{group}", ha="center", va="center", fontsize=8)
    right.text(0.83, 1.02, "one sequence\n(B, K·N, C)", ha="center", va="top", fontsize=8)
    right.text(3.11, 0.62, "K sequences\n(B·K, N, C)", ha="center", va="top", fontsize=8)
    arrow(right, (1.6, 1.5), (2.75, 1.5), "reshape", QUERY)
    plt.show()


def cost_of_groups(counts: dict[int, dict[str, float]], seconds: dict[int, float]) -> None:
    """Multiply-adds of a training step's forward pass by part, and its seconds, per groups."""
    left, right = plt.subplots(1, 2, figsize=(7, 2.8), width_ratios=(1.5, 1))[1]
    below = np.zeros(len(counts))
    colours = {"backbone": QUIET, "encoder": VALUE, "decoder": QUERY}
    for name, colour in colours.items():
        values = np.array([parts[name] for parts in counts.values()])
        left.barh(range(len(counts)), values, left=below, color=colour, label=name)
        below += values
    left.set_yticks(range(len(counts)), [f"K = {k}" for k in counts])
    left.set(xlabel="G multiply-adds per picture, forward", ylim=(-0.6, len(counts) + 0.4))
    left.legend(ncols=3, loc="upper center", handlelength=1)
    right.plot(list(seconds), list(seconds.values()), "o-", color=QUERY)
    high = 1.1 * max(seconds.values())
    right.set(xlabel="groups K", ylabel="seconds per step", ylim=(0, high))
    right.set_xticks(list(seconds))
    plt.show()


def three_ways() -> None:
    """What a query is made of: learned, from a box, or from a token and its box."""
    axes = canvas(7, 2.5)
    columns = (
        ("learned queries", ("a learned row", "a learned row", "from that row"), (QUERY,) * 3),
        ("two stages", ("code of its box", "code of its box", "a token's box"), (POINT,) * 3),
        (
            "Efficient DETR",
            ("the token itself", "code of its box", "a token's box"),
            (VALUE, POINT, POINT),
        ),
    )
    for number, name in enumerate(("content", "position", "reference")):
        axes.text(0.78, 1.62 - 0.6 * number, name, ha="right", va="center", fontsize=9, color=QUIET)
    for column, (title, texts, colours) in enumerate(columns):
        x = 1.75 + 2.05 * column
        axes.text(x, 2.2, title, ha="center", fontsize=10)
        for number, (text, colour) in enumerate(zip(texts, colours, strict=True)):
            strong = colour == VALUE
            block(axes, x, 1.62 - 0.6 * number, text, colour, 1.75, 0.46, strong=strong)
    axes.text(3.8, 0.0, "same for every picture", fontsize=8, color=QUERY, ha="right")
    axes.text(4.0, 0.0, "where the token's box is", fontsize=8, color=POINT)
    axes.text(5.6, 0.0, "what the token saw", fontsize=8, color=VALUE)
    axes.set(ylim=(-0.15, 2.45))


def efficient() -> None:
    """Efficient DETR from tokens to boxes, with one head in two places."""
    axes = canvas(7, 2.75)
    block(axes, 0.75, 1.9, "encoder\n3 layers", VALUE, 1.1, 0.62)
    arrow(axes, (1.32, 1.9), (1.72, 1.9), colour=VALUE)
    block(axes, 2.3, 1.9, "head", QUERY, 1.0, 0.5, strong=True)
    axes.text(2.42, 2.3, "dense part: all tokens", fontsize=8, color=QUIET)
    arrow(axes, (2.82, 1.9), (3.2, 1.9), colour=QUERY)
    block(axes, 3.75, 1.9, "choose by\nbest class", POINT, 1.02, 0.56)
    arrow(axes, (4.28, 1.9), (4.66, 1.9), colour=POINT)
    block(axes, 5.2, 1.9, "decoder\n1 layer", QUERY, 1.02, 0.62)
    arrow(axes, (5.73, 1.9), (6.0, 1.9), colour=QUERY)
    block(axes, 6.45, 1.9, "head", QUERY, 0.86, 0.5, strong=True)
    axes.text(6.33, 2.3, "sparse part: 100 queries", ha="right", fontsize=8, color=QUIET)
    for x in (2.3, 6.45):
        arrow(axes, (x, 1.64), (x, 1.26), colour=LOSS)
        block(axes, x, 1.0, "matching,\nloss", LOSS, 1.0, 0.5, strong=True)
    axes.plot([2.3, 2.3, 6.45, 6.45], [2.16, 2.5, 2.5, 2.16], color=QUERY, lw=1.4, ls=":")
    axes.text(4.38, 2.56, "one head, trained by both losses", ha="center", fontsize=8, color=QUERY)
    arrow(axes, (0.75, 1.58), (0.75, 0.16), colour=VALUE, style="-")
    arrow(axes, (0.75, 0.16), (5.2, 0.16), colour=VALUE, style="-")
    arrow(axes, (5.2, 0.16), (5.2, 0.36), colour=VALUE, style="-")
    arrow(axes, (5.2, 0.36), (5.2, 1.58), colour=VALUE)
    axes.text(
        2.9,
        0.21,
        "memory: read by the decoder, rows of it are the queries",
        ha="center",
        fontsize=8,
        color=VALUE,
    )
    axes.set(ylim=(0, 2.75))


def seeds_and_costs(found: dict[str, tuple[Sequence[float], float]], unit: str) -> None:
    """AP of each seed as a dot, its mean's interval as a bar, over what each detector costs.

    Detectors of nearly equal cost are drawn side by side.
    """
    axes = plt.subplots(figsize=(7, 2.9))[1]
    costs = [cost for _, cost in found.values()]
    near = 0.04 * (max(costs) - min(costs))
    for index, (name, (values, cost)) in enumerate(found.items()):
        cost += near * sum(abs(cost - other) < near for other in costs[:index])
        axes.plot([cost] * len(values), values, "o", color=f"C{index}", ms=4, alpha=0.6, label=name)
        if len(values) > 1:
            mean = interval(values)
            axes.plot([cost, cost], [mean.low, mean.high], color=f"C{index}", lw=2)
            axes.plot(cost, mean.mean, "_", color=f"C{index}", ms=16, mew=2)
    axes.set(xlabel=unit, ylabel="AP on test")
    axes.margins(0.15)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    plt.show()
