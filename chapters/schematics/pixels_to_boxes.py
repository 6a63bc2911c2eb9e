"""The schematics and figures of chapter pixels_to_boxes."""

from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from deformable_detr.data.transforms import MEAN, STD
from deformable_detr.structures import Batch
from schematics import (
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

SEVEN = (43, 62, 34, 53)  # the box of the running example: left, top, width, height in pixels
LEVELS = ("#005F45", "#009E73", "#5CC4A4", "#B3E3D3")  # greens, one per level, finest first


def _picture(axes: Axes, x: float, y: float, side: float, boxed: bool = False) -> None:
    """The running example with its lower left corner at (x, y), with the box of its digit or not."""
    axes.imshow(running_example(), extent=(x, x + side, y, y + side), zorder=0)
    if boxed:
        left, top, width, height = (side * number / 128 for number in SEVEN)
        corner = (x + left, y + side - top - height)
        axes.add_patch(Rectangle(corner, width, height, fill=False, ec=QUERY, lw=2))


def _strip(axes: Axes, x: float, y: float, height: float, colours: list[str]) -> None:
    """A sequence of tokens as a column of small squares."""
    size = height / len(colours)
    for place, colour in enumerate(colours):
        corner = (x, y + height - (place + 1) * size)
        axes.add_patch(Rectangle(corner, 0.16, size, fc=colour, ec="white", lw=0.5))


def _tokens(axes: Axes, x: float, y: float, height: float) -> None:
    """The strip of all levels."""
    colours = [LEVELS[level] for level, count in enumerate((9, 5, 3, 2)) for _ in range(count)]
    _strip(axes, x, y, height, colours)


def whole_detector() -> None:
    """From an image to a box, in two rows: to the memory, and from queries to the answer."""
    axes = canvas(7, 3.6)
    _picture(axes, 0.05, 2.3, 1.0)
    axes.text(0.55, 2.12, "3 × H × W", ha="center", fontsize=8)
    arrow(axes, (1.08, 2.8), (1.28, 2.8))
    block(axes, 1.78, 2.8, "backbone", VALUE, 0.9, 0.5)
    arrow(axes, (2.26, 2.8), (2.46, 2.8))
    for level, (rows, columns, y) in enumerate(((5, 6, 2.62), (3, 4, 2.2), (2, 3, 1.92))):
        cells(axes, 2.52, y + 0.22, rows, columns, 0.12, LEVELS[level])
    axes.text(2.88, 3.5, "maps", ha="center", fontsize=8)
    arrow(axes, (3.3, 2.8), (3.56, 2.8))
    _tokens(axes, 3.62, 2.15, 1.3)
    axes.text(3.72, 2.1, "tokens\nS × C", ha="center", va="top", fontsize=8)
    arrow(axes, (3.82, 2.8), (4.2, 2.8))
    block(axes, 4.85, 2.8, "encoder\n6 layers", VALUE, 1.2, 0.7)
    arrow(axes, (5.5, 2.8), (6.0, 2.8))
    _tokens(axes, 6.06, 2.15, 1.3)
    axes.text(6.3, 2.8, "memory\nS × C", va="center", fontsize=8)

    _strip(axes, 1.9, 0.35, 0.9, [QUERY] * 6)
    axes.text(1.98, 0.25, "queries\nQ × C", ha="center", va="top", fontsize=8)
    arrow(axes, (2.12, 0.8), (2.6, 0.8))
    block(axes, 3.25, 0.8, "decoder\n6 layers", QUERY, 1.2, 0.7)
    arrow(axes, (6.14, 2.1), (3.55, 1.2), colour=VALUE, bend=-0.12)
    axes.text(5.42, 1.45, "sampled", fontsize=8, color=VALUE)
    for y, text in ((1.05, "class head"), (0.5, "box head")):
        arrow(axes, (3.9, 0.8), (4.36, y))
        block(axes, 4.85, y, text, QUERY, 0.95, 0.38)
        arrow(axes, (5.35, y), (5.72, 0.85 if y > 1 else 0.7))
    _picture(axes, 5.8, 0.2, 1.0, boxed=True)
    axes.text(6.3, 0.14, "“seven”, and where", ha="center", va="top", fontsize=8)
    axes.set(xlim=(0, 7), ylim=(-0.15, 3.65))


def maps_to_tokens() -> None:
    """Three maps of three widths, four levels of one width, one sequence."""
    axes = canvas(7, 2.9)
    rows = ((4, 5, 2.1), (3, 4, 1.25), (2, 2, 0.65), (1, 1, 0.12))
    names = ("stride 4\n32 channels", "stride 8\n64 channels", "stride 16\n96 channels")
    for level, (height, width, y) in enumerate(rows):
        middle = y + 0.08 * height
        if level < 3:
            cells(axes, 1.1, y, height, width, 0.16, QUIET)
            axes.text(0.98, middle, names[level], ha="right", va="center", fontsize=8)
            start = 1.2 + 0.16 * width
            arrow(axes, (start, middle), (3.55, middle), "1 × 1, group norm" if level == 0 else "")
        else:
            arrow(axes, (1.5, 0.7), (3.55, middle))
            axes.text(1.45, 0.08, "3 × 3, stride 2, group norm", fontsize=8, color=QUIET)
        cells(axes, 3.65, y, height, width, 0.16, LEVELS[level])
        axes.text(4.6, middle, f"level {level}", va="center", fontsize=8)
        arrow(axes, (5.15, middle), (5.85, 2.25 - 0.5 * level), colour=LEVELS[level])
    _tokens(axes, 5.95, 0.25, 2.35)
    axes.text(6.22, 1.42, "one sequence\nof S tokens,\nC channels\neach", va="center", fontsize=8)


def decoder_layer() -> None:
    """Three parts, each with its way around it; who gets the position, and who does not."""
    axes = canvas(7, 3.3)
    centres = (1.72, 3.74, 5.76)
    names = (
        "self-attention\namong queries",
        "cross-attention\nto the memory",
        "feed-forward\neach by itself",
    )
    axes.text(0.02, 1.62, "content\nQ × C", va="center", fontsize=8, color=QUERY)
    arrow(axes, (0.55, 1.62), (1.06, 1.62), colour=QUERY)
    for x, name in zip(centres, names, strict=True):
        block(axes, x, 1.62, name, QUERY, 1.3, 0.66)
        block(axes, x + 0.98, 1.62, "add,\nnorm", QUIET, 0.5, 0.44)
        arrow(axes, (x + 0.66, 1.62), (x + 0.73, 1.62), colour=QUERY)
        arrow(axes, (x - 0.72, 1.62), (x + 0.98, 1.86), colour=QUIET, bend=-0.42)
    for x in centres[:2]:
        arrow(axes, (x + 1.24, 1.62), (x + 1.35, 1.62), colour=QUERY)
    arrow(axes, (6.73, 1.38), (6.73, 0.9), colour=QUERY)
    axes.text(6.7, 0.84, "content,\nupdated", ha="center", va="top", fontsize=8, color=QUERY)
    block(axes, 2.7, 2.98, "position of the query, Q × C", QUERY, 2.2, 0.34)
    arrow(axes, (1.95, 2.79), (1.6, 1.97), colour=QUERY, dashed=True)
    axes.text(1.5, 2.45, "to query and key,\nnot to value", ha="right", fontsize=8, color=QUERY)
    arrow(axes, (3.4, 2.79), (3.65, 1.97), colour=QUERY, dashed=True)
    axes.text(3.8, 2.45, "to the query", fontsize=8, color=QUERY)
    block(axes, 2.95, 0.3, "reference\npoint", POINT, 0.95, 0.48)
    arrow(axes, (3.1, 0.56), (3.5, 1.27), colour=POINT)
    block(axes, 4.3, 0.3, "memory\nS × C", VALUE, 0.95, 0.48)
    arrow(axes, (4.2, 0.56), (3.85, 1.27), colour=VALUE)


def box_on_example(reference: float, delta: float) -> None:
    """A box of the first size over the running example, its centre moved by delta along x."""
    x = 1 / (1 + np.exp(-(np.log(reference / (1 - reference)) + delta)))
    picture, line = canvas(7, 2.6, columns=2)
    picture.axis("on")
    picture.imshow(running_example(), extent=(0, 1, 1, 0))
    picture.add_patch(Rectangle((x - 0.06, 0.63), 0.119, 0.119, fill=False, ec=QUERY, lw=2))
    picture.plot(reference, 0.69, "P", color=POINT, ms=9, mec="white")
    picture.set(xlim=(-0.1, 1.1), ylim=(1, 0), xticks=[0, 0.5, 1], yticks=[], xlabel="x")
    line.axis("on")
    z = np.linspace(-6, 6, 121)
    line.plot(z, 1 / (1 + np.exp(-z)), color=QUIET)
    start = np.log(reference / (1 - reference))
    line.plot(start, reference, "P", color=POINT, ms=9, label="reference")
    line.plot(start + delta, x, "s", color=QUERY, label="centre of the box")
    line.set(xlim=(-6, 6), ylim=(0, 1), aspect="auto", xlabel="before the sigmoid", ylabel="x")
    line.annotate("", (start + delta, 0.03), (start, 0.03), arrowprops={"arrowstyle": "-|>"})
    line.text(start + delta / 2, 0.06, f"delta {delta:+.1f}", ha="center", fontsize=8)
    line.legend(loc="upper left")


def encoder_and_decoder() -> None:
    """Who asks whom: tokens ask tokens, then queries ask tokens."""
    axes = canvas(7, 1.9)
    for x, title, asker in ((0.5, "encoder", VALUE), (4.1, "decoder", QUERY)):
        axes.text(x + 1.1, 1.78, title, ha="center", fontsize=9, color=asker)
        cells(axes, x, 0.2, 5, 7, 0.2, VALUE)
        cells(axes, x + 1.7, 0.4, 2, 3, 0.3, VALUE)
    cells(axes, 1.1, 0.6, 1, 1, 0.2, VALUE, {(0, 0): VALUE})
    axes.plot(4.9, 0.85, "P", color=POINT, ms=8)
    block(axes, 4.9, 1.5, "query", QUERY, 0.6, 0.28)
    arrow(axes, (4.9, 1.36), (4.9, 0.93), colour=QUERY)
    for x, y in ((1.2, 0.7), (4.9, 0.85)):
        ends = ((-0.4, 0.3), (0.35, 0.22), (-0.3, -0.35), (0.45, -0.25), (1.3, 0.0), (1.75, -0.2))
        for dx, dy in ends:
            arrow(axes, (x, y), (x + dx, y + dy), colour=POINT)
    axes.text(0.5, 0.05, "a token asks around its own centre", fontsize=8)
    axes.text(4.1, 0.05, "a query asks around its reference point", fontsize=8)


def show(axes: Axes, batch: Batch, index: int) -> None:
    """One image of a batch in pixel coordinates, its padding in grey."""
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    pixels = (batch.images[index] * deviation + mean).clamp(0, 1).permute(1, 2, 0)
    pixels[batch.mask[index]] = 0.75
    height, width = pixels.shape[:2]
    axes.imshow(pixels.numpy(), extent=(0, width, height, 0))
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[0, 40, 80, 120], yticks=[0, 40, 80])


def draw_boxes(axes: Axes, boxes: Tensor, size: tuple[int, int], **style: object) -> None:
    """Boxes (N, 4) cxcywh, normalised, on an image of size (H, W)."""
    height, width = size
    for cx, cy, w, h in boxes.tolist():
        corner = ((cx - w / 2) * width, (cy - h / 2) * height)
        axes.add_patch(Rectangle(corner, width * w, height * h, fill=False, lw=1.8, **style))


def batch_with_boxes(batch: Batch) -> None:
    """The images of a batch, padding included, with their objects."""
    for index, axes in enumerate(plt.subplots(1, len(batch))[1]):
        show(axes, batch, index)
        target = batch.targets[index]
        draw_boxes(axes, target.boxes, target.original_size, ec=LOSS)
        axes.set_title(f"image {index}: {batch.mask[index].float().mean():.0%} padding")
    plt.show()


def masks_of_levels(masks: list[Tensor]) -> None:
    """The mask of one image on every level, (H_l, W_l) each."""
    widths = [3, 2.4, 1.8, 1.2]
    every = plt.subplots(1, len(masks), figsize=(7, 2.2), width_ratios=widths)[1]
    for level, (axes, mask) in enumerate(zip(every, masks, strict=True)):
        axes.pcolormesh(~mask.numpy(), cmap="cividis", vmin=0, vmax=1, ec="white", lw=0.6)
        axes.set(aspect="equal", ylim=(len(mask), 0), xticks=[], yticks=[])
        axes.set_title(f"level {level}\n{mask.shape[0]} × {mask.shape[1]}")
    plt.show()


def where_tokens_look(
    batch: Batch,
    shapes: list[tuple[int, int]],
    references: Tensor,
    reference: Tensor,
    locations: Tensor,
) -> None:
    """The reference points (S, L, 2) of image 1; of one token of image 0 its own, (L, 2), and its
    sampling locations, (M, L, K, 2)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 3.9))
    height, width = batch.images.shape[2:]
    size = torch.tensor([width, height])
    for level, part in enumerate(references.split([h * w for h, w in shapes])):
        points, name = part[:, level] * size, f"level {level}"
        left.plot(*points.T, "o", ms=1 + 2 * level, c=f"C{level}", label=name)
        points = locations[:, level].flatten(0, 1) * size
        right.plot(*points.T, "o", ms=4, mec="white", mew=0.5, c=f"C{level}")
    right.plot(*(reference[0] * size), "P", c="C6", ms=9, mec="white")
    show(left, batch, 1)
    show(right, batch, 0)
    right.set(xlim=(-30, width + 30), ylim=(height + 30, -30))
    left.set_title("image 1: the reference points of all tokens")
    right.set_title("image 0: where one token looks")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    plt.show()


def reference_points(batch: Batch, references: Tensor) -> None:
    """The reference points (B, Q, 2) of the queries, with their numbers, on each image."""
    for index, axes in enumerate(plt.subplots(1, len(batch))[1]):
        show(axes, batch, index)
        points = references[index] * batch.sizes[index].flip(0)
        axes.plot(*points.T, "o", c=QUERY, ms=9, mec="white", mew=0.6)
        for q, (x, y) in enumerate(points.tolist()):
            axes.text(x, y, q, color="white", size=6, ha="center", va="center")
        axes.set_title(f"image {index}: {len(points)} reference points")
    plt.show()


def inside_or_outside(inverse_sigmoid: Callable[[Tensor], Tensor]) -> None:
    """A centre against delta, added before the sigmoid and beside it."""
    delta = torch.linspace(-6, 6, 121)
    left, right = plt.subplots(1, 2, sharey=True)[1]
    for index, start in enumerate((0.05, 0.3, 0.8)):
        inside = (delta + inverse_sigmoid(torch.tensor(start))).sigmoid()
        for axes, centre in ((left, inside), (right, start + delta.sigmoid() - 0.5)):
            axes.plot(delta, centre, label=f"reference {start}")
            axes.plot(0, start, "o", c=f"C{index}")
    for axes in (left, right):
        axes.axhspan(1, 1.3, color="0.9")
        axes.axhspan(-0.45, 0, color="0.9")
        axes.set(xlabel="delta", ylim=(-0.45, 1.3))
    left.set(ylabel="centre of the box", title="σ(delta + σ⁻¹(reference))")
    right.set(title="reference + σ(delta) − ½")
    left.legend()
    plt.show()
