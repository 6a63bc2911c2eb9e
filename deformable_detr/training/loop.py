"""The training loop, to be read from top to bottom: data, step, losses, clip, end of an epoch.

Chapters training and training_at_every_size. Beside it: `setup` makes what it works on, `batches`
chooses the images of each step, `optimiser` the rates; `run` is the folder with checkpoint and log,
`remarks` says what a person should know, `faults` what is not finite.
"""

import signal
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

from torch import Tensor, nn

from deformable_detr.data.coco import CocoDataset
from deformable_detr.data.names import counted
from deformable_detr.evaluation.coco import Metrics
from deformable_detr.interrupts import CatchInterrupt, Interrupted
from deformable_detr.losses.criterion import count_boxes
from deformable_detr.models import BaseDetector
from deformable_detr.structures import Batch
from deformable_detr.training import remarks
from deformable_detr.training.config import TrainConfig
from deformable_detr.training.faults import all_finite, gradient_error, loss_error
from deformable_detr.training.optimiser import lr_factor
from deformable_detr.training.precision import autocast
from deformable_detr.training.processes import mean_over_processes
from deformable_detr.training.random_states import random_states
from deformable_detr.training.setup import Training

PAPER = TrainConfig()
OnStep = Callable[[int, dict[str, float]], None]


def train(
    model: BaseDetector,
    train_set: CocoDataset,
    val_set: CocoDataset | None,
    output_dir: Path | str,
    config: TrainConfig = PAPER,
    resume: bool = True,
    on_step: OnStep | None = None,
    progress: bool = True,
    card: dict | None = None,
    notes: Sequence[str] = (),
) -> Metrics | None:
    """Train a detector; returns the last validation metrics of this call, if there are any.

    output_dir receives checkpoint.pt (to resume from), log.jsonl, curves.png, TensorBoard's file
    and, as `load_detector` reads them, last.safetensors and best.safetensors (by AP on val_set),
    each with its threshold; with config.ema_decay these two are the averaged weights. With resume,
    a checkpoint that is there is continued as if it had never stopped: model, optimiser, data order
    and random state; bit for bit on a CPU (on a GPU sums are added in an order that changes). A
    larger config.epochs continues a run that has ended. Without resume, what an earlier run has
    left there is removed.
    on_step is called with the step and its losses. progress: whether to show a bar, what a person
    should know, and curves.png. card: what else is stored with the weights, such as how images are
    prepared; see `load_detector`. notes: lines to say where the run begins.
    Raises ValueError where a checkpoint is of another run or another training has the folder,
    NonFiniteLossError with the image ids and the module that came first, and Interrupted after
    Ctrl-C, SIGTERM or SIGHUP, when the step is saved.
    """
    training = Training(model, train_set, val_set, output_dir, config, progress, card, notes)
    with training.run.held():
        if resume:
            training.resume()
        else:
            training.run.clear()
        make_steps(training, on_step)
    return training.metrics


def make_steps(training: Training, on_step: OnStep | None = None) -> None:
    """Train from the step reached to the end, or until AP has not risen for long enough."""
    run, total, epoch = training.run, training.total_steps, training.steps_per_epoch
    with CatchInterrupt() as interrupt, run.logging(training.step, training.epochs_ended * epoch):
        run.say_all(remarks.at_the_start(training))
        if training.step // epoch > training.epochs_ended:
            end_epoch(training)  # whose evaluation failed before the resumption
        for batches in training.batches():
            if training.out_of_patience():
                run.say(f"stopped: no better AP in {counted(training.stale, 'evaluation')}")
                break
            losses = train_step(training, batches)
            training.step += 1
            run.log(training.step, losses | {"lr": training.optimizer.param_groups[0]["lr"]})
            if on_step:
                on_step(training.step, losses)
            if training.step % epoch == 0:
                end_epoch(training)
            elif training.in_any(run.minutes_since_saving() > training.config.checkpoint_minutes):
                training.save()
            if training.in_any(interrupt.happened):
                training.save()
                raise Interrupted(
                    f"stopped at step {training.step} of {total}; "
                    f"the same command continues from {run.checkpoint}",
                    interrupt.happened or signal.SIGINT,
                )
        run.say_all(remarks.at_the_end(training))


def train_step(training: Training, batches: list[Batch]) -> dict[str, float]:
    """One step of the optimiser on batches whose gradients add up to that of one large batch; the
    mean losses of all processes, their sum as "loss", and the gradient's norm."""
    model, optimizer, scaler = training.distributed, training.optimizer, training.scaler
    schedule = training.total_steps, training.steps_per_epoch, training.config
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * lr_factor(training.step, *schedule)
    boxes = count_boxes([t for batch in batches for t in batch.targets], training.device)
    images = sum(map(len, batches))
    model.train()
    optimizer.zero_grad()
    totals: dict[str, Tensor] = {}
    for batch in batches:
        last = batch is batches[-1]  # with which processes exchange the gradients of all
        with nullcontext() if last else training.accelerator.no_sync(model):
            share = len(batch) / images
            losses = losses_of(training, batch.to(training.device), boxes, share)
            loss = sum(losses.values())
            scaler.scale(loss).backward()
        for name, term in ({"loss": loss} | losses).items():
            totals[name] = totals.get(name, 0) + term.detach()
    norm = clip(training, batches)
    scaler.step(optimizer)
    scaler.update()
    if training.average and norm.isfinite():  # else the scaler has skipped the step
        training.average.update_parameters(training.model)
    means = mean_over_processes(training.accelerator, totals)
    return means | {"gradient_norm": norm.item()}


def losses_of(training: Training, batch: Batch, boxes: float, share: float) -> dict[str, Tensor]:
    """The terms of the loss in float32, which add up to the step's: of so many boxes, and images of
    which the batch has this share. NonFiniteLossError where one is infinite or NaN."""
    before = random_states(training.device)  # with which a fault can be found again
    with autocast(training.device, training.config.mixed_precision):
        output = training.distributed(batch)
    output = output.float()
    if not all_finite(output):
        raise loss_error(training, "the model's output is", batch, before)
    losses = training.criterion(output, batch.targets, boxes, share)
    if not all_finite(losses):
        names = ", ".join(name for name, term in losses.items() if not term.isfinite())
        raise loss_error(training, f"{names} is", batch, before)
    return losses


def clip(training: Training, batches: list[Batch]) -> Tensor:
    """Scale the gradient down to clip_norm; its norm before that."""
    scaler = training.scaler
    scaler.unscale_(training.optimizer)
    learning = [p for p in training.model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in learning])
    # a scaler tries smaller scales; where not even 1 will do, the scale is not the reason
    may_shrink = scaler.is_enabled() and scaler.get_scale() >= 1
    if not (norm.isfinite() or may_shrink):
        raise gradient_error(training, batches)
    nn.utils.clip_grads_with_norm_(learning, training.config.clip_norm, norm)
    return norm


def end_epoch(training: Training) -> None:
    """Evaluate where that is due, keep the weights, and write the checkpoint."""
    epoch, config, run = training.step // training.steps_per_epoch, training.config, training.run
    due = epoch % config.evaluate_every == 0 or epoch == config.epochs
    if training.val_set is not None and due:
        training.save()  # an evaluation can fail: then it is made up for at the resumption
        better = run.main and training.evaluate()
        training.stale = 0 if training.in_any(better) else training.stale + 1
        if run.main:
            run.say_all(remarks.after_evaluation(training, better))
    if run.main:
        training.save_weights("last")
    training.epochs_ended = epoch
    training.accelerator.wait_for_everyone()
    training.save()
    run.draw_now_and_then()
