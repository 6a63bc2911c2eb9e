"""All that a training consists of, from which the loop in `loop` makes steps.
Chapter training_at_every_size."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from deformable_detr.data.coco import CocoDataset
from deformable_detr.evaluation.coco import (
    Metrics,
    check_classes,
    predict_dataset,
    same_categories,
    score,
)
from deformable_detr.evaluation.mistakes import choose_threshold
from deformable_detr.losses.criterion import SetCriterion
from deformable_detr.models import BaseDetector
from deformable_detr.structures import Batch
from deformable_detr.training.batches import count_steps, load_batches
from deformable_detr.training.checkpoint import EPOCHS, identify
from deformable_detr.training.config import TrainConfig
from deformable_detr.training.optimiser import (
    averaged,
    freeze,
    load_state_by_name,
    parameter_groups,
    state_by_name,
)
from deformable_detr.training.pace import Plan
from deformable_detr.training.precision import make_scaler
from deformable_detr.training.processes import as_launched, in_any_process, make_accelerator
from deformable_detr.training.run import Run
from deformable_detr.weights.ours import save_model

COUNTERS = ("step", "epochs_ended", "best_ap", "best_epoch", "stale", "threshold")


class Training:
    """Data, model, optimiser, average of the weights, and how far they have come.

    model: as it is; distributed: the same as all processes share it. step: of the optimiser, so
    many are done. epochs_ended: whose evaluation is done, and whose weights are saved. best_ap: on
    val_set, -1 before the first evaluation; best_epoch: after which that was. stale: evaluations
    since the best one. metrics, threshold: of the last one, the threshold with the best F1.
    epochs_before: what the recipe said in an earlier part of the run. hinted: whether it was said
    that nothing is learned. notes: lines to say before the first step. run: the folder.
    Raises ValueError where data and model, train_set and val_set, or recipe and `accelerate launch`
    do not go together.
    """

    def __init__(
        self,
        model: BaseDetector,
        train_set: CocoDataset,
        val_set: CocoDataset | None,
        output_dir: Path | str,
        config: TrainConfig,
        progress: bool = True,
        card: dict | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.accelerator = make_accelerator()
        self.config = config = as_launched(config)
        self.train_set, self.val_set, self.card = train_set, val_set, card or {}
        self.notes = notes
        self.device, processes = self.accelerator.device, self.accelerator.num_processes
        self.steps_per_epoch = count_steps(len(train_set), config, processes)
        self.total_steps = config.epochs * self.steps_per_epoch
        check_classes(model, train_set)
        if val_set is not None:
            same_categories(train_set, val_set)
        torch.manual_seed(config.seed + self.accelerator.process_index)
        self._prepare(model)
        self.criterion = SetCriterion(giou_weight=config.giou_weight)
        self.step, self.epochs_ended, self.best_ap, self.best_epoch, self.stale = 0, 0, -1.0, 0, 0
        self.metrics: Metrics | None = None
        self.threshold: float | None = None
        self.epochs_before, self.hinted = config.epochs, False
        identity = identify(config, model.config, self.card, train_set, processes)
        plan = Plan(config, self.steps_per_epoch, len(val_set) if val_set is not None else 0)
        self.run = Run(Path(output_dir), self.accelerator, identity, plan, progress)

    def _prepare(self, model: BaseDetector) -> None:
        """The model as the recipe wants it, on its device, and what changes with it."""
        config = self.config
        if config.frozen is not None:
            freeze(model.backbone, config.frozen)
        model.set_gradient_checkpointing(config.gradient_checkpointing)
        self.model, self.distributed = model, self.accelerator.prepare(model)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, config), lr=config.lr, weight_decay=config.weight_decay
        )
        self.average = averaged(model, config.ema_decay) if config.ema_decay else None
        self.scaler = make_scaler(self.device, config.mixed_precision)

    @property
    def trained(self) -> BaseDetector:
        """The model as it is evaluated and saved: averaged, if the recipe says so."""
        return self.average.module if self.average else self.model

    def batches(self) -> Iterator[list[Batch]]:
        """The batches of each step that is left. What is in each, and how it is augmented, depends
        only on the seed and the step."""
        steps = range(self.step, self.total_steps)
        process = self.accelerator.process_index, self.accelerator.num_processes
        return load_batches(self.train_set, self.config, steps, self.steps_per_epoch, *process)

    def in_any(self, here: bool) -> bool:
        """Whether it is so in any process: clocks and signals differ, and all must act together."""
        return in_any_process(self.accelerator, here)

    def out_of_patience(self) -> bool:
        """Whether AP has not risen for config.patience evaluations."""
        return bool(self.config.patience) and self.stale >= self.config.patience

    def evaluate(self) -> bool:
        """Measure the trained model on val_set; whether it is the best so far, which is kept."""
        config = self.config
        loading = config.batch_size, config.num_workers, self.run.progress
        with self.run.pace.evaluating():
            found = predict_dataset(self.trained, self.val_set, *loading, top_k=config.top_k)
            self.metrics = score(found, self.val_set)
            self.threshold = choose_threshold(found, self.val_set)
        self.run.log_evaluation(self.step, self.metrics)
        ap = self.metrics.ap if math.isfinite(self.metrics.ap) else 0.0  # a val_set without a box
        better = ap > self.best_ap
        if better:
            self.best_ap, self.best_epoch = ap, self.step // self.steps_per_epoch
            self.save_weights("best")
        return better

    def save_weights(self, name: str) -> None:
        """Write the trained model as name.safetensors, with the last threshold in its card."""
        path = self.run.folder / f"{name}.safetensors"
        card = self.card if self.threshold is None else self.card | {"threshold": self.threshold}
        save_model(self.trained, path, self.train_set.categories, card)

    def save(self) -> None:
        """Write the checkpoint; all processes call this."""
        self.run.save(self.state_dict())

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one; see `Run.load`."""
        if (saved := self.run.load(self.model)) is not None:
            self.load_state_dict(saved)
            self.epochs_before = saved["identity"][EPOCHS]
        self.run.check_step(self.step)

    def state_dict(self) -> dict:
        """All that training changes, random numbers excepted; the optimiser's by parameter name."""
        state = {name: getattr(self, name) for name in COUNTERS} | {
            "model": self.model.state_dict(),
            "optimizer": state_by_name(self.optimizer, self.model),
            "scaler": self.scaler.state_dict(),
        }
        return state | ({"average": self.average.state_dict()} if self.average else {})

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` gave."""
        self.model.load_state_dict(state["model"])
        load_state_by_name(self.optimizer, self.model, state["optimizer"])
        if self.average:
            self.average.load_state_dict(state["average"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        for name in COUNTERS:
            setattr(self, name, state[name])
