"""The schematics and figures of chapter matching_and_loss."""

import itertools
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from deformable_detr.losses.matcher import HungarianMatcher
from deformable_detr.structures import Detections, Predictions, Target
from schematics import CUT, LOSS, QUERY, QUIET, VALUE, arrow, block, canvas

SAMPLES = Path(__file__).resolve().parents[2] / "data" / "samples"
OBJECTS = (
    (46, 34, 34, 45),
    (50, 4, 25, 33),
    (76, 79, 25, 35),
    (9, 83, 16, 30),
)  # of 000001.png, in pixels
GUESSES = ((42, 42, 34, 45), (54, 9, 25, 30), (98, 30, 25, 30), (81, 68, 25, 35), (13, 94, 24, 26))
Pairs = list[tuple[int, int]]


def _relative(boxes: tuple[tuple[int, ...], ...]) -> Tensor:
    """Left, top, width, height in pixels to cxcywh, parts of the image."""
    x, y, w, h = torch.tensor(boxes, dtype=torch.float32).T / 128
    return torch.stack([x + w / 2, y + h / 2, w, h], -1)


def matching() -> None:
    """Objects and queries on a picture, the costs of all pairs, and what each query is taught."""
    target = Target(1, torch.zeros(4, dtype=torch.long), _relative(OBJECTS), (128, 128))
    said = Predictions(torch.zeros(1, 5, 1), _relative(GUESSES)[None])
    cost = HungarianMatcher().cost(said.logits[0], said.boxes[0], target)
    [(queries, objects)] = HungarianMatcher()(said, [target])
    chosen = dict(zip(queries.tolist(), objects.tolist(), strict=True))
    axes = canvas(7, 2.75)
    side = 2.3
    picture = Image.open(SAMPLES / "000001.png")
    axes.imshow(picture, extent=(0.05, 0.05 + side, 0.1, 0.1 + side), zorder=0)
    for boxes, name, colour, style in ((OBJECTS, "o", LOSS, "--"), (GUESSES, "q", QUERY, "-")):
        for number, box in enumerate(boxes):
            x, y, w, h = (side * value / 128 for value in box)
            corner = (0.05 + x, 0.1 + side - y - h)
            axes.add_patch(Rectangle(corner, w, h, fill=False, ec=colour, lw=2, ls=style))
            place = (corner[0] + (0 if name == "q" else w), corner[1] + (h if name == "q" else 0))
            label = {"fc": colour, "ec": "none", "pad": 1}
            axes.text(*place, f"{name}{number}", size=7, color="white", bbox=label, ha="center")
    for row, column in itertools.product(range(5), range(4)):
        x, y = 2.98 + 0.45 * column, 1.98 - 0.38 * row
        shade = LOSS if chosen.get(row) == column else "white"
        axes.add_patch(Rectangle((x - 0.22, y - 0.19), 0.45, 0.38, fc=shade, ec=QUIET, alpha=0.6))
        axes.text(x, y, f"{cost[row, column]:.1f}", ha="center", va="center", fontsize=9)
    for column in range(4):
        axes.text(2.98 + 0.45 * column, 2.23, f"o{column}", ha="center", color=LOSS, fontsize=9)
    for row in range(5):
        y = 1.98 - 0.38 * row
        axes.text(2.68, y, f"q{row}", ha="right", va="center", color=QUERY, fontsize=9)
        arrow(axes, (4.65, y), (4.95, y), colour=LOSS if row in chosen else QUIET)
        text = f"class and box of o{chosen[row]}" if row in chosen else "no, to every class"
        axes.text(5.02, y, text, va="center", fontsize=8)
    for x, text in ((1.2, "predictions, objects"), (3.65, "cost"), (5.7, "what it is taught")):
        axes.text(x, 2.5, text, ha="center", fontsize=9, color=QUIET)


def every_layer() -> None:
    """Each decoder layer answers, is matched by itself, and has its own loss."""
    axes = canvas(7, 2.7)
    block(axes, 0.6, 2.2, "queries", QUERY, 0.9, 0.4)
    block(axes, 0.6, 0.75, "objects", LOSS, 0.9, 0.4, strong=True)
    for number, x in enumerate((1.9, 3.4, 4.9)):
        arrow(axes, (x - (0.84 if number == 0 else 0.96), 2.2), (x - 0.56, 2.2), colour=QUERY)
        block(axes, x, 2.2, f"layer {number + 1}", QUERY, 1.1, 0.4)
        arrow(axes, (x, 1.98), (x, 1.72), colour=QUERY)
        block(axes, x, 1.5, "classes, boxes", QUERY, 1.2, 0.38)
        arrow(axes, (x, 1.29), (x, 0.98), colour=QUERY)
        block(axes, x, 0.75, "match", LOSS, 0.9, 0.4)
        arrow(axes, (x, 0.53), (x, 0.28), colour=LOSS)
        axes.text(x, 0.14, f"loss {number + 1}", ha="center", va="center", fontsize=9, color=LOSS)
        arrow(axes, (x - 0.3, 1.13), (x - 0.3, 0.96), colour=LOSS)
    axes.plot((0.6, 0.6, 4.6), (0.96, 1.13, 1.13), "--", color=LOSS, lw=1.5, zorder=0)
    for x in (2.65, 4.15):
        axes.text(x, 0.14, "+", ha="center", va="center", fontsize=11, color=LOSS)
    arrow(axes, (5.25, 0.14), (5.6, 0.14), colour=LOSS)
    axes.text(5.66, 0.14, "trained on", va="center", fontsize=9, color=LOSS)
    axes.text(5.8, 1.5, "the last layer’s\nare what is\nreported", va="center", fontsize=8)


def focal_and_cross_entropy(focal: Callable[..., Tensor]) -> None:
    """Both losses against p, where the answer should be no and where it should be yes."""
    p = torch.linspace(0.002, 0.998, 400)
    no, yes = plt.subplots(1, 2, sharey=True)[1]
    for axes, wanted, title in (
        (no, torch.zeros_like(p), "wanted: no"),
        (yes, torch.ones_like(p), "wanted: yes"),
    ):
        axes.semilogy(p, F.binary_cross_entropy(p, wanted, reduction="none"), "--", c=QUIET)
        axes.semilogy(p, focal(p.logit(), wanted, alpha=0.25, gamma=2), c=LOSS)
        axes.axvline(0.01, c="black", lw=1, ls=":")
        axes.set(title=title, xlabel="p", ylim=(1e-8, 10))
    no.set_ylabel("loss")
    no.text(0.03, 3e-8, "p = 0.01 before training", size=9)
    yes.legend(["cross entropy", "focal"], loc="lower center")
    plt.show()


def overlap_and_distance(
    cases: list[tuple[float, ...]], iou: Callable[..., float], giou: Callable[..., float]
) -> None:
    """Four pairs of boxes with their hull, and both measures against the shift of one box."""
    fixed = (0.0, 0.0, 3.0, 2.0)
    places = plt.subplot_mosaic("abcd;eeee", figsize=(7, 4), height_ratios=[1, 1.6])[1]
    for axes, moved in zip((places[k] for k in "abcd"), cases, strict=True):
        for box, colour in ((fixed, LOSS), (moved, QUERY)):
            size = box[2] - box[0], box[3] - box[1]
            axes.add_patch(Rectangle(box[:2], *size, fc=colour, alpha=0.6))
        hull = max(fixed[2], moved[2]), max(fixed[3], moved[3])
        axes.add_patch(Rectangle((0, 0), *hull, fill=False, ec="black", ls="--", lw=1))
        axes.set_title(f"IoU {iou(fixed, moved):.2f}\nGIoU {giou(fixed, moved):.2f}")
        axes.set(xlim=(-0.3, 12.3), ylim=(3, -0.3), aspect="equal", xticks=[], yticks=[])
    for x, name in ((1.5, "object"), (10, "prediction")):
        places["d"].text(x, 2.55, name, ha="center", va="center", size=7)
    shifts = np.linspace(0, 10, 101)
    for measure, style, name in ((iou, "-", "IoU"), (giou, "--", "GIoU")):
        values = [measure(fixed, (shift, 0.0, shift + 3, 2.0)) for shift in shifts]
        places["e"].plot(shifts, values, style, label=name)
    places["e"].axvline(3, c="0.6", lw=1)
    places["e"].set(xlabel="shift of a 3 × 2 box to the right", ylim=(-0.7, 1.05))
    places["e"].legend()
    plt.show()


def greedy_and_best(
    object_x: list[float], query_x: list[float], cost: Tensor, greedy: Pairs, best: Pairs
) -> None:
    """Two assignments of queries to objects that lie on a line, and in the matrix of costs."""
    line, matrix = plt.subplots(1, 2, width_ratios=[2, 1])[1]
    line.plot(object_x, [1] * len(object_x), "s", c=LOSS, ms=9)
    line.plot(query_x, [0] * len(query_x), "o", c=QUERY, ms=9)
    matrix.imshow(cost.numpy(), aspect="auto", cmap="Greys", vmin=-1, vmax=12)
    for pairs, name, colour, style, inset in (
        (greedy, "greedy", CUT, "--", 0.46),
        (best, "least total", VALUE, "-", 0.38),
    ):
        for number, (q, n) in enumerate(pairs):
            label = None if number else name
            line.plot([query_x[q], object_x[n]], [0, 1], style, c=colour, label=label)
            corner = (n - inset, q - inset)
            size = 2 * inset
            matrix.add_patch(Rectangle(corner, size, size, fill=False, ec=colour, ls=style, lw=2))
    for q, n in itertools.product(*map(range, cost.shape)):
        matrix.text(n, q, f"{cost[q, n]:.2f}", ha="center", va="center")
    for places, y in ((object_x, 1.14), (query_x, -0.26)):
        for number, x in enumerate(places):
            line.text(x, y, number, ha="center")
    line.set(yticks=[0, 1], yticklabels=["queries", "objects"], xlabel="x", ylim=(-0.4, 1.4))
    line.legend(loc="upper left")
    matrix.set(xticks=[0, 1], yticks=[0, 1, 2], xlabel="object", ylabel="query", title="cost")
    plt.show()


def falling_losses(history: list[dict[str, float]]) -> None:
    """The three terms of the last layer's loss over the steps."""
    axes = plt.subplots(figsize=(6, 2.8))[1]
    for name, label in (("class", "class"), ("box", "L1"), ("giou", "GIoU")):
        axes.plot([losses[f"loss_{name}"] for losses in history], label=label)
    axes.set(xlabel="step", ylabel="loss of the last layer", ylim=(0, None))
    axes.legend()
    plt.show()


def found_and_wanted(
    picture: Callable[[Axes, int], None],
    found: list[Detections],
    targets: list[Target],
    names: list[str],
) -> None:
    """Detections (blue) over the objects (dashed). picture: draws image i on axes."""
    for index, axes in enumerate(plt.subplots(1, len(found))[1]):
        picture(axes, index)
        height, width = targets[index].original_size
        each = found[index]
        for box, score, label in zip(each.boxes.tolist(), each.scores, each.labels, strict=True):
            left, top, right, bottom = box
            size = (right - left, bottom - top)
            axes.add_patch(Rectangle((left, top), *size, fill=False, ec=QUERY, lw=3))
            text_box = {"fc": QUERY, "ec": "none", "pad": 1}
            text = f"{names[label]} {score:.1f}"
            axes.text(left, top, text, color="white", size=8, va="bottom", bbox=text_box)
        for cx, cy, w, h in targets[index].boxes.tolist():
            corner, size = ((cx - w / 2) * width, (cy - h / 2) * height), (w * width, h * height)
            axes.add_patch(Rectangle(corner, *size, fill=False, ec=LOSS, ls="--", lw=1.8))
        axes.set(xticks=[], yticks=[])
    plt.show()
