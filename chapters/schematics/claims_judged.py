"""Figures of "The claims, judged"."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle
from PIL import Image

from schematics import CUT, LOSS, POINT, QUERY, QUIET, VALUE, arrow, block, canvas

SHORT = {
    "P": "paper",
    "S": "its slides",
    "B": "article",
    "N": "news",
    "D": "DAT",
    "R": "Sparse DETR",
}
SHADES = {
    "true": VALUE,
    "true, with a condition": POINT,
    "false": CUT,
    "not confirmed here": LOSS,
    "not testable here": QUIET,
}


def how_a_claim_is_judged() -> None:
    """From a sentence to a verdict, and where studies come in."""
    axes = canvas(7, 2.3)
    block(axes, 0.85, 1.75, "sentence,\nword for word", QUIET, 1.5, 0.7)
    block(axes, 2.85, 1.75, "what would\nmake it false?", QUERY, 1.6, 0.7)
    block(axes, 4.75, 1.75, "evidence,\ncomputed", POINT, 1.4, 0.7)
    block(axes, 6.3, 1.75, "verdict", LOSS, 1.2, 0.7, strong=True)
    for left, right in ((1.6, 2.05), (3.65, 4.05), (5.45, 5.7)):
        arrow(axes, (left, 1.75), (right, 1.75))
    sources = (
        "a formula\nor a count",
        "a module\nthat runs",
        "a study\nof this book",
        "a published\ntable",
    )
    for index, text in enumerate(sources):
        x = 1.5 + 1.5 * index
        block(axes, x, 0.45, text, VALUE, 1.35, 0.66)
        arrow(axes, (x, 0.8), (4.75 + 0.12 * (index - 1.5), 1.38))


def verdicts(counts: dict[str, dict[str, int]]) -> None:
    """How many claims of each source got which verdict: {source: {verdict: number}}."""
    _, axes = plt.subplots(figsize=(7, 3.1))
    names = list(counts)[::-1]
    left = np.zeros(len(names))
    for verdict, colour in SHADES.items():
        width = np.array([counts[name].get(verdict, 0) for name in names])
        axes.barh(range(len(names)), width, left=left, color=colour, label=verdict, height=0.65)
        for y, (start, number) in enumerate(zip(left, width, strict=True)):
            if number:
                axes.text(
                    start + number / 2, y, str(number), ha="center", va="center", color="white"
                )
        left += width
    axes.set_yticks(range(len(names)), [f"{name}: {SHORT[name]}" for name in names])
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("claims")
    axes.legend(loc="lower right", fontsize=8)
    plt.show()


def decoders(tokens: list[int], counted: list[float], late: float) -> None:
    """Multiply-adds of a decoder's cross-attention against the pixels of the map."""
    _, axes = plt.subplots(figsize=(5.2, 2.9))
    axes.loglog(tokens, counted, "o-", color=CUT, label="as in the code: all pixels projected")
    axes.axhline(late, color=VALUE, label="as in the claim: samples projected")
    axes.set(xlabel="pixels of the map", ylabel="multiply-adds")
    axes.legend(fontsize=8)
    plt.show()


def three_views(picture: Image.Image, kinds: dict[str, np.ndarray], true: np.ndarray) -> None:
    """A picture with true boxes (white, dashed) and one box for each, of three kinds (blue)."""
    _, axes = plt.subplots(1, len(kinds), figsize=(7, 2.6))
    picture = np.asarray(picture)
    for axis, (name, boxes) in zip(axes, kinds.items(), strict=True):
        axis.imshow(picture, alpha=0.75)
        for shown, style in (
            (true, {"edgecolor": "white", "linestyle": "--"}),
            (boxes, {"edgecolor": QUERY}),
        ):
            for x0, y0, x1, y1 in shown:
                axis.add_patch(
                    Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, linewidth=1.6, **style)
                )
        axis.set(title=name, xlim=(0, picture.shape[1]), ylim=(picture.shape[0], 0))
        axis.axis("off")
    plt.show()
