"""Schematics of the chapter on published weights."""

from schematics import CUT, POINT, QUERY, QUIET, VALUE, arrow, block, canvas


def three_dialects() -> None:
    """A table of names stands between each format and the model."""
    axes = canvas(7.2, 2.3)
    files = (("official\n.pth", 1.95), ("Hugging Face\nfolder", 1.15), ("ours\n.safetensors", 0.35))
    for name, y in files:
        block(axes, 0.9, y, name, VALUE, width=1.4, height=0.62)
        block(axes, 3.2, y, "table of names", POINT, width=1.5, height=0.5, strong=True)
        arrow(axes, (1.62, y), (2.42, y), style="<|-|>")
        arrow(axes, (3.97, y), (5.1, 1.15 + (y - 1.15) * 0.35), style="<|-|>")
    block(
        axes, 5.9, 1.15, "the model:\nnames and shapes", QUERY, width=1.6, height=0.8, strong=True
    )
    axes.text(
        5.9,
        0.35,
        "missing, left over,\nother shape: an error",
        ha="center",
        color=CUT,
        fontsize=8.5,
    )


def parting() -> None:
    """Two models side by side; a hook after every layer compares their outputs."""
    axes = canvas(7.2, 2.0)
    for row, (name, y) in enumerate((("ours", 1.5), ("theirs", 0.5))):
        axes.text(0.35, y, name, ha="center", va="center", fontsize=9)
        for layer in range(5):
            wrong = row == 1 and layer == 1
            colour = CUT if wrong else QUIET
            x = 1.4 + 1.25 * layer
            title = f"{'encoder' if layer < 3 else 'decoder'} {layer if layer < 3 else layer - 3}"
            block(axes, x, y, title, colour, width=0.95, height=0.42, strong=wrong)
            arrow(axes, (x - 0.75, y), (x - 0.5, y))
    for layer in range(5):
        x = 1.95 + 1.25 * layer
        same = layer < 1
        arrow(axes, (x, 1.3), (x, 0.7), colour=VALUE if same else CUT, style="<|-|>")
        axes.text(
            x + 0.06,
            1.0,
            "=" if same else "≠",
            fontsize=11,
            color=VALUE if same else CUT,
            va="center",
        )
    axes.set_xlim(0, 7.4)
