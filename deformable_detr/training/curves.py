"""A picture of a run: losses by epoch and, where there are evaluations, AP.
Chapter training_at_every_size."""

import json
from contextlib import suppress
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from deformable_detr.files import write_atomically

LOSSES = {  # by the log's names; Okabe and Ito's colours, which colour-blind readers tell apart
    "loss": ("whole loss", "#000000"),
    "loss_class": ("classes", "#0072B2"),
    "loss_box": ("boxes, L1", "#D55E00"),
    "loss_giou": ("boxes, GIoU", "#009E73"),
}
APS = {"ap": ("AP", "#0072B2", "-"), "ap50": ("AP50", "#56B4E9", "--")}
PIECES = 200  # of a curve, each of which is drawn as its mean


def draw_curves(log: Path, steps_per_epoch: int, path: Path) -> None:
    """Draw a run's log.jsonl into a picture (PNG), atomically; nothing where it has no step yet."""
    steps, evaluations = read_log(log)
    if not steps:
        return
    figure = Figure(figsize=(7, 6.5 if evaluations else 3.8), layout="constrained")
    axes = figure.subplots(2 if evaluations else 1, sharex=True, squeeze=False)[:, 0]
    draw_losses(axes[0], steps, steps_per_epoch)
    if evaluations:
        draw_ap(axes[1], evaluations, steps_per_epoch)
    axes[-1].set_xlabel(f"epoch, of {steps_per_epoch} steps")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    for each in axes:
        each.grid(alpha=0.3)
        each.legend(fontsize="small")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def read_log(log: Path) -> tuple[list[dict], list[dict]]:
    """A log's records of steps, and those of evaluations; a broken last line is left out."""
    steps, evaluations = [], []
    for line in log.read_text("utf-8").splitlines() if log.exists() else ():
        with suppress(json.JSONDecodeError):
            record = json.loads(line)
            (evaluations if "val" in record else steps).append(record)
    return steps, evaluations


def draw_losses(axes: Axes, steps: list[dict], steps_per_epoch: int) -> None:
    """The whole loss, and its terms for the last decoder layer, as means over pieces of the run."""
    pieces = np.array_split(np.arange(len(steps)), min(len(steps), PIECES))
    epochs = np.array([record["step"] for record in steps]) / steps_per_epoch
    for name, (label, colour) in LOSSES.items():
        values = np.array([record.get(name) for record in steps], float)  # None becomes NaN
        if np.isfinite(values).any():
            means = [values[piece].mean() for piece in pieces]
            axes.plot([epochs[p].mean() for p in pieces], means, color=colour, label=label)
    axes.set(yscale="log", ylabel="loss", title="Losses in training: all layers, and the last one")


def draw_ap(axes: Axes, evaluations: list[dict], steps_per_epoch: int) -> None:
    """AP after each evaluation; the best one is marked."""
    epochs = [record["step"] / steps_per_epoch for record in evaluations]
    for name, (label, colour, line) in APS.items():
        values = np.array([record["val"].get(name) for record in evaluations], float)
        axes.plot(epochs, values, line, marker=".", color=colour, label=label)
        if name == "ap" and np.isfinite(values).any():
            best = int(np.nanargmax(values))
            text = f"best AP {values[best]:.3f}, epoch {epochs[best]:.0f}"
            axes.plot(epochs[best], values[best], "o", color="#D55E00", label=text)
    axes.set(ylim=(0, None), ylabel="AP", title="Average precision on val")
