"""Figures of "Questions readers ask"."""

import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

from schematics import CUT, LOSS, POINT, QUERY, QUIET, VALUE, arrow, block, canvas


def where_to_look_first() -> None:
    """A training that does not work: three questions, and what each answer points at."""
    axes = canvas(7.4, 2.9)
    asked = ("is the loss\nfinite?", "does it fall on\none batch?", "classes right?\nboxes right?")
    found = (
        "NaN in the data,\nfloat16, or too high\na learning rate",
        "learning rate,\nfrozen parts, or\na missing gradient",
        "ids of classes;\nformat of boxes",
        "more images,\nlonger training,\npretrained\nweights",
    )
    for index, text in enumerate(asked):
        x = 1.0 + 1.95 * index
        block(axes, x, 2.3, text, QUERY, 1.5, 0.7)
        block(axes, x, 0.75, found[index], CUT, 1.8, 0.8)
        arrow(axes, (x, 1.93), (x, 1.2), colour=CUT)
        axes.text(x + 0.08, 1.55, "no", color=CUT, fontsize=9, va="center")
        right = x + 1.95 - 0.75 if index < 2 else 6.2
        arrow(axes, (x + 0.75, 2.3), (right, 2.3), colour=VALUE)
        axes.text((x + 0.75 + right) / 2, 2.38, "yes", color=VALUE, fontsize=9, ha="center")
    block(axes, 6.65, 2.3, "sound", VALUE, 0.9, 0.6, strong=True)
    block(axes, 6.65, 0.75, found[3], QUIET, 1.35, 1.0)
    arrow(axes, (6.65, 1.98), (6.65, 1.3))


def four_trainings(logs: dict[str, dict]) -> None:
    """Losses of several trainings, and what their matched queries say at the end."""
    _, (left, right) = plt.subplots(1, 2, figsize=(7, 2.9))
    colours = (VALUE, LOSS, POINT, CUT)
    for (name, log), colour in zip(logs.items(), colours, strict=True):
        left.plot(log["loss"], color=colour, label=name)
        right.plot(log["class_error"], log["iou"], "o", color=colour, markersize=9)
        side, gap = ("left", 5) if log["class_error"] < 50 else ("right", -5)
        right.text(log["class_error"] + gap, log["iou"], name, ha=side, va="center", fontsize=8)
    left.set(xlabel="step", ylabel="loss", ylim=(0, 40))
    right.set(xlabel="class error of matched queries in %", ylabel="IoU of matched boxes")
    right.set(xlim=(-8, 108), ylim=(-0.06, 1.06))
    right.axhline(0.5, color=QUIET, linewidth=0.8, linestyle=":")
    right.axvline(50, color=QUIET, linewidth=0.8, linestyle=":")
    left.legend(fontsize=8)
    plt.show()


def padded_batch(sizes: list[tuple[int, int]], ratios: list[list[float]]) -> None:
    """Images in the frame that they are padded to, with their valid ratios."""
    height, width = (max(side) for side in zip(*sizes, strict=True))
    _, axes = plt.subplots(1, len(sizes), figsize=(5.5, 2.4))
    for axis, (h, w), (x, y) in zip(axes, sizes, ratios, strict=True):
        axis.add_patch(Rectangle((0, 0), width, height, facecolor="0.85", edgecolor=QUIET))
        axis.add_patch(Rectangle((0, 0), w, h, facecolor=VALUE, alpha=0.6))
        axis.plot(w / 2, h / 2, "+", color="black", markersize=12)
        title = f"(0.5, 0.5) of the image\nis ({0.5 * x:.3g}, {0.5 * y:.3g}) of the batch"
        axis.set(xlim=(-2, width + 2), ylim=(height + 2, -2), aspect="equal")
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    plt.show()
