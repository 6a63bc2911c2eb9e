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


def verdicts(objects: list[list[float]], found: list[list[float]], overlap: list[float]) -> None:
    """Five detections of one class, best score first, and what becomes of each at an IoU of 0.5.

    objects, found: boxes xyxy in pixels; overlap: of each detection with its nearest object.
    """
    axes = canvas(5.6, 3.3)
    for x0, y0, x1, y1 in objects:
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, facecolor="#dddddd", edgecolor=QUIET))
    words = ("correct", "correct", "duplicate", "nothing there", "correct")
    places = ((9, 6), (49, 16), (9, 54.5), (-0.5, 103.5), (59, 114.5))
    for number, (x0, y0, x1, y1) in enumerate(found):
        colour = VALUE if words[number] == "correct" else CUT
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, lw=2))
        x, y = places[number]
        text = f"{number + 1}: IoU {overlap[number]:.2f}, {words[number]}"
        axes.text(x, y, text, va="center", fontsize=8, color=colour)
    axes.set(xlim=(-4, 124), ylim=(119, 2))
