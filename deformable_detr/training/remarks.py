"""What a person should hear of a training: before its first step, at evaluations, at its end.
Chapter training_at_every_size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from deformable_detr.data.crowding import crowding
from deformable_detr.data.names import counted
from deformable_detr.training.optimiser import lr_factor

if TYPE_CHECKING:
    from deformable_detr.training.setup import Training

NOTHING = 0.02  # AP below which nothing is learned
SOON = 200  # steps before which that is no wonder


def at_the_start(training: Training) -> Iterator[str]:
    """What the recipe will not do as one might think, and where a resumed run stands."""
    config, total, epoch = training.config, training.total_steps, training.steps_per_epoch
    if training.step:
        yield f"continued from step {training.step} of {total}"
    if training.epochs_before < config.epochs:
        yield continued(training)
    if training.step == total:
        yield f"all {counted(config.epochs, 'epoch')} done: --epochs N continues to a larger number"
    if training.step:  # the rest was said when the run began
        return
    yield from training.notes
    warm_up = f"the warm-up has {counted(config.warmup_steps, 'step')} (--warmup-steps)"
    if config.warmup_steps > total:
        yield f"{warm_up}, the training only {total}: it never reaches its learning rate"
    elif config.warmup_steps > epoch:
        yield f"{warm_up}, an epoch only {epoch}: it takes {config.warmup_steps / epoch:.1f} epochs"
    if config.schedule == "step" and config.drop_epoch >= config.epochs:
        yield (
            f"the rates never drop: that is due after epoch {config.drop_epoch} (--drop-epoch), "
            f"and there are {config.epochs}"
        )
    for split, dataset in (("train", training.train_set), ("val", training.val_set)):
        queries = training.model.config.num_queries
        for text in crowding(dataset.coco.dataset, queries, config.top_k) if dataset else ():
            yield f"{split}: {text}"


def continued(training: Training) -> str:
    """What becomes of the schedule where a run is continued for more epochs."""
    config, step = training.config, training.step
    text = f"continued to {counted(config.epochs, 'epoch')}, after {training.epochs_before}: "
    if config.schedule == "step":
        dropped = step >= config.drop_epoch * training.steps_per_epoch
        then = "dropped to a tenth for good" if dropped else "will drop to a tenth"
        return f"{text}the rates {then} after epoch {config.drop_epoch}"
    schedule = training.steps_per_epoch, config
    totals = training.epochs_before * training.steps_per_epoch, training.total_steps
    before, now = (lr_factor(step, total, *schedule) for total in totals)
    return (
        f"{text}the cosine is stretched over all of them, so that the rates rise from {before:.0%} "
        f"of the recipe's to {now:.0%}, and fall to 1% at the new end"
    )


def after_evaluation(training: Training, better: bool) -> Iterator[str]:
    """The AP of an epoch and the best one; a hint, once, where nothing is learned."""
    metrics, epoch = training.metrics, training.step // training.steps_per_epoch
    of = f"epoch {training.best_epoch}" if training.best_epoch else "an earlier epoch"
    best = "the best so far" if better else f"the best is {training.best_ap:.3f}, of {of}"
    yield (
        f"epoch {epoch} of {training.config.epochs}: AP {metrics.ap:.3f}, AP50 {metrics.ap50:.3f}; "
        f"{best}"
    )
    if training.best_ap < NOTHING and training.step >= SOON and not training.hinted:
        training.hinted = True
        yield (
            f"nothing is learned yet: AP {metrics.ap:.3f} after {training.step} steps; from random "
            "weights it takes some 1,000, from published ones far fewer. If the loss falls "
            "(curves.png), more steps may do: --epochs, or a smaller --batch-size. If it does not: "
            "deformable-detr sheet and doctor. Small objects need a larger --short-side"
        )


def at_the_end(training: Training) -> Iterator[str]:
    """Which weights are where, and how good they are."""
    folder, ap = training.run.folder, training.metrics.ap if training.metrics else None
    averaged = "averaged " * bool(training.average)
    last = "" if ap is None else f", AP {ap:.3f}, threshold {training.threshold:.3f}"
    yield f"{folder / 'last.safetensors'}: {averaged}weights of epoch {training.epochs_ended}{last}"
    if training.best_epoch:
        yield (
            f"{folder / 'best.safetensors'}: {averaged}weights of epoch {training.best_epoch}, "
            f"AP {training.best_ap:.3f}"
        )
