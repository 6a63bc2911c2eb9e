"""Schematics of the chapter on one's own data."""

from matplotlib.patches import Rectangle

from schematics import CUT, LOSS, POINT, QUERY, QUIET, VALUE, arrow, block, canvas

STATIONS = (
    ("pictures,\nboxes", VALUE, ""),
    ("convert", QUIET, "COCO's format"),
    ("check,\nsheet", CUT, "faults, eyes"),
    ("tile", QUIET, "small objects"),
    ("doctor", CUT, "can it learn?"),
    ("train", QUERY, "from weights"),
    ("evaluate", LOSS, "on test, once"),
    ("predict,\nexplain", POINT, ""),
)


def path() -> None:
    """The way from a folder of pictures to a detector, one command per station."""
    axes = canvas(7.6, 1.4)
    for index, (name, colour, text) in enumerate(STATIONS):
        x = 0.5 + 0.94 * index
        block(axes, x, 0.9, name, colour, width=0.88, height=0.56)
        axes.text(x, 0.45, text, ha="center", fontsize=7.5, color=QUIET)
        if index:
            arrow(axes, (x - 0.51, 0.9), (x - 0.42, 0.9))


def shrinking(side: int, crown: int, short_side: int, tile: int) -> None:
    """A crown in a whole picture and in a tile, as the detector gets them."""
    axes = canvas(7, 2.5)
    axes.add_patch(Rectangle((0.2, 0.3), 1.9, 1.9, facecolor="#e8e8e8", edgecolor=QUIET))
    size = 1.9 * crown / side
    axes.add_patch(Rectangle((1.2, 1.1), size, size, facecolor=VALUE, edgecolor="none"))
    part = 1.9 * tile / side
    corner = (1.2 - part / 3, 1.1 - part / 3)
    axes.add_patch(Rectangle(corner, part, part, fill=False, edgecolor=POINT, lw=1.4))
    axes.text(1.15, 0.1, f"{side} pixels; orange: a tile of {tile}", ha="center", fontsize=8.5)
    for x, scale, name, colour in (
        (3.1, short_side / side, f"part of the picture, resized to {short_side}", CUT),
        (5.3, 1.0, "part of the tile, at full size", VALUE),
    ):
        pixels = crown * scale
        edge = POINT if colour == VALUE else QUIET
        axes.add_patch(Rectangle((x, 0.45), 1.5, 1.5, facecolor="#f4f4f4", edgecolor=edge, lw=1.4))
        cell = 1.5 / 48  # the window shows 48 pixels
        shown = pixels * cell
        middle = (x + 0.75 - shown / 2, 1.2 - shown / 2)
        axes.add_patch(Rectangle(middle, shown, shown, facecolor=colour, edgecolor="none"))
        for stride in (8, 16):
            for step in range(0, 48, stride):
                style = {"color": QUIET, "lw": 0.4 if stride == 8 else 0.9, "alpha": 0.6}
                axes.plot([x + step * cell] * 2, [0.45, 1.95], **style)
                axes.plot([x, x + 1.5], [0.45 + step * cell] * 2, **style)
        axes.text(x + 0.75, 2.08, name, ha="center", fontsize=8.5)
        axes.text(
            x + 0.75,
            0.2,
            f"the crown is {pixels:.0f} pixels wide",
            ha="center",
            fontsize=8.5,
            color=colour,
        )
    arrow(axes, (2.2, 1.3), (3.0, 1.3))
