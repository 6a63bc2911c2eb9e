"""The training loop: on Accelerate, so on one CPU, one GPU or many; resumes where it stopped."""

import dataclasses
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from deformable_detr.checkpoint import save_model, write_atomically
from deformable_detr.datasets import CocoDataset, collate
from deformable_detr.detector import DeformableDETR
from deformable_detr.evaluate import Metrics, evaluate
from deformable_detr.losses import SetCriterion
from deformable_detr.structures import Batch


@dataclass(frozen=True)
class TrainConfig:
    """A recipe; the defaults are the paper's (section 5 and the official code).

    batch_size is that of one process. schedule: "step" multiplies every rate by 0.1 after
    drop_epoch; "cosine" falls to 1 % at the end; both rise linearly over warmup_steps.
    sampling_lr_factor is for sampling offsets and reference points. evaluate_every: in epochs.
    """

    epochs: int = 50
    batch_size: int = 2
    lr: float = 2e-4
    backbone_lr: float = 2e-5
    sampling_lr_factor: float = 0.1
    weight_decay: float = 1e-4
    clip_norm: float = 0.1
    schedule: str = "step"
    drop_epoch: int = 40
    warmup_steps: int = 0
    seed: int = 42
    num_workers: int = 0
    evaluate_every: int = 1
    checkpoint_minutes: float = 5.0

    def __post_init__(self) -> None:
        if self.schedule not in ("step", "cosine"):
            raise ValueError(f"schedule must be 'step' or 'cosine', got {self.schedule!r}")
        if min(self.epochs, self.batch_size, self.evaluate_every) < 1:
            raise ValueError("epochs, batch_size and evaluate_every must be at least 1")


PAPER = TrainConfig()
DIGITS = TrainConfig(
    epochs=12,
    batch_size=8,
    lr=1e-3,
    backbone_lr=1e-3,
    sampling_lr_factor=1.0,
    clip_norm=0.5,
    schedule="cosine",
    warmup_steps=100,
)
RECIPES = {"paper": PAPER, "digits": DIGITS}
MAY_CHANGE = {"num_workers", "checkpoint_minutes"}  # between a run and its resumption


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
) -> Metrics | None:
    """Train a detector; returns the last validation metrics, if there is a val_set.

    output_dir receives checkpoint.pt (to resume from), log.jsonl, TensorBoard's files and, as
    `load_model` reads them, last.safetensors and best.safetensors (by AP on val_set). With resume,
    a checkpoint that is there is continued, exactly as if it had never stopped: model, optimiser,
    data order and random state. on_step is called with the step and its losses.
    Raises ValueError where a checkpoint is of another run, NonFiniteLossError with the image ids,
    and Interrupted after Ctrl-C, when the step is finished and saved.
    """
    trainer = Trainer(model, train_set, val_set, Path(output_dir), config, progress)
    if resume:
        trainer.load()
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
    ) -> None:
        self.accelerator = Accelerator()
        batch = config.batch_size * self.accelerator.num_processes
        self.steps_per_epoch = len(train_set) // batch  # the last, smaller batch is dropped
        if not self.steps_per_epoch:
            raise ValueError(f"{len(train_set)} training images are less than a batch of {batch}")
        if len(train_set.categories) != model.config.num_classes:
            raise ValueError(
                f"the model has {model.config.num_classes} classes, "
                f"the data has {len(train_set.categories)} categories"
            )
        self.train_set, self.val_set, self.config = train_set, val_set, config
        self.output_dir, self.progress = output_dir, progress
        self.checkpoint = output_dir / "checkpoint.pt"
        self.total_steps = config.epochs * self.steps_per_epoch
        self.step, self.best_ap = 0, -1.0
        self.metrics: Metrics | None = None
        torch.manual_seed(config.seed + self.accelerator.process_index)
        optimizer = torch.optim.AdamW(
            parameter_groups(model, config), lr=config.lr, weight_decay=config.weight_decay
        )
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.criterion = SetCriterion()

    def run(self, on_step: Callable[[int, dict[str, float]], None] | None = None) -> Metrics | None:
        """Train from the step reached to the end."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self._cut_log()
        saved = time.monotonic()
        bar = tqdm(
            total=self.total_steps,
            initial=self.step,
            unit="step",
            disable=not (self.progress and self.accelerator.is_main_process),
        )
        with CatchInterrupt() as interrupt, SummaryWriter(self.output_dir) as board, bar:
            for batch in self.batches():
                losses = self.train_step(batch)
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
        return self.metrics

    def _any(self, here: bool) -> bool:
        """Whether it is so in any process: clocks and signals differ, and all save together."""
        if self.accelerator.num_processes == 1:
            return here
        count = torch.tensor(float(here), device=self.accelerator.device)
        return self.accelerator.reduce(count, "sum").item() > 0

    def batches(self) -> Iterator[Batch]:
        """The batches that are left. What is in each, and how it is augmented, depends only on the
        seed and the step."""
        random_state = torch.get_rng_state()
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
            generator=torch.Generator(),
        )
        batches = iter(loader)
        torch.set_rng_state(random_state)
        return batches

    def train_step(self, batch: Batch) -> dict[str, float]:
        """One step of the optimiser; the losses, their sum as "loss", and the gradient's norm."""
        factor = lr_factor(self.step, self.total_steps, self.steps_per_epoch, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        batch = batch.to(self.accelerator.device)
        self.model.train()
        output = self.model(batch)
        if not output.logits.isfinite().all() or not output.boxes.isfinite().all():
            raise self._not_finite("the model's output is", batch)
        losses = self.criterion(output, batch.targets)
        loss = sum(losses.values())
        if not loss.isfinite():
            names = [name for name, term in losses.items() if not term.isfinite()]
            raise self._not_finite(f"{', '.join(names)} is", batch)
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimizer.step()
        values = {name: term.item() for name, term in losses.items()}
        return {"loss": loss.item(), **values, "gradient_norm": float(norm)}

    def _not_finite(self, what: str, batch: Batch) -> NonFiniteLossError:
        ids = [target.image_id for target in batch.targets]
        return NonFiniteLossError(
            f"{what} not finite at step {self.step + 1}, images {ids}; "
            f"the last checkpoint is {self.checkpoint}"
        )

    def _log(self, losses: dict[str, float], board: SummaryWriter) -> None:
        if not self.accelerator.is_main_process:
            return
        values = losses | {"lr": self.optimizer.param_groups[0]["lr"]}
        for name, value in values.items():
            board.add_scalar(f"train/{name}", value, self.step)
        self._append({"step": self.step, **values})

    def _append(self, record: dict) -> None:
        with open(self.output_dir / "log.jsonl", "a") as log:
            log.write(json.dumps(record) + "\n")

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
        path.write_text("".join(kept))

    def _end_epoch(self, board: SummaryWriter) -> None:
        epoch = self.step // self.steps_per_epoch
        due = epoch % self.config.evaluate_every == 0 or epoch == self.config.epochs
        if self.accelerator.is_main_process:
            model = self.accelerator.unwrap_model(self.model)
            categories = self.train_set.categories
            if self.val_set is not None and due:
                self.metrics = evaluate(model, self.val_set, progress=self.progress)
                board.add_scalar("val/AP", self.metrics.ap, self.step)
                self._append({"step": self.step, "val": self.metrics.to_dict()})
                if self.metrics.ap > self.best_ap:
                    self.best_ap = self.metrics.ap
                    save_model(model, self.output_dir / "best.safetensors", categories)
            save_model(model, self.output_dir / "last.safetensors", categories)
        self.accelerator.wait_for_everyone()
        self.save()

    def identity(self) -> dict:
        """What must be the same in a run and its resumption."""
        recipe = dataclasses.asdict(self.config)
        return {
            **{f"recipe {key}": v for key, v in recipe.items() if key not in MAY_CHANGE},
            **{
                f"model {key}": v
                for key, v in dataclasses.asdict(
                    self.accelerator.unwrap_model(self.model).config
                ).items()
            },
            "training images": len(self.train_set),
            "processes": self.accelerator.num_processes,
        }

    def save(self) -> None:
        """Write the checkpoint, atomically."""
        states = torch.get_rng_state().to(self.accelerator.device)
        states = self.accelerator.gather(states[None]).cpu()  # one row for each process
        if not self.accelerator.is_main_process:
            return
        state = {
            "identity": self.identity(),
            "step": self.step,
            "best_ap": self.best_ap,
            "model": self.accelerator.unwrap_model(self.model).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random_states": states,
        }
        if self.accelerator.device.type == "cuda":
            state["cuda_random_state"] = torch.cuda.get_rng_state()
        write_atomically(self.checkpoint, lambda path: torch.save(state, path))

    def load(self) -> None:
        """Continue from the checkpoint, if there is one."""
        if not self.checkpoint.exists():
            return
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            before = state["identity"]
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{self.checkpoint} is no checkpoint of ours: {reason}") from None
        now = self.identity()
        changed = [
            f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
        if changed:
            raise ValueError(f"{self.checkpoint} is of another run: {'; '.join(changed)}")
        self.accelerator.unwrap_model(self.model).load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.best_ap = state["step"], state["best_ap"]
        torch.set_rng_state(state["random_states"][self.accelerator.process_index])
        if "cuda_random_state" in state and self.accelerator.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_random_state"])


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict]:
    """Trainable parameters by learning rate: the backbone's, those that decide where to sample,
    and the rest."""
    slow = ("reference_points", "sampling_offsets")
    rates = {
        "rest": config.lr,
        "backbone": config.backbone_lr,
        "sampling": config.lr * config.sampling_lr_factor,
    }
    groups: dict[str, list[Tensor]] = {name: [] for name in rates}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind = "sampling" if any(word in name for word in slow) else "rest"
        groups["backbone" if name.startswith("backbone.") else kind].append(parameter)
    return [
        {"params": parameters, "lr": rates[name], "initial_lr": rates[name]}
        for name, parameters in groups.items()
        if parameters
    ]


def lr_factor(step: int, total_steps: int, steps_per_epoch: int, config: TrainConfig) -> float:
    """What every learning rate is multiplied by at a step, counted from 0."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "step":
        return warmup * (1.0 if step // steps_per_epoch < config.drop_epoch else 0.1)
    return warmup * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / total_steps)))


class BatchOrder:
    """Which samples make up each step's batch of one process: (epoch, index) pairs."""

    def __init__(
        self,
        length: int,
        config: TrainConfig,
        steps: range,
        steps_per_epoch: int,
        process: int,
        processes: int,
    ) -> None:
        self.length, self.config, self.steps = length, config, steps
        self.steps_per_epoch, self.process, self.processes = steps_per_epoch, process, processes

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        size = self.config.batch_size * self.processes
        shuffled, order = -1, []
        for step in self.steps:
            epoch, position = divmod(step, self.steps_per_epoch)
            if epoch != shuffled:
                generator = torch.Generator().manual_seed(self.config.seed * 100_003 + epoch)
                order = torch.randperm(self.length, generator=generator).tolist()
                shuffled = epoch
            batch = order[position * size : (position + 1) * size]
            yield [(epoch, index) for index in batch[self.process :: self.processes]]


class SeededDataset(Dataset):
    """A data set whose random transforms depend on seed, epoch and index alone."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, object]:
        """The sample `index` as it looks in an epoch; key: (epoch, index)."""
        epoch, index = key
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(hash((self.seed, epoch, index)))
            return self.dataset[index]


def ignore_interrupt(worker: int) -> None:
    """Leave Ctrl-C to the main process: the batch that it waits for must still come."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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
