"""Schematics of the chapter on the recipe."""

import numpy as np

from schematics import CUT, LOSS, POINT, QUERY, VALUE, arrow, block, canvas


def one_step() -> None:
    """One training step from left to right, and under each part the numbers that act there."""
    axes = canvas(7.4, 1.75)
    parts = (
        ("batch", VALUE, "batch_size"),
        ("loss", LOSS, "mixed_precision"),
        ("gradient", LOSS, "accumulate\nfrozen"),
        ("clipped", CUT, "clip_norm"),
        (
            "AdamW",
            QUERY,
            "lr, backbone_lr\nsampling_lr_factor\nschedule\nwarmup_steps\nweight_decay",
        ),
        ("weights", QUERY, ""),
        ("average", POINT, "ema_decay"),
    )
    for index, (name, colour, numbers) in enumerate(parts):
        x = 0.55 + 1.05 * index
        block(axes, x, 1.1, name, colour, width=0.9, strong=True)
        axes.text(x, 0.78, numbers, ha="center", va="top", fontsize=7.5, color=colour)
        if index:
            arrow(axes, (x - 0.6, 1.1), (x - 0.45, 1.1))
    arrow(axes, (5.8, 1.35), (5.8, 1.48), style="-")
    arrow(axes, (5.8, 1.48), (0.55, 1.48), style="-")
    arrow(axes, (0.55, 1.48), (0.55, 1.35))
    words = "the next batch; epochs and patience decide how many there are"
    axes.text(3.2, 1.54, words, ha="center", fontsize=8)


def clipping() -> None:
    """Three gradients and what clipping makes of them: inside the circle nothing happens."""
    axes = canvas(7, 2.6, columns=2)
    left, right = axes
    circle = np.linspace(0, 2 * np.pi, 100)
    for axis, title in ((left, "before"), (right, "after")):
        axis.set(xlim=(-2.2, 2.2), ylim=(-0.7, 1.9), title=title)
        axis.plot(0.5 * np.cos(circle), 0.5 * np.sin(circle), color=CUT, ls="--", lw=1.2)
    for angle, length in ((0.35, 2.0), (1.2, 1.5), (2.6, 0.35)):
        for axis, size in ((left, length), (right, min(length, 0.5))):
            end = (size * np.cos(angle), size * np.sin(angle))
            arrow(axis, (0, 0), end, colour=LOSS)
    left.text(0, -0.62, "the circle has the radius clip_norm", ha="center", fontsize=8, color=CUT)
    right.text(
        0, -0.62, "too long: cut at the circle, same direction", ha="center", fontsize=8, color=CUT
    )
