"""The schematics of chapter attention_on_images: what grows with the number of cells."""

import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

from . import QUERY, VALUE, arrow, block, canvas, running_example


def what_grows() -> None:
    """The running example at three strides: its cells, and their pairs to the same scale."""
    _, axes = plt.subplots(2, 3, figsize=(7, 4.9))
    for (whole, pairs), stride in zip(axes.T, (32, 16, 8), strict=True):
        side = 128 // stride
        count = side**2
        whole.imshow(running_example())
        for edge in range(stride, 128, stride):
            whole.axvline(edge - 0.5, color="white", lw=0.8)
            whole.axhline(edge - 0.5, color="white", lw=0.8)
        whole.set(title=f"stride {stride}: {count} cells", xticks=[], yticks=[])
        pairs.add_patch(Rectangle((0, 0), count, count, facecolor=QUERY, alpha=0.25))
        pairs.add_patch(Rectangle((0, 0), count, count, fill=False, edgecolor=QUERY, lw=1.5))
        pairs.set(xlim=(-4, 260), ylim=(260, -4), aspect="equal", xticks=[], yticks=[])
        pairs.set(title=f"{count**2:,} pairs", xlabel="keys", ylabel="queries")
        pairs.spines[:].set_visible(False)
    plt.show()


def finder() -> None:
    """The model of the toy task as blocks, with shapes for one map."""
    axes = canvas(7.4, 2.2)
    block(axes, 0.75, 1.65, "three learned\nqueries", QUERY, 1.3, 0.65)
    block(axes, 0.75, 0.55, "cells: shape\nand colour", VALUE, 1.3, 0.65)
    block(axes, 3.05, 1.1, "attention,\none head", QUERY, 1.2, 0.8, strong=True)
    block(axes, 5.05, 1.1, "linear\nlayer", QUERY, 0.95, 0.65)
    block(axes, 6.75, 1.1, "a colour\nfor each mark", QUERY, 1.2, 0.65)
    arrow(axes, (1.42, 1.65), (2.43, 1.3), "", QUERY)
    axes.text(1.95, 1.62, "(3, 32)", fontsize=8, color=QUERY, ha="left")
    arrow(axes, (1.42, 0.55), (2.43, 0.9), "", VALUE)
    axes.text(1.95, 0.48, "(N, 32)", fontsize=8, color=VALUE, ha="left")
    arrow(axes, (3.67, 1.1), (4.55, 1.1), "(3, 32)", QUERY)
    arrow(axes, (5.54, 1.1), (6.13, 1.1), "(3, 5)", QUERY)
    axes.text(3.05, 0.52, "weights (3, N)", fontsize=8, color=QUERY, ha="center")
    plt.show()


def bill() -> None:
    """Multi-head attention as blocks, with the FLOPs of each product."""
    axes = canvas(7.4, 2.9)
    block(axes, 0.6, 2.3, "$N_q$ queries", QUERY, 1.1, 0.5)
    block(axes, 0.6, 0.8, "$N_k$ cells", VALUE, 1.1, 0.5)
    for y, name, cost, colour in (
        (2.3, "$U$", "$2N_qC^2$", QUERY),
        (1.25, "$V$", "$2N_kC^2$", VALUE),
        (0.4, "$W'$", "$2N_kC^2$", VALUE),
    ):
        block(axes, 2.25, y, f"{name}   {cost}", colour, 1.35, 0.5)
        arrow(axes, (1.18, 2.3 if colour == QUERY else 0.8), (1.56, y), colour=colour)
    block(axes, 4.3, 1.8, "scores\n$2N_qN_kC$", QUERY, 1.15, 0.75, strong=True)
    block(axes, 5.55, 0.9, "sum\n$2N_qN_kC$", QUERY, 1.15, 0.75, strong=True)
    block(axes, 6.75, 1.95, "$W$\n$2N_qC^2$", QUERY, 1.0, 0.7)
    arrow(axes, (2.95, 2.3), (3.7, 2.0), colour=QUERY)
    arrow(axes, (2.95, 1.25), (3.7, 1.6), colour=VALUE)
    arrow(axes, (4.9, 1.5), (5.25, 1.3), colour=QUERY)
    arrow(axes, (2.95, 0.4), (4.95, 0.75), colour=VALUE)
    arrow(axes, (6.0, 1.32), (6.4, 1.58), colour=QUERY)
    axes.text(5.2, 1.45, "softmax", fontsize=8, color=QUERY)
    plt.show()
