"""A run's folder: the checkpoint to resume from and the log; its progress bar. Chapter 13."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from deformable_detr.evaluation.coco import Metrics
from deformable_detr.files import write_atomically
from deformable_detr.training.checkpoint import read_checkpoint
from deformable_detr.training.processes import gather_random_states, in_each_process
from deformable_detr.training.random_states import set_random_states


class Run:
    """checkpoint.pt, log.jsonl and TensorBoard's files in a folder.

    All processes call its methods; the main process alone writes and shows. identity: what must be
    the same in a run and its resumption.
    """

    def __init__(
        self, folder: Path, accelerator: Accelerator, identity: dict, progress: bool
    ) -> None:
        self.folder, self.accelerator, self.identity = folder, accelerator, identity
        self.checkpoint, self.log_file = folder / "checkpoint.pt", folder / "log.jsonl"
        self.main = accelerator.is_main_process
        self.progress = progress and self.main
        self.saved = time.monotonic()

    def save(self, state: dict) -> None:
        """Write the checkpoint, atomically: a state, and the random numbers of every process."""
        random_states = gather_random_states(self.accelerator)
        if self.main:
            content = {"identity": self.identity} | state | random_states
            write_atomically(self.checkpoint, lambda path: torch.save(content, path))
        self.accelerator.wait_for_everyone()  # who ended first would have the others stopped
        self.saved = time.monotonic()

    def minutes_since_saving(self) -> float:
        """Minutes since the checkpoint was written or, before that, since the run began."""
        return (time.monotonic() - self.saved) / 60

    def load(self, model: nn.Module) -> dict | None:
        """The state in the checkpoint, if there is one; random numbers go on from it at once.

        Raises ValueError where it is of another run, or no checkpoint.
        """
        if not self.checkpoint.exists():
            return None
        state = read_checkpoint(self.checkpoint, self.identity, model)
        process = self.accelerator.process_index
        rows = {name: state[name][process] for name in state if name.endswith("random_states")}
        set_random_states(rows, self.accelerator.device)
        return state

    def check_step(self, step: int) -> None:
        """ValueError unless all processes go on from the same step."""
        steps = in_each_process(self.accelerator, step)
        if len(set(steps)) > 1:
            raise ValueError(
                f"processes would continue from steps {steps}: "
                f"{self.folder} must be one folder that all machines share"
            )

    def clear(self) -> None:
        """Remove what an earlier run has left in the folder."""
        if self.main:
            for name in ("checkpoint.pt", "best.safetensors", "last.safetensors", "log.jsonl"):
                (self.folder / name).unlink(missing_ok=True)
            for events in self.folder.glob("events.out.tfevents.*"):
                events.unlink()
        self.accelerator.wait_for_everyone()

    @contextmanager
    def logging(self, step: int, total_steps: int) -> Iterator[None]:
        """While open, the other methods log and show; what was logged after `step` is cut."""
        self.folder.mkdir(parents=True, exist_ok=True)
        bar = tqdm(total=total_steps, initial=step, unit="step", disable=not self.progress)
        with bar as self.bar:
            if not self.main:
                yield
                return
            self._cut_log(step)
            with SummaryWriter(self.folder) as self.board:
                yield

    def log(self, step: int, values: dict[str, float]) -> None:
        """Log a step's losses, rate and gradient norm; infinity and NaN become None."""
        self.bar.update()
        self.bar.set_postfix(loss=f"{values['loss']:.2f}")
        if self.main:
            for name, value in values.items():
                self.board.add_scalar(f"train/{name}", value, step)
            finite = {name: x if math.isfinite(x) else None for name, x in values.items()}
            self._append({"step": step, **finite})

    def log_evaluation(self, step: int, metrics: Metrics) -> None:
        """Log an evaluation after a step, of which the main process alone knows."""
        self.board.add_scalar("val/AP", metrics.ap, step)
        self._append({"step": step, "val": metrics.to_dict()})

    def say(self, text: str) -> None:
        """Show a line above the progress bar."""
        self.bar.write(text)

    def _append(self, record: dict) -> None:
        with open(self.log_file, "a") as log:
            log.write(json.dumps(record, allow_nan=False) + "\n")

    def _cut_log(self, step: int) -> None:
        if not self.log_file.exists():
            return
        kept = []
        for line in self.log_file.read_text().splitlines():
            with suppress(json.JSONDecodeError):  # a line that was being written at a crash
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
        write_atomically(self.log_file, lambda path: Path(path).write_text("".join(kept)))
