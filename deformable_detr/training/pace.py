"""How long a training takes, its evaluations counted in. Chapter training_at_every_size."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from deformable_detr.training.config import TrainConfig

FORWARD = 1 / 3  # of a step's time: the backward pass takes about twice the forward pass'
RECENT = 50  # steps, over which the time of one is averaged


@dataclass(frozen=True)
class Plan:
    """The steps and evaluations of a training. val_images: of an evaluation; 0 where there is
    none."""

    config: TrainConfig
    steps_per_epoch: int
    val_images: int = 0

    @property
    def steps(self) -> int:
        """All steps."""
        return self.config.epochs * self.steps_per_epoch

    def evaluations(self, step: int = 0) -> int:
        """How many evaluations come after a step."""
        if not self.val_images:
            return 0
        epochs, every = self.config.epochs, self.config.evaluate_every
        ended = step // self.steps_per_epoch
        at_the_end = epochs % every != 0 and ended < epochs
        return epochs // every - ended // every + at_the_end

    def seconds(self, per_step: float, per_evaluation: float | None = None, step: int = 0) -> float:
        """How long it takes from a step on. What an evaluation takes follows from a step's time
        where it is not known: one process has its images pass forwards."""
        if per_evaluation is None:
            images = self.config.batch_size * self.config.accumulate
            per_evaluation = FORWARD * per_step * self.val_images / images
        return (self.steps - step) * per_step + self.evaluations(step) * per_evaluation


class Pace:
    """The time that steps and evaluations of a training have taken so far."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.timed, self.per_step = plan, 0, 0.0
        self.per_evaluation: float | None = None
        self.since = time.monotonic()

    def start(self) -> None:
        """The first step begins now."""
        self.since = time.monotonic()

    def stepped(self) -> None:
        """A step has ended; the first one, which is slower, counts only until the second."""
        now = time.monotonic()
        self.timed += 1
        weight = 1 / min(max(self.timed - 1, 1), RECENT)
        self.per_step += weight * (now - self.since - self.per_step)
        self.since = now

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """While open, the time is an evaluation's."""
        begun = time.monotonic()
        yield
        now = time.monotonic()
        self.per_evaluation = now - begun
        self.since += now - begun

    def seconds_left(self, step: int) -> float:
        """From a step that has just ended on."""
        return self.plan.seconds(self.per_step, self.per_evaluation, step)
