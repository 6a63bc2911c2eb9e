"""The training loop: on Accelerate, so on one CPU, one GPU or many; resumes where it stopped."""

import dataclasses
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from datetime import timedelta
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from deformable_detr.data.coco import CocoDataset, collate
from deformable_detr.evaluation.coco import Metrics, check_classes, evaluate, same_categories
from deformable_detr.files import first_line, write_atomically
from deformable_detr.losses.criterion import SetCriterion, count_boxes
from deformable_detr.models.deformable_detr import DeformableDETR, DeformableDETRConfig
from deformable_detr.structures import Batch, Output
from deformable_detr.training.batches import BatchOrder, SeededDataset, ignore_interrupt
from deformable_detr.training.config import TrainConfig
from deformable_detr.training.faults import first_not_finite, tensors
from deformable_detr.training.optimiser import averaged, freeze, lr_factor, parameter_groups
from deformable_detr.training.recipes import load_recipe
from deformable_detr.weights.ours import save_model

PAPER, DIGITS = TrainConfig(), load_recipe("digits").train
MAY_CHANGE = {  # between a run and its resumption
    "num_workers",
    "checkpoint_minutes",
    "patience",
    "gradient_checkpointing",
}
PRECISION = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PATIENCE = timedelta(hours=3)  # how long processes wait while one checks data or evaluates


class NonFiniteLossError(RuntimeError):
    """The loss became infinite or not a number."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during training; the checkpoint is written."""


def train(
    model: DeformableDETR,
    train_set: CocoDataset,
    val_set: CocoDataset | None,
    output_dir: Path | str,
    config: TrainConfig = PAPER,
    resume: bool = True,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    progress: bool = True,
    card: dict | None = None,
) -> Metrics | None:
    """Train a detector; returns the last validation metrics of this call, if there are any.

    output_dir receives checkpoint.pt (to resume from), log.jsonl, TensorBoard's files and, as
    `load_model` reads them, last.safetensors and best.safetensors (by AP on val_set); with
    config.ema_decay these two are the averaged weights. With resume, a checkpoint that is there is
    continued as if it had never stopped: model, optimiser, data order and random state; bit for bit
    on a CPU (on a GPU sums are added in an order that changes). Without it, what an earlier run has
    left there is removed.
    on_step is called with the step and its losses. card: what else is stored with the weights,
    such as how images are prepared; see `predict.load_detector`.
    Raises ValueError where a checkpoint is of another run, NonFiniteLossError with the image ids
    and the module that came first, and Interrupted after Ctrl-C, when the step is saved.
    """
    trainer = Trainer(model, train_set, val_set, Path(output_dir), config, progress, card)
    if resume:
        trainer.load()
    else:
        trainer.forget()
    return trainer.run(on_step)


class Trainer:
    """One run of `train`: its parts, and the step that they have reached."""

    def __init__(
        self,
        model: DeformableDETR,
        train_set: CocoDataset,
        val_set: CocoDataset | None,
        output_dir: Path,
        config: TrainConfig,
        progress: bool,
        card: dict | None = None,
    ) -> None:
        self.accelerator = make_accelerator()
        batch = config.batch_size * config.accumulate * self.accelerator.num_processes
        self.steps_per_epoch = len(train_set) // batch  # the last, smaller batch is dropped
        if not self.steps_per_epoch:
            raise ValueError(f"{len(train_set)} training images are less than a batch of {batch}")
        check_classes(model, train_set)
        if val_set is not None:
            same_categories(train_set, val_set)
        self.train_set, self.val_set, self.config = train_set, val_set, config
        self.output_dir, self.progress, self.card = output_dir, progress, card or {}
        self.checkpoint = output_dir / "checkpoint.pt"
        self.total_steps = config.epochs * self.steps_per_epoch
        self.step, self.best_ap = 0, -1.0
        self.stale = 0  # evaluations since the best one
        self.epochs_ended = 0  # whose evaluation is done, and whose weights are saved
        self.metrics: Metrics | None = None
        torch.manual_seed(config.seed + self.accelerator.process_index)
        if config.frozen is not None:
            freeze(model.backbone, config.frozen)
        model.set_gradient_checkpointing(config.gradient_checkpointing)
        self.bare = model  # as it is without what distributes it
        self.model = self.accelerator.prepare(model)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, config), lr=config.lr, weight_decay=config.weight_decay
        )
        self.average = averaged(model, config.ema_decay) if config.ema_decay else None
        self.scaler = torch.amp.GradScaler(
            self.accelerator.device.type, enabled=config.mixed_precision == "fp16"
        )
        self.criterion = SetCriterion()

    def run(self, on_step: Callable[[int, dict[str, float]], None] | None = None) -> Metrics | None:
        """Train from the step reached to the end, or until AP has not risen for long enough."""
        if self.out_of_patience():
            return self.metrics
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self._cut_log()
        main, saved = self.accelerator.is_main_process, time.monotonic()
        bar = tqdm(
            total=self.total_steps,
            initial=self.step,
            unit="step",
            disable=not (self.progress and main),
        )
        writer = SummaryWriter(self.output_dir) if main else nullcontext()
        with CatchInterrupt() as interrupt, writer as board, bar:
            if self.config.warmup_steps > self.total_steps:
                bar.write(
                    f"the warm-up has {self.config.warmup_steps} steps, the training only "
                    f"{self.total_steps}: it never reaches its learning rate"
                )
            if self.step // self.steps_per_epoch > self.epochs_ended:  # an evaluation failed
                self._end_epoch(board)
            for batches in self.batches():
                losses = self.train_step(batches)
                self.step += 1
                bar.update()
                bar.set_postfix(loss=f"{losses['loss']:.2f}")
                self._log(losses, board)
                if on_step:
                    on_step(self.step, losses)
                if self.step % self.steps_per_epoch == 0:
                    self._end_epoch(board)
                    saved = time.monotonic()
                elif self._any(time.monotonic() - saved > 60 * self.config.checkpoint_minutes):
                    self.save()
                    saved = time.monotonic()
                if self._any(interrupt.happened):
                    self.save()
                    raise Interrupted(
                        f"stopped at step {self.step} of {self.total_steps}; "
                        f"the same command continues from {self.checkpoint}"
                    )
                if self.out_of_patience():
                    bar.write(f"stopped: no better AP in {self.config.patience} evaluations")
                    break
        return self.metrics

    def out_of_patience(self) -> bool:
        """Whether AP has not risen for config.patience evaluations."""
        return bool(self.config.patience) and self.stale >= self.config.patience

    def _any(self, here: bool) -> bool:
        """Whether it is so in any process: clocks and signals differ, and all save together."""
        if self.accelerator.num_processes == 1:
            return here
        count = torch.tensor(float(here), device=self.accelerator.device)
        return self.accelerator.reduce(count, "sum").item() > 0

    def batches(self) -> Iterator[list[Batch]]:
        """The batches of each step that is left. What is in each, and how it is augmented, depends
        only on the seed and the step."""
        loader = DataLoader(
            SeededDataset(self.train_set, self.config.seed),
            batch_sampler=BatchOrder(
                len(self.train_set),
                self.config,
                range(self.step, self.total_steps),
                self.steps_per_epoch,
                self.accelerator.process_index,
                self.accelerator.num_processes,
            ),
            collate_fn=collate,
            num_workers=self.config.num_workers,
            worker_init_fn=ignore_interrupt,
            generator=torch.Generator(),  # leaves the global random state alone
        )
        batches = iter(loader)
        return iter(lambda: list(islice(batches, self.config.accumulate)), [])

    def train_step(self, batches: list[Batch]) -> dict[str, float]:
        """One step of the optimiser on batches whose gradients add up to that of one large batch;
        the mean losses of all processes, their sum as "loss", and the gradient's norm."""
        factor = lr_factor(self.step, self.total_steps, self.steps_per_epoch, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        device = self.accelerator.device
        boxes = count_boxes([t for batch in batches for t in batch.targets], device)
        self.model.train()
        self.optimizer.zero_grad()
        totals: dict[str, Tensor] = {}
        for batch in batches:
            whole = nullcontext() if batch is batches[-1] else self.accelerator.no_sync(self.model)
            with whole:
                losses = self.losses(batch.to(device), boxes)
                loss = sum(losses.values())
                self.scaler.scale(loss).backward()
            for name, term in ({"loss": loss} | losses).items():
                totals[name] = totals.get(name, 0) + term.detach()
        norm = self._clip(batches)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average and norm.isfinite():  # else the scaler has skipped the step
            self.average.update_parameters(self.bare)
        values = torch.stack([*totals.values()])
        if self.accelerator.num_processes > 1:
            values = self.accelerator.reduce(values, "mean")
        return {**dict(zip(totals, values.tolist(), strict=True)), "gradient_norm": norm.item()}

    def _clip(self, batches: list[Batch]) -> Tensor:
        """Scale the gradient down to clip_norm; its norm before that."""
        self.scaler.unscale_(self.optimizer)
        learning = [p for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in learning])
        # a scaler tries smaller scales; where not even 1 will do, the scale is not the reason
        may_shrink = self.scaler.is_enabled() and self.scaler.get_scale() >= 1
        if not (norm.isfinite() or may_shrink):
            raise self._bad_gradient(batches)
        nn.utils.clip_grads_with_norm_(learning, self.config.clip_norm, norm)
        return norm

    def losses(self, batch: Batch, boxes: float) -> dict[str, Tensor]:
        """The terms of the loss in float32, divided by the step's number of boxes;
        NonFiniteLossError where one is none."""
        random_states = self._random_states()
        with self._autocast():
            output = self.model(batch)
        output = in_float32(output)
        if not torch.stack([x.isfinite().all() for x in tensors(output)]).all():
            raise self._not_finite("the model's output is", batch, random_states)
        losses = self.criterion(output, batch.targets, boxes)
        if not sum(losses.values()).isfinite():
            names = [name for name, term in losses.items() if not term.isfinite()]
            raise self._not_finite(f"{', '.join(names)} is", batch, random_states)
        return losses

    def _autocast(self) -> torch.autocast:
        dtype = PRECISION[self.config.mixed_precision]
        enabled = dtype != torch.float32
        return torch.autocast(self.accelerator.device.type, dtype if enabled else None, enabled)

    def _not_finite(
        self, what: str, batch: Batch, random_states: dict[str, Tensor]
    ) -> NonFiniteLossError:
        """The error, with the first module at fault, found in the same pass once more."""
        self._set_random_states(random_states)
        with self._autocast():
            where = first_not_finite(self.bare, batch)
        return self._stop(f"{what} not finite", [batch], where)

    def _bad_gradient(self, batches: list[Batch]) -> NonFiniteLossError:
        names = [
            name
            for name, parameter in self.bare.named_parameters()
            if parameter.grad is not None and not parameter.grad.isfinite().all()
        ]
        # a backward pass starts at the heads, which are the last parameters
        where = f"in {names[-1]} and {len(names) - 1} more" if names else "its norm overflows"
        return self._stop("the gradient is not finite", batches, where)

    def _stop(self, what: str, batches: list[Batch], where: str) -> NonFiniteLossError:
        ids = [target.image_id for batch in batches for target in batch.targets]
        there = self.checkpoint.exists()
        saved = f"the last checkpoint is {self.checkpoint}" if there else "no checkpoint yet"
        return NonFiniteLossError(f"{what} at step {self.step + 1}, images {ids}: {where}; {saved}")

    def _random_states(self) -> dict[str, Tensor]:
        """Of this process, by the checkpoint's names."""
        states = {"random_states": torch.get_rng_state()}
        if self.accelerator.device.type == "cuda":
            states["cuda_random_states"] = torch.cuda.get_rng_state(self.accelerator.device)
        return states

    def _set_random_states(self, states: dict[str, Tensor]) -> None:
        torch.set_rng_state(states["random_states"])
        if "cuda_random_states" in states and self.accelerator.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda_random_states"], self.accelerator.device)

    def _log(self, losses: dict[str, float], board: SummaryWriter | None) -> None:
        if not self.accelerator.is_main_process:
            return
        values = losses | {"lr": self.optimizer.param_groups[0]["lr"]}
        for name, value in values.items():
            board.add_scalar(f"train/{name}", value, self.step)
        finite = {name: x if math.isfinite(x) else None for name, x in values.items()}
        self._append({"step": self.step, **finite})

    def _append(self, record: dict) -> None:
        with open(self.output_dir / "log.jsonl", "a") as log:
            log.write(json.dumps(record, allow_nan=False) + "\n")

    def _cut_log(self) -> None:
        """Forget what was logged after the checkpoint that is being resumed."""
        path = self.output_dir / "log.jsonl"
        if not (self.accelerator.is_main_process and path.exists()):
            return
        kept = []
        for line in path.read_text().splitlines():
            with suppress(json.JSONDecodeError):  # a line that was being written at a crash
                if json.loads(line)["step"] <= self.step:
                    kept.append(line + "\n")
        write_atomically(path, lambda temporary: Path(temporary).write_text("".join(kept)))

    def _end_epoch(self, board: SummaryWriter | None) -> None:
        epoch = self.step // self.steps_per_epoch
        due = epoch % self.config.evaluate_every == 0 or epoch == self.config.epochs
        if self.val_set is not None and due:
            self.save()  # an evaluation can fail: then it is made up for at the resumption
            better = self.accelerator.is_main_process and self._evaluate(board)
            self.stale = 0 if self._any(better) else self.stale + 1
        if self.accelerator.is_main_process:
            self._save_weights("last")
        self.epochs_ended = epoch
        self.accelerator.wait_for_everyone()
        self.save()

    def _evaluate(self, board: SummaryWriter) -> bool:
        """Whether this is the best so far, which is saved then."""
        self.metrics = evaluate(
            self.trained,
            self.val_set,
            self.config.batch_size,
            self.config.num_workers,
            self.progress,
            top_k=self.config.top_k,
        )
        board.add_scalar("val/AP", self.metrics.ap, self.step)
        self._append({"step": self.step, "val": self.metrics.to_dict()})
        ap = self.metrics.ap if math.isfinite(self.metrics.ap) else 0.0  # a val_set without a box
        better = ap > self.best_ap
        if better:
            self.best_ap = ap
            self._save_weights("best")
        return better

    @property
    def trained(self) -> DeformableDETR:
        """The model as it is evaluated and saved: averaged, if the recipe says so."""
        return self.average.module if self.average else self.bare

    def _save_weights(self, name: str) -> None:
        path = self.output_dir / f"{name}.safetensors"
        save_model(self.trained, path, self.train_set.categories, self.card)

    def identity(self) -> dict:
        """What must be the same in a run and its resumption."""
        return {
            **described(self.config, self.bare.config),
            **{f"data {key}": value for key, value in self.card.items()},
            "training images": len(self.train_set),
            "categories": [[c["id"], c["name"]] for c in self.train_set.categories],
            "processes": self.accelerator.num_processes,
        }

    def save(self) -> None:
        """Write the checkpoint, atomically."""
        states = {  # one row for each process
            name: self.accelerator.gather(state[None].to(self.accelerator.device)).cpu()
            for name, state in self._random_states().items()
        }
        if self.accelerator.is_main_process:
            self._write_checkpoint(states)
        self.accelerator.wait_for_everyone()  # who ended first would have the others stopped

    def _write_checkpoint(self, states: dict[str, Tensor]) -> None:
        state = {
            "identity": self.identity(),
            "step": self.step,
            "best_ap": self.best_ap,
            "stale": self.stale,
            "epochs_ended": self.epochs_ended,
            "model": self.bare.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            **states,
        }
        if self.average:
            state["average"] = self.average.state_dict()
        write_atomically(self.checkpoint, lambda path: torch.save(state, path))

    def forget(self) -> None:
        """Remove what an earlier run has left in the folder."""
        if self.accelerator.is_main_process:
            for name in ("checkpoint.pt", "best.safetensors", "last.safetensors", "log.jsonl"):
                (self.output_dir / name).unlink(missing_ok=True)
            for events in self.output_dir.glob("events.out.tfevents.*"):
                events.unlink()
        self.accelerator.wait_for_everyone()

    def load(self) -> None:
        """Continue from the checkpoint, if there is one."""
        if self.checkpoint.exists():
            self._read_checkpoint()
        step = torch.tensor([self.step], device=self.accelerator.device)
        steps = self.accelerator.gather(step).tolist()
        if len(set(steps)) > 1:
            raise ValueError(
                f"processes would continue from steps {steps}: "
                f"{self.output_dir} must be one folder that all machines share"
            )

    def _read_checkpoint(self) -> None:
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            # an option that is newer than the checkpoint had its default's effect
            before = described(TrainConfig(), DeformableDETRConfig())
            before |= {"categories": self.identity()["categories"]} | state["identity"]
        except Exception as error:
            raise ValueError(
                f"{self.checkpoint} is no checkpoint of ours ({first_line(error)}): "
                "delete it, or start anew without resuming (--fresh)"
            ) from None
        now = self.identity()
        changed = [
            f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
        if changed:
            raise ValueError(
                f"{self.checkpoint} is of another run: {'; '.join(changed)}. Give another folder, "
                "start anew (--fresh), or train on from last.safetensors (--init)"
            )
        self.bare.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average:
            self.average.load_state_dict(state["average"])
        if state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.best_ap = state["step"], state["best_ap"]
        self.stale = state.get("stale", 0)
        self.epochs_ended = state.get("epochs_ended", self.step // self.steps_per_epoch)
        process = self.accelerator.process_index
        names = [name for name in self._random_states() if name in state]
        self._set_random_states({name: state[name][process] for name in names})


def described(recipe: TrainConfig, model: DeformableDETRConfig) -> dict:
    """A run's options, but for those that may change on the way."""
    options = {
        f"recipe {key}": value
        for key, value in dataclasses.asdict(recipe).items()
        if key not in MAY_CHANGE
    }
    return options | {f"model {key}": v for key, v in dataclasses.asdict(model).items()}


def in_float32(output: Output) -> Output:
    """The same output in float32, from whatever precision the model ran in."""

    def convert(value: object) -> object:
        if isinstance(value, Tensor):
            return value.float()
        if isinstance(value, list):
            return [convert(item) for item in value]
        return in_float32(value) if isinstance(value, Output) else value

    return Output(**{name: convert(value) for name, value in vars(output).items()})


def make_accelerator() -> Accelerator:
    """Accelerate on the GPUs, or on the CPU where there is none; patient while one process works.

    The first call in a process decides that for all.
    """
    return Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="no",  # it is set in `Trainer.losses`: evaluation stays in float32
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )


class CatchInterrupt:
    """While open, the first Ctrl-C is only noted; a second one interrupts as usual."""

    def __enter__(self) -> "CatchInterrupt":
        self.happened = False
        self.previous = None
        with suppress(ValueError):  # raised outside the main thread
            self.previous = signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, *_: object) -> None:
        self.happened = True
        signal.signal(signal.SIGINT, self.previous)

    def __exit__(self, *_: object) -> None:
        if self.previous is not None:
            signal.signal(signal.SIGINT, self.previous)
