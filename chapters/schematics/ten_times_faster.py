"""The schematics and figures of chapter ten_times_faster."""

from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import NullFormatter

from schematics import CUT, LOSS, QUERY, QUIET, arrow

COLOURS = {
    "DETR": CUT,
    "one map": QUERY,
    "two maps": "#56B4E9",
    "two maps, refinement": "#009E73",
    "two maps, two stages": "#E69F00",
    "Faster R-CNN": "black",
}
BATCH = 8  # images per step, in all studies


def two_gaps() -> None:
    """Two curves of AP, and the two ways to compare them."""
    axes = plt.subplots(figsize=(6, 2.9))[1]
    steps = np.linspace(0, 10, 200)
    for shift, colour, name in ((1.2, QUERY, "learns soon"), (6.0, CUT, "learns late")):
        axes.plot(steps, 0.5 / (1 + np.exp(-1.3 * (steps - shift - 1))), color=colour, label=name)
    arrow(axes, (2.0, 0.2), (6.75, 0.2), colour=LOSS, style="<|-|>")
    axes.text(
        4.3, 0.215, "across: how many times\nmore steps for the same AP?", color=LOSS, ha="center"
    )
    arrow(axes, (8.0, 0.395), (8.0, 0.497), colour=QUIET, style="<|-|>")
    axes.text(8.15, 0.53, "up: how much more AP after the same steps?", color=QUIET, ha="right")
    axes.set(xlabel="training steps", ylabel="AP", xlim=(0, 10), ylim=(0, 0.58))
    axes.set(xticks=[], yticks=[])
    axes.legend(loc="lower right")
    plt.show()


def by_rate(tried: dict[str, list[float]]) -> None:
    """AP without classes of each seed by learning rate; names are "DETR, 0.001" and so on."""
    axes = plt.subplots(figsize=(5.5, 3))[1]
    sides: dict[str, list[tuple[float, list[float]]]] = {}
    for name, values in tried.items():
        side, rate = name.split(", ")
        sides.setdefault(side, []).append((float(rate), values))
    for side, found in sides.items():
        for rate, values in found:
            axes.plot([rate] * len(values), values, "o", color=COLOURS[side], mfc="none", mew=1.6)
        means = [(rate, np.mean(values)) for rate, values in found if values]
        axes.plot(*zip(*means, strict=True), color=COLOURS[side], lw=1, label=side)
    rates = sorted({rate for found in sides.values() for rate, _ in found})
    axes.set(xscale="log", xticks=rates, xlabel="learning rate", ylabel="AP without classes, val")
    axes.set_xticklabels([f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.set_ylim(bottom=-0.01)
    axes.legend()
    plt.show()


def convergence(
    tables: dict[str, list[dict]],
    runs: dict[str, str],
    curves: Callable[..., dict],
    at_the_end: Callable[..., list[float]],
) -> None:
    """AP and AP without classes against images, multiply-adds and seconds; a line per seed."""
    places = plt.subplots(2, 3, figsize=(9, 5.4), sharey="row", sharex="col")[1]
    every = [*runs.items(), ("one map", "convergence")]  # which was trained for two lengths
    for name, study in every:
        rows = tables[study]
        work = at_the_end(rows, name, "multiply_adds", "model")
        seconds = curves(rows, name, "cpu_seconds", "train")
        for row, metric in zip(places, ("ap", "object_ap"), strict=True):
            for number, (seed, (steps, values)) in enumerate(curves(rows, name, metric).items()):
                images = BATCH * steps
                xs = images, images * work[0], seconds[seed][1]
                for axes, x in zip(row, xs, strict=True):
                    label = None if number or runs[name] != study else name
                    axes.plot(x, values, color=COLOURS[name], lw=1, label=label)
                    axes.plot(x[-1:], values[-1:], "o", color=COLOURS[name], ms=4)
    labels = ("images seen", "multiply-adds, forward", "seconds of a core")
    for axes, label in zip(places[1], labels, strict=True):
        axes.set(xlabel=label, xscale="log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    places[0, 0].set_ylabel("AP on val")
    places[1, 0].set_ylabel("AP without classes on val")
    handles, names = places[0, 0].get_legend_handles_labels()
    places[0, 0].figure.legend(handles, names, loc="outside upper center", ncols=6, fontsize=8)
    plt.show()


def factor_by_ap(across: dict[tuple[str, float], tuple[float, float, float]]) -> None:
    """The factor of steps with its interval, by metric and the AP at which it is taken; infinite
    ends are those of lower bounds."""
    places = plt.subplots(1, 2, figsize=(7, 3), sharey=True)[1]
    titles = {"ap": "AP", "object_ap": "AP without classes"}
    for axes, (metric, title) in zip(places, titles.items(), strict=True):
        axes.axhline(10, color=QUIET, ls="--", lw=1)
        for (name, target), (middle, low, high) in across.items():
            if name != metric:
                continue
            if np.isinf(high):
                axes.plot(target, low, "^", color=LOSS, ms=8)
            else:  # ends are nan where there is one seed
                axes.plot([target] * 2, [low, high], color=LOSS, lw=1.5)
                axes.plot(target, middle, "o", color=LOSS)
        axes.set(yscale="log", ylim=(1, 300), xlabel=f"{title} on val")
        axes.set(yticks=[1, 3, 10, 30, 100, 300])
        axes.set_yticklabels(["1", "3", "10", "30", "100", "300"])
        axes.minorticks_off()
        axes.set_xlim(left=0)
        axes.margins(x=0.15)
    places[0].set_ylabel("times fewer steps")
    plt.show()


def explanations(rows: list[dict], curves: Callable[..., dict]) -> None:
    """AP without classes, effective keys and instability over the steps of DETR and one map."""
    places = plt.subplots(1, 3, figsize=(9, 3))[1]
    metrics = {
        "object_ap": "AP without classes",
        "decoder_effective_keys": "effective keys",
        "instability": "objects with another query",
    }
    for axes, (metric, title) in zip(places, metrics.items(), strict=True):
        for name in ("DETR", "one map"):
            for number, (steps, values) in enumerate(curves(rows, name, metric).values()):
                label = None if number else name
                axes.plot(steps, values, "-", color=COLOURS[name], lw=1.1, label=label)
        axes.set(title=title, xlabel="step", xscale="log")
        axes.set(xticks=[500, 1500, 5000, 12000], xticklabels=["500", "1,500", "5,000", "12,000"])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
    for height in (4, 64):
        places[1].axhline(height, color=QUIET, ls="--", lw=1)
    places[1].set_ylim(0, 68)
    places[2].set_ylim(0, 1)
    places[0].legend()
    plt.show()


def by_size(
    tables: dict[str, list[dict]], runs: dict[str, str], at_the_end: Callable[..., list[float]]
) -> None:
    """AP on test of small, medium and large digits, a line per seed."""
    axes = plt.subplots(figsize=(6, 3.2))[1]
    sizes = ("small", "medium", "large")
    for name, study in runs.items():
        columns = [at_the_end(tables[study], name, f"ap_{size}") for size in sizes]
        for number, values in enumerate(zip(*columns, strict=True)):
            label = None if number else name
            axes.plot(range(3), values, "o-", color=COLOURS[name], lw=1, ms=3, label=label)
    axes.set(xticks=range(3), xticklabels=sizes, ylabel="AP on test", xlim=(-0.2, 2.2))
    axes.set_ylim(bottom=0)
    axes.figure.legend(loc="outside right center", fontsize=8)
    plt.show()
