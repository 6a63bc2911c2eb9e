"""Schematics of the chapter on training."""

from matplotlib.patches import Rectangle
from schematics import CUT, LOSS, POINT, QUERY, QUIET, VALUE, arrow, block, canvas


def splits() -> None:
    """Three splits and what each may do."""
    axes = canvas(7, 1.5)
    parts = (
        ("train\n8,000 images", VALUE, 3.0, "weights learn from it"),
        ("val\n500", POINT, 1.5, "you choose with it"),
        ("test\n1,000", LOSS, 1.5, "you report it, once"),
    )
    left = 0.2
    for name, colour, width, text in parts:
        block(axes, left + width / 2, 0.95, name, colour, width=width, height=0.7, strong=True)
        axes.text(left + width / 2, 0.4, text, ha="center", fontsize=8.5, color=colour)
        left += width + 0.2
    axes.text(
        3.5,
        0.05,
        "no digit and no piece of a photograph is in two of them",
        ha="center",
        fontsize=8.5,
    )


def loop() -> None:
    """The training loop: what goes round."""
    axes = canvas(7.2, 1.9)
    parts = (
        ("images,\ntargets", VALUE),
        ("model", QUERY),
        ("matching,\nlosses", LOSS),
        ("backward,\nclip", LOSS),
        ("AdamW\nstep", QUERY),
    )
    for index, (name, colour) in enumerate(parts):
        x = 0.8 + 1.4 * index
        block(axes, x, 1.3, name, colour, width=1.1, height=0.6, strong=True)
        if index:
            arrow(axes, (x - 0.83, 1.3), (x - 0.57, 1.3))
    arrow(axes, (6.4, 0.98), (6.4, 0.55), style="-")
    arrow(axes, (6.4, 0.55), (0.8, 0.55), style="-")
    arrow(axes, (0.8, 0.55), (0.8, 0.98))
    axes.text(
        3.6,
        0.62,
        "new weights, the next batch; the schedule sets the rate",
        ha="center",
        fontsize=8.5,
    )
    axes.text(
        3.6,
        0.2,
        "after each epoch: evaluate on val, keep the best weights",
        ha="center",
        fontsize=8.5,
        color=POINT,
    )


def verdicts() -> None:
    """Five detections of one class, best score first, and what becomes of each."""
    axes = canvas(7, 2.3)
    objects = [(0.3, 0.9, 0.7, 1.0), (2.2, 1.2, 1.2, 0.6), (4.6, 0.7, 1.2, 1.2)]
    for x, y, width, height in objects:
        axes.add_patch(Rectangle((x, y), width, height, facecolor="#dddddd", edgecolor=QUIET))
    boxes = [
        (0.34, 0.86, 0.68, 1.02, "1 correct", VALUE, 0),
        (2.2, 1.2, 0.85, 0.6, "2 correct", VALUE, 0),
        (0.2, 0.8, 0.5, 1.2, "3 duplicate", CUT, 1.42),
        (3.5, 0.25, 0.8, 0.55, "4 nothing there", CUT, 0),
        (4.6, 0.62, 1.25, 1.0, "5 correct", VALUE, 0),
    ]
    for x, y, width, height, text, colour, shift in boxes:
        axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=colour, lw=2))
        axes.text(
            x + width / 2, y - 0.08 + shift, text, ha="center", va="top", fontsize=8, color=colour
        )
    axes.set_ylim(-0.2, 2.3)
