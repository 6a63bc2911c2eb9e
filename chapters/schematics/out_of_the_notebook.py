"""Schematics of the chapter on export and deployment."""

from schematics import CUT, LOSS, POINT, QUERY, QUIET, VALUE, arrow, block, canvas

STATIONS = (
    ("picture", QUIET),
    ("turn, resize,\nscale to 0..1", POINT),
    ("normalise,\nmask padding", POINT),
    ("network", QUERY),
    ("scores, top k,\npixel boxes", LOSS),
    ("threshold,\nnames", LOSS),
)
FORMS = (  # what a form holds: from which station to which, and what follows
    ("weights (state_dict)", 3, 3),
    ("ONNX file", 2, 4),
    ("our file, or a detector in Python", 1, 5),
)


def travels() -> None:
    """The stations from a picture to names, and which of them travel in which form."""
    axes = canvas(7.6, 2.3)
    for index, (name, colour) in enumerate(STATIONS):
        x = 0.65 + 1.25 * index
        block(axes, x, 1.85, name, colour, width=1.12, height=0.6, strong=colour == QUERY)
        if index:
            arrow(axes, (x - 0.7, 1.85), (x - 0.57, 1.85))
    for row, (name, first, last) in enumerate(FORMS):
        y = 1.25 - 0.4 * row
        left, right = 0.15 + 1.25 * first, 1.15 + 1.25 * last
        axes.plot([left, right], [y, y], color=VALUE, lw=5, solid_capstyle="butt")
        axes.text((left + right) / 2, y - 0.09, name, ha="center", va="top", fontsize=8.5)
    axes.text(0.1, 0.85, "what travels\nby itself", fontsize=8.5, color=QUIET, va="center")


def frozen() -> None:
    """The same line of code by a trace, where the size is a number, and by torch.export, where it
    is a name."""
    axes = canvas(7.6, 2.5)
    rows = (
        (
            1.95,
            "torch.jit.trace\nnotes the number",
            "offset / 12",
            CUT,
            "at width 9:\nwrong, no error",
        ),
        (
            0.65,
            "torch.export notes\nwhere it is from",
            "offset / width",
            VALUE,
            "at width 9:\nright",
        ),
    )
    line = "offsets /\ntorch.tensor([W, H])\nrun once with W = 12"
    block(axes, 0.95, 1.3, line, QUERY, width=1.7, height=0.9)
    for y, how, noted, colour, later in rows:
        arrow(axes, (1.8, 1.3), (2.45, y))
        block(axes, 3.2, y, how, QUIET, width=1.45, height=0.65)
        arrow(axes, (3.97, y), (4.35, y))
        block(axes, 5.05, y, noted, colour, width=1.35, height=0.5, strong=True)
        arrow(axes, (5.77, y), (6.1, y))
        axes.text(6.2, y, later, fontsize=9, va="center", color=colour)
