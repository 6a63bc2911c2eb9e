"""Schematics of the chapter on training at every size."""

from matplotlib.patches import Rectangle

from schematics import CUT, LOSS, POINT, QUERY, QUIET, VALUE, arrow, block, canvas


def shares() -> None:
    """Eight images as one batch, as two batches one after the other, and in two processes."""
    axes = canvas(7.2, 2.5)
    ways = (("one batch", 1), ("two batches, one after the other", 2), ("two processes", 2))
    for index, (title, pieces) in enumerate(ways):
        left = 0.1 + 2.4 * index
        axes.text(left + 1.05, 2.35, title, ha="center", fontsize=9)
        for piece in range(pieces):
            width = (2.25 - 0.15 * pieces) / pieces  # a gap between two batches
            start = left + piece * (width + 0.15)
            for image in range(8 // pieces):
                side = width / (8 // pieces)
                corner = (start + image * side + 0.02, 1.85)
                axes.add_patch(Rectangle(corner, side - 0.04, 0.3, facecolor=VALUE, alpha=0.7))
            block(axes, start + width / 2, 1.2, "gradient", LOSS, width=min(width, 1.0), height=0.4)
            arrow(axes, (start + width / 2, 1.8), (start + width / 2, 1.42))
            arrow(axes, (start + width / 2, 1.0), (left + 1.05, 0.52))
        words = ("", "added: backward adds by itself", "averaged over processes")[index]
        axes.text(
            left + 1.05, 0.72, words, ha="center", fontsize=7.5, color=LOSS, backgroundcolor="w"
        )
        block(axes, left + 1.05, 0.3, "one step", QUERY, height=0.4, strong=True)


def number_formats() -> None:
    """The bits of three formats: sign, exponent (range), fraction (precision)."""
    axes = canvas(7.2, 1.7)
    formats = (("float32", 8, 23), ("bfloat16", 8, 7), ("float16", 5, 10))
    for row, (name, exponent, fraction) in enumerate(formats):
        y, size = 1.25 - 0.5 * row, 0.185
        axes.text(0.95, y + 0.12, name, ha="right", va="center", fontsize=9)
        colours = [QUIET] + [POINT] * exponent + [QUERY] * fraction
        for bit, colour in enumerate(colours):
            axes.add_patch(
                Rectangle((1.1 + bit * size, y), size - 0.03, 0.26, facecolor=colour, alpha=0.8)
            )
    axes.text(1.1 + 5 * 0.185, 1.58, "range", color=POINT, ha="center", fontsize=9)
    axes.text(1.1 + 20 * 0.185, 1.58, "precision", color=QUERY, ha="center", fontsize=9)


def recomputing() -> None:
    """What a stack of four blocks keeps until the backward pass reaches it, in two ways."""
    axes = canvas(7.2, 2.5)
    for index, title in enumerate(("keep all", "keep the inputs, recompute the rest")):
        left = 0.15 + 3.65 * index
        axes.text(left + 1.6, 2.35, title, ha="center", fontsize=9)
        for number in range(4):
            x = left + 0.4 + 0.8 * number
            block(axes, x, 1.2, f"block {number + 1}", QUIET, width=0.7, height=0.4)
            kept = 4 if index == 0 else int(number < 3)  # backward has left the last block
            for layer in range(kept):
                colour = VALUE if layer == 0 else LOSS
                corner = (x - 0.3, 1.48 + 0.17 * layer)
                axes.add_patch(Rectangle(corner, 0.6, 0.13, facecolor=colour, alpha=0.8))
            if number:
                arrow(axes, (x - 0.47, 1.2), (x - 0.33, 1.2))
        text = "four tensors per block are alive at once"
        if index:
            x = left + 0.4 + 0.8 * 2
            for layer in range(1, 4):
                corner = (x - 0.3, 1.48 + 0.17 * layer)
                axes.add_patch(
                    Rectangle(corner, 0.6, 0.13, facecolor="none", edgecolor=LOSS, linestyle=":")
                )
            arrow(axes, (x, 0.95), (x, 0.6), colour=CUT, style="<|-")
            axes.text(
                x, 0.48, "backward is here: run once more", ha="center", fontsize=8, color=CUT
            )
            text = "one per block, and the rest of one block"
        axes.text(left + 1.6, 0.15, text, ha="center", fontsize=8.5)
