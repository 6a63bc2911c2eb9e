"""A run's folder: the checkpoint to resume from, the log, and a picture of it; its progress bar.
Chapter training_at_every_size."""

import json
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from deformable_detr.evaluation.coco import Metrics
from deformable_detr.files import remove_leftovers, write_atomically, writing
from deformable_detr.training.board import Board
from deformable_detr.training.checkpoint import read_checkpoint
from deformable_detr.training.curves import draw_curves
from deformable_detr.training.lock import locked
from deformable_detr.training.pace import Pace, Plan
from deformable_detr.training.processes import gather_random_states, in_each_process
from deformable_detr.training.random_states import set_random_states

DRAW_EVERY = 60  # seconds between pictures while the run goes on
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


class Run:
    """checkpoint.pt, log.jsonl, curves.png and TensorBoard's file in a folder.

    All processes call its methods; the main process alone writes and shows. identity: what must be
    the same in a run and its resumption. plan: its steps and evaluations. progress: whether a bar,
    lines and the picture are wanted.
    """

    def __init__(
        self, folder: Path, accelerator: Accelerator, identity: dict, plan: Plan, progress: bool
    ) -> None:
        self.folder, self.accelerator, self.identity = folder, accelerator, identity
        self.checkpoint, self.log_file = folder / "checkpoint.pt", folder / "log.jsonl"
        self.picture = folder / "curves.png"
        self.main = accelerator.is_main_process
        self.progress = progress and self.main
        self.plan, self.pace = plan, Pace(plan)
        self.saved, self.drawn = time.monotonic(), -math.inf

    @contextmanager
    def held(self) -> Iterator[None]:
        """While open, no other training has this folder; ValueError in every process where one has.
        What killed processes have left there is removed."""
        with ExitStack() as stack:
            error = ""
            try:
                if self.main:
                    with writing(self.folder):
                        self.folder.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(locked(self.folder / ".lock"))
                    remove_leftovers(self.folder)
            except (OSError, ValueError) as failed:
                error = str(failed)
            if any(in_each_process(self.accelerator, int(bool(error)))):
                raise ValueError(error or f"{self.folder} cannot be had by the main process")
            yield

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
            weights = self.folder / "best.safetensors", self.folder / "last.safetensors"
            events = self.folder.glob("events.out.tfevents.*")
            for path in (self.checkpoint, self.log_file, self.picture, *weights, *events):
                path.unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()

    @contextmanager
    def logging(self, step: int, evaluated: int) -> Iterator[None]:
        """While open, the other methods log and show. What was logged after `step` is cut, and
        evaluations after the step `evaluated`, which will come again."""
        with ExitStack() as stack:
            total, off = self.plan.steps, not self.progress
            bar = tqdm(total=total, initial=step, unit="step", disable=off, bar_format=BAR)
            self.bar = stack.enter_context(bar)
            if self.main:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._cut_log(step, evaluated)
                self.board = Board(self.folder, step + 1)
                stack.callback(self.board.close)
                stack.callback(self.draw)
            self.pace.start()
            yield

    def log(self, step: int, values: dict[str, float]) -> None:
        """Log a step's losses, rate and gradient norm; infinity and NaN become None."""
        self.pace.stepped()
        self.bar.update()
        left = tqdm.format_interval(self.pace.seconds_left(step))
        self.bar.set_postfix_str(f"loss {values['loss']:.2f}, {left} left")
        if self.main:
            self.board.add(step, {f"train/{name}": value for name, value in values.items()})
            finite = {name: x if math.isfinite(x) else None for name, x in values.items()}
            self._append({"step": step, **finite})

    def log_evaluation(self, step: int, metrics: Metrics) -> None:
        """Log an evaluation after a step, of which the main process alone knows."""
        self.board.add(step, {"val/AP": metrics.ap, "val/AP50": metrics.ap50})
        self._append({"step": step, "val": metrics.to_dict()})

    def say(self, text: str) -> None:
        """Show a line above the progress bar."""
        if self.progress:
            self.bar.write(text)

    def say_all(self, lines: Iterable[str]) -> None:
        """Show some lines, which are made only for those who see them."""
        for line in lines if self.progress else ():
            self.say(line)

    def draw(self) -> None:
        """Draw the log. A picture that cannot be written is not worth an end."""
        if self.progress:
            with suppress(OSError):
                draw_curves(self.log_file, self.plan.steps_per_epoch, self.picture)
            self.drawn = time.monotonic()

    def draw_now_and_then(self) -> None:
        """Draw the log, unless that was done a moment ago."""
        if time.monotonic() - self.drawn > DRAW_EVERY:
            self.draw()

    def _append(self, record: dict) -> None:
        with writing(self.log_file), open(self.log_file, "a", encoding="utf-8") as log:
            log.write(json.dumps(record, allow_nan=False) + "\n")

    def _cut_log(self, step: int, evaluated: int) -> None:
        if not self.log_file.exists():
            return
        kept = []
        for line in self.log_file.read_text("utf-8").splitlines():
            with suppress(json.JSONDecodeError):  # a line that was being written at a crash
                record = json.loads(line)
                if record["step"] <= (evaluated if "val" in record else step):
                    kept.append(line + "\n")
        write_atomically(self.log_file, lambda path: Path(path).write_text("".join(kept)))
