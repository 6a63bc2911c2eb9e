"""The schematics and figures of chapter what_matters."""

import matplotlib.pyplot as plt
import numpy as np

from deformable_detr.evaluation.intervals import Interval
from schematics import CUT, POINT, QUERY, QUIET, VALUE, arrow, block, canvas

GROUPS = (
    ("maps", VALUE, ("one map", "three maps", "FPN on the maps")),
    ("points per head and map", POINT, ("K = 1", "K = 2", "K = 8")),
    ("offsets", POINT, ("start at zero", "start at random", "learn x 0.1")),
    ("weights", POINT, ("weights per level",)),
    ("boxes", QUERY, ("first boxes 0.05", "first boxes 0.2")),
    ("decoder", QUERY, ("shared heads", "gradient through boxes")),
)
SIZES = {"small": "#F0C060", "medium": POINT, "large": "#7A4A00"}  # shades of the points' colour
PROBABILITIES = (0.4, 0.05, 0.25, 0.3), (0.85, 0.05, 0.05, 0.05)


def one_change(names: list[str]) -> None:
    """The base on the left, and what a study with these configurations changes, one at a time."""
    studied = {name.removeprefix("offsets ") for name in names}
    groups = [(g, colour, [c for c in changes if c in studied]) for g, colour, changes in GROUPS]
    groups = [group for group in groups if group[2]]
    height = 0.65 * len(groups) + 0.05
    axes = canvas(7.5, height)
    middle = height / 2
    block(axes, 0.85, middle, "base:\ntwo maps, K = 4,\ntwo stages", QUIET, 1.6, 0.8, strong=True)
    for number, (group, colour, changes) in enumerate(groups):
        y = height - 0.35 - 0.65 * number
        arrow(axes, (1.67, middle), (2.2, y), colour=colour)
        axes.text(2.25, y, group, fontsize=8, color=colour, va="center")
        for place, change in enumerate(changes):
            width = 1.1 if len(changes) == 3 else 1.7
            left = 3.85 + (width + 0.1) * place
            text = change.replace(" at ", "\nat ").replace(" on ", "\non ")
            block(axes, left + width / 2, y, text, colour, width, 0.46)


def two_rules() -> None:
    """The weights of two queries, and which of their points two rules keep."""
    _, axes = plt.subplots(1, 4, figsize=(7.4, 2.3), sharey=True)
    rules = ("the 2 heaviest", "weight at least 0.1")
    for number, axis in enumerate(axes):
        weights = np.array(PROBABILITIES[number % 2])
        heaviest = np.argsort(-weights, kind="stable")[:2]
        kept = np.isin(np.arange(4), heaviest) if number < 2 else weights >= 0.1
        colours = [POINT if keep else "#dddddd" for keep in kept]
        axis.bar(range(4), weights, color=colours, edgecolor=QUIET)
        axis.set(xticks=range(4), xticklabels="1234", ylim=(0, 1))
        title = f"{rules[number // 2]}:\nquery {number % 2 + 1} keeps {kept.sum()}"
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("point")
        if number > 1:
            axis.axhline(0.1, color=CUT, lw=1, ls="--")
    axes[0].set_ylabel("weight")
    plt.show()


def pairs(scores: dict[str, list[float]], base: str) -> None:
    """Each setting beside the base, a line from the one to the other for each seed."""
    changes = [name for name in scores if name != base]
    _, axes = plt.subplots(1, len(changes), figsize=(7.4, 2.8), sharey=True)
    for axis, name in zip(axes, changes, strict=True):
        for before, after in zip(scores[base], scores[name], strict=True):
            axis.plot([0, 1], [before, after], "o-", color="C0", lw=1, ms=4, alpha=0.8)
        axis.set(xticks=[0, 1], xlim=(-0.3, 1.3), title=name)
        axis.set_xticklabels([base, "changed"])
    axes[0].set_ylabel("score (higher is better)")
    plt.show()


def chances(power: dict[float, list[float]], seeds: list[int]) -> None:
    """How often an effect is seen, against the number of seeds; by its size in spreads."""
    _, axis = plt.subplots(figsize=(6, 3))
    for number, (ratio, line) in enumerate(power.items()):
        label = f"{ratio:g} x the spread" if ratio else "no effect at all"
        axis.plot(seeds, line, "osv^D"[number] + "-", label=label)
    axis.set(xlabel="seeds", ylabel="share of studies that see it", ylim=(0, 1.03), xticks=seeds)
    axis.legend(title="effect", fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    plt.show()


def forest(differences: dict[str, list[float]], found: dict[str, Interval]) -> None:
    """Each row's differences from the base: a dot per seed, the mean and its interval."""
    _, axis = plt.subplots(figsize=(7, 0.34 * len(differences) + 0.9))
    every = [value for values in differences.values() for value in values] or [0.1]
    limit = 1.4 * max(map(abs, every))  # two repeats have intervals that would hide all the rest
    for row, (name, values) in enumerate(differences.items()):
        axis.plot(values, [row] * len(values), "o", color="black", ms=3.5, zorder=4)
        if name in found:
            each = found[name]
            certain = each.low > 0 or each.high < 0
            colour = QUERY if certain else QUIET
            ends = np.clip([each.low, each.high], -limit, limit)
            axis.plot(ends, [row, row], color=colour, lw=2)
            inside = colour if certain else "white"
            axis.plot(each.mean, row, "D", color=colour, mfc=inside, mew=1.5, ms=7, zorder=3)
    axis.axvline(0, color="k", lw=1)
    axis.set(yticks=range(len(differences)), yticklabels=list(differences), xlim=(-limit, limit))
    axis.set(xlabel="AP minus the base's AP, seed by seed", ylim=(len(differences) - 0.5, -0.5))
    plt.show()


def points_in_training(followed: dict[str, dict[str, dict[int, float]]]) -> None:
    """What training does to points: {part_size_metric: {seed: {step: value}}}, a line per seed."""
    metrics = {"length": "length, pixels", "direction": "direction (cosine)", "own": "own share"}
    metrics["level_0"] = "share on the finer map"
    limits = {"direction": (0, 1.05), "own": (0, 0.1), "level_0": (0, 1.05)}
    places = plt.subplots(2, len(metrics), figsize=(9, 4.4), sharex=True)[1]
    for row, part in zip(places, ("encoder", "decoder"), strict=True):
        for axis, (metric, title) in zip(row, metrics.items(), strict=True):
            for size, colour in SIZES.items():
                for number, seed in enumerate(followed[f"{part}_{size}_{metric}"].values()):
                    label = None if number else f"{size} digits"
                    axis.plot(
                        *zip(*sorted(seed.items()), strict=True), color=colour, lw=1, label=label
                    )
            axis.set(ylim=limits.get(metric, (0, None)), xticks=(0, 150, 300, 450))
            axis.set_title(title, fontsize=9)
        row[0].set_ylabel(part)
    for axis in places[1]:
        axis.set_xlabel("step")
    handles, names = places[0, 0].get_legend_handles_labels()
    places[0, 0].figure.legend(handles, names, loc="outside upper center", ncols=3, fontsize=8)
    plt.show()


def kept(curves: dict[str, tuple[list[float], list[float]]]) -> None:
    """AP against the points that are kept of each query and head."""
    _, axis = plt.subplots(figsize=(6, 3.1))
    for (name, (points, scores)), mark in zip(curves.items(), "os", strict=True):
        axis.plot(points, scores, mark + "-", label=name)
    axis.set(xlabel="points kept per query and head, on average", ylabel="AP on test")
    axis.legend(fontsize=8)
    plt.show()
