"""The schematics and figures of chapter fewer_tokens."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from deformable_detr.evaluation.intervals import interval
from schematics import CUT, LOSS, POINT, QUERY, QUIET, VALUE, arrow, block, canvas, running_example

LEVEL_COLOURS = (QUERY, POINT, VALUE)  # finest first


def _levels(row: Tensor, shapes: list[tuple[int, int]]) -> list[np.ndarray]:
    """The tokens (S,) of each level as a map."""
    parts = row.split([height * width for height, width in shapes])
    return [part.reshape(shape).numpy() for part, shape in zip(parts, shapes, strict=True)]


def _picture(axes: Axes, title: str = "") -> None:
    """The running example, pale, in its own pixels."""
    axes.imshow(running_example() // 2 + 127, extent=(0, 128, 128, 0))
    axes.set(xlim=(0, 128), ylim=(128, 0), xticks=[], yticks=[], title=title)
    for side in axes.spines.values():
        side.set_visible(False)


def _centres(shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """x and y of a level's token centres, in pixels of the picture."""
    height, width = shape
    return np.meshgrid(
        128 * (np.arange(width) + 0.5) / width, 128 * (np.arange(height) + 0.5) / height
    )


def on_and_off(inside: Tensor, shapes: list[tuple[int, int]]) -> None:
    """The tokens of each level, those on the digit filled; inside: (S,)."""
    places = plt.subplots(1, len(shapes), figsize=(7, 2.6))[1]
    for level, (axes, found) in enumerate(zip(places, _levels(inside, shapes), strict=True)):
        _picture(axes, f"level {level}: {int(found.sum())} of {found.size}")
        x, y = _centres(shapes[level])
        axes.plot(x[~found], y[~found], ".", color=QUIET, ms=2 + level)
        axes.plot(x[found], y[found], "o", color=LEVEL_COLOURS[level], ms=3 + 1.5 * level)
    plt.show()


def read_maps(read: Tensor, shapes: list[tuple[int, int]]) -> None:
    """How much of each token the decoder read, level by level; read: (S,)."""
    places = plt.subplots(1, 1 + len(shapes), figsize=(7.4, 2.1))[1]
    places[0].imshow(running_example())
    places[0].set(xticks=[], yticks=[], title="picture")
    for level, (axes, found) in enumerate(zip(places[1:], _levels(read, shapes), strict=True)):
        axes.imshow(np.sqrt(found))
        axes.set(xticks=[], yticks=[], title=f"level {level}: {found.sum() / read.sum():.0%}")
    plt.show()


def kept(choices: dict[str, Tensor], shapes: list[tuple[int, int]]) -> None:
    """Which tokens of the running example are chosen, one panel for each choice, (S,) bool."""
    places = plt.subplots(1, len(choices), figsize=(1.85 * len(choices), 2.2))[1]
    for axes, (title, row) in zip(np.atleast_1d(places), choices.items(), strict=True):
        _picture(axes, title)
        for level, found in reversed(list(enumerate(_levels(row, shapes)))):
            x, y = _centres(shapes[level])
            marks = {"mfc": "none", "mew": 1.2} if level else {"mec": "none"}
            size = (2.4, 5, 9)[level]
            axes.plot(x[found], y[found], "o", color=LEVEL_COLOURS[level], ms=size, **marks)
    plt.show()


def sparse_flow() -> None:
    """Scorer, choice, encoder, decoder, and the way back of what the decoder has read."""
    axes = canvas(7, 2.9)
    block(axes, 0.6, 1.9, "tokens\nS", VALUE, 0.9, 0.6)
    block(axes, 1.95, 1.9, "scorer", QUERY, 0.95, 0.5)
    block(axes, 3.35, 1.9, "keep the\nbest ρS", POINT, 1.0, 0.6)
    block(axes, 4.85, 1.9, "encoder\nupdates these", VALUE, 1.35, 0.6, strong=True)
    block(axes, 6.4, 1.9, "decoder\nreads all", QUERY, 1.05, 0.6, strong=True)
    for start, end, colour in (
        (1.07, 1.46, VALUE),
        (2.44, 2.83, QUERY),
        (3.87, 4.15, POINT),
        (5.55, 5.86, VALUE),
    ):
        arrow(axes, (start, 1.9), (end, 1.9), colour=colour)
    axes.plot([0.6, 0.6, 4.85], [2.22, 2.62, 2.62], color=VALUE, lw=1.4)
    arrow(axes, (4.85, 2.62), (4.85, 2.22), colour=VALUE)
    axes.text(2.7, 2.68, "all tokens, to be looked at", fontsize=8, color=VALUE, ha="center")
    for x in (2.9, 2.98):
        axes.plot([x - 0.32, x - 0.22], [1.72, 2.08], color=CUT, lw=2.5)
    axes.text(2.62, 1.42, "no gradient", fontsize=8, color=CUT, ha="center")
    arrow(axes, (6.4, 1.58), (6.4, 0.98), colour=LOSS)
    block(axes, 6.2, 0.7, "what was read\nof each token", LOSS, 1.4, 0.54)
    arrow(axes, (5.48, 0.7), (4.9, 0.7), colour=LOSS)
    block(axes, 4.1, 0.7, "the ρS read most: 1\nall others: 0", LOSS, 1.6, 0.54)
    arrow(axes, (3.27, 0.7), (2.63, 0.7), colour=LOSS)
    block(axes, 1.95, 0.7, "the scorer's\nloss", LOSS, 1.25, 0.54, strong=True)
    arrow(axes, (1.95, 0.99), (1.95, 1.63), colour=LOSS)
    axes.set(ylim=(0.3, 2.9))


def interleaved(plans: dict[str, list[list[bool]]]) -> None:
    """Which levels each layer of an encoder updates: for each plan, layers by levels."""
    places = plt.subplots(1, len(plans), figsize=(7.2, 2.6))[1]
    for axes, (title, layers) in zip(places, plans.items(), strict=True):
        widths = (4.0, 1.4, 0.7, 0.45)  # not to scale: the finest has three quarters of the tokens
        for number, layer in enumerate(layers):
            x = 0.0
            for level, (updated, width) in enumerate(zip(layer, widths, strict=True)):
                colour = VALUE if updated else "white"
                patch = Rectangle((x, number), width, 0.8, fc=colour, ec=VALUE, lw=1)
                axes.add_patch(patch)
                if number == 0:
                    axes.text(x + width / 2, -0.45, level, ha="center", va="center", fontsize=8)
                x += width + 0.08
        axes.set(xlim=(-0.2, 7), ylim=(-1, len(layers)), xticks=[], title=title)
        axes.set_yticks([n + 0.4 for n in range(len(layers))], range(1, len(layers) + 1))
        axes.tick_params(length=0)
        axes.set_xlabel("level (finest: 0)")
        for side in axes.spines.values():
            side.set_visible(False)
    places[0].set_ylabel("layer")
    plt.show()


def two_kinds_of_weights() -> None:
    """Weights from the query alone, or from its products with what was sampled."""
    axes = canvas(7, 2.5)
    for left, key_aware in ((0.0, False), (3.7, True)):
        title = "key-aware" if key_aware else "linear (Deformable DETR)"
        axes.text(left + 1.6, 2.35, title, ha="center", fontsize=10)
        block(axes, left + 0.5, 1.75, "query", QUERY, 0.8, 0.42)
        block(axes, left + 0.5, 0.65, "samples", VALUE, 0.85, 0.42)
        words = "products,\nsoftmax" if key_aware else "linear,\nsoftmax"
        block(axes, left + 1.75, 1.75, words, QUERY, 1.0, 0.54)
        block(axes, left + 2.85, 1.2, "sum", QUIET, 0.66, 0.42)
        arrow(axes, (left + 0.93, 1.75), (left + 1.23, 1.75), colour=QUERY)
        arrow(axes, (left + 2.27, 1.72), (left + 2.72, 1.44), colour=QUERY)
        axes.text(left + 2.55, 1.68, "weights", fontsize=8, color=QUERY)
        arrow(axes, (left + 0.96, 0.65), (left + 2.55, 1.05), colour=VALUE)
        axes.text(left + 1.9, 0.62, "values", fontsize=8, color=VALUE)
        if key_aware:
            arrow(axes, (left + 0.75, 0.88), (left + 1.55, 1.46), colour=POINT)
            axes.text(left + 0.72, 1.25, "keys", fontsize=8, color=POINT)
    axes.plot([3.5, 3.5], [0.3, 2.4], color=QUIET, lw=0.8)
    axes.set(ylim=(0.25, 2.55))


def neighbours(
    hues: Tensor, centre: tuple[int, int], wanted: float, weights: dict[str, Tensor]
) -> None:
    """A map of hues, a query that looks for one of them among eight neighbours, and their weights.

    hues: (H, W) in [0, 1). centre: (row, column). weights: of each kind, (8,), neighbours row by row.
    """
    places = plt.subplots(1, len(weights), figsize=(7, 2.9))[1]
    steps = [(y, x) for x in (-1, 0, 1) for y in (-1, 0, 1) if (y, x) != (0, 0)]
    for axes, (title, row) in zip(places, weights.items(), strict=True):
        axes.imshow(plt.cm.hsv(hues.numpy()) * 0.6 + 0.4)
        axes.plot(
            centre[1],
            centre[0],
            "s",
            ms=22,
            mfc=0.6 * np.array(plt.cm.hsv(wanted)) + 0.4,
            mec="black",
            mew=1.5,
        )
        axes.text(centre[1], centre[0], "?", ha="center", va="center", fontsize=13)
        for (y, x), weight in zip(steps, row.tolist(), strict=True):
            place = centre[1] + x, centre[0] + y
            axes.plot(*place, "o", ms=2 + 20 * weight**0.5, mfc="white", mec="black", alpha=0.85)
        axes.set(xticks=[], yticks=[], title=title)
    plt.show()


def cost_against_rho(
    rhos: Sequence[float], counted: Sequence[float], seconds: dict[str, Sequence[float]]
) -> None:
    """The encoder's count, and the time of a layer's parts, each as a share of that at rho = 1."""
    left, right = plt.subplots(1, 2, figsize=(7, 2.8), sharey=True)[1]
    left.plot(rhos, np.array(counted) / counted[0], "o-", color=VALUE, label="encoder, counted")
    left.plot([0, 1], [0, 1], ":", color=QUIET, label="in proportion to ρ")
    colours = {
        "whole layer": VALUE,
        "operator, forward": POINT,
        "operator, backward": LOSS,
        "values": QUERY,
    }
    for name, values in seconds.items():
        right.plot(rhos, np.array(values) / values[0], "o-", color=colours[name], label=name)
    right.plot([0, 1], [0, 1], ":", color=QUIET)
    left.set(
        xlabel="share ρ of updated tokens", ylabel="cost, dense = 1", ylim=(0, 1.15), title="count"
    )
    right.set(xlabel="share ρ of updated tokens", title="clock")
    left.legend(loc="upper left", fontsize=8)
    right.legend(loc="lower right", fontsize=8)
    plt.show()


def trained_by_share(aps: dict[float, list[float]], spent: dict[str, Sequence[float]]) -> None:
    """AP of each seed, with the interval of its mean; what is spent, as a share of that at rho = 1.

    aps: by rho, 1 first. spent: by name, for each rho of aps.
    """
    left, right = plt.subplots(1, 2, figsize=(8, 2.8))[1]
    for rho, values in aps.items():
        left.plot([rho] * len(values), values, "o", color=VALUE, ms=4, alpha=0.6)
        if len(values) > 1:
            mean = interval(values)
            left.plot([rho, rho], [mean.low, mean.high], color=VALUE, lw=2)
            left.plot(rho, mean.mean, "_", color=VALUE, ms=14, mew=2)
    right.plot([0, 1], [0, 1], ":", color=QUIET, label="in proportion to ρ")
    for (name, values), colour in zip(spent.items(), (VALUE, QUERY, POINT, LOSS), strict=True):
        right.plot(list(aps), np.array(values) / values[0], "o-", color=colour, label=name)
    left.set(xlabel="share ρ of updated tokens", ylabel="AP on test")
    left.set(ylim=(0, None), xlim=(0, 1.08))
    right.set(xlabel="share ρ of updated tokens", ylabel="spent, dense = 1", ylim=(0, 1.15))
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    plt.show()


def at_equal_cost(members: dict[str, dict], base: list[float]) -> None:
    """AP of each member, and of the base for as many multiply-adds; those without are left out.

    members: as in equal_cost.json. base: AP after as many images, of each seed.
    """
    known = {name: each for name, each in members.items() if "ap" in each}
    axes = plt.subplots(figsize=(7, 0.8 + 0.4 * max(len(known), 2)))[1]
    for row, each in enumerate(known.values()):
        for side, colour, y in (("member", QUERY, row - 0.14), ("base", QUIET, row + 0.14)):
            found = each["ap"][side]
            axes.plot([found["low"], found["high"]], [y, y], color=colour, lw=2)
            label = {"member": "the member", "base": "the base, equal multiply-adds"}[side]
            axes.plot(found["mean"], y, "o", color=colour, label=label if row == 0 else None)
    axes.axvline(np.mean(base), color=QUIET, ls=":", label="the base, equal images")
    labels = [f"{name} ({each['steps of the base']:.0f})" for name, each in known.items()]
    axes.set_yticks(range(len(known)), labels)
    axes.set(ylim=(max(len(known), 1) - 0.5, -0.5), xlabel="AP on test")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    plt.show()


def tuned(members: dict[str, tuple[list[float], list[float]]], base: str) -> None:
    """AP of each seed with the common learning rate and with a member's own."""
    axes = plt.subplots(figsize=(7, 0.8 + 0.4 * len(members)))[1]
    sides = ("one rate for all", QUIET, -0.14), ("its own rate", QUERY, 0.14)
    for row, pair in enumerate(members.values()):
        for found, (label, colour, shift) in zip(pair, sides, strict=True):
            if len(found) > 1:
                of_mean = interval(found)
                axes.plot([of_mean.low, of_mean.high], [row + shift] * 2, color=colour, lw=2)
                axes.plot(
                    of_mean.mean, row + shift, "o", color=colour, label=None if row else label
                )
    axes.axvline(np.mean(members[base][1]), color=QUIET, ls=":", label="the base, its own rate")
    axes.set_yticks(range(len(members)), members)
    axes.set(ylim=(len(members) - 0.5, -0.5), xlabel="AP on test")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    plt.show()
