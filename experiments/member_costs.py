"""What does a step of training cost, and what an inference? The members of the family and what
the studies of them change, untrained, on one core.

    python experiments/member_costs.py     # about 3 minutes; with nothing beside it
"""

import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from clock import least
from denoising import STUDY as DENOISING
from detectors import SIDE, Detector, describe
from digits import DATA, load_split
from dino import STUDY as PARTS
from members import STUDY as MEMBERS
from sparse import STUDY as SPARSE
from study import Study, row
from study import main as run
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from deformable_detr.data.coco import collate
from deformable_detr.evaluation.complexity import LiveTensors, count, make_batch
from deformable_detr.evaluation_mode import evaluating
from deformable_detr.losses.criterion import SetCriterion
from deformable_detr.models import BaseDetector
from deformable_detr.structures import Batch
from deformable_detr.training.optimiser import parameter_groups
from deformable_detr.training.recipe import Recipe

BATCHES = 10  # over which multiply-adds are averaged: noised objects depend on the images


class Step:
    """A model in training, its optimiser and batches, ready for steps as `train` makes them."""

    def __init__(self, model: BaseDetector, recipe: Recipe, batches: list[Batch]) -> None:
        self.model, self.config, self.batches = model.train(), recipe.train, batches
        self.optimizer = torch.optim.AdamW(parameter_groups(model, self.config))
        self.criterion = SetCriterion()

    def backward(self, batch: Batch) -> None:
        """The gradients."""
        self.optimizer.zero_grad()
        sum(self.criterion(self.model(batch), batch.targets).values()).backward()

    def __call__(self) -> None:
        """One whole step, on the first batch."""
        self.backward(self.batches[0])
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimizer.step()

    def tensors(self) -> list[Tensor]:
        """All that is alive between two steps, gradients not included."""
        moments = [x for state in self.optimizer.state.values() for x in state.values()]
        images = self.batches[0].images, self.batches[0].mask
        return [*self.model.parameters(), *self.model.buffers(), *moments, *images]

    def multiply_adds(self) -> float:
        """Of forward and backward pass, per image, as the mean over the batches."""
        return statistics.mean(map(self._multiply_adds, self.batches))

    def _multiply_adds(self, batch: Batch) -> float:
        counter = FlopCounterMode(display=False)
        with sdpa_kernel(SDPBackend.MATH), counter:  # as products, which are always counted
            self.backward(batch)
        return counter.get_total_flops() / 2 / len(batch)


def measure(detector: Detector, seed: int, folder: Path) -> list[dict]:
    """The rows of one detector: a step on a batch of the digits, an inference of one image."""
    model, recipe = detector.build(seed), detector.resolved(seed)
    images, size = load_split("train", recipe.train_transform()), recipe.train.batch_size
    torch.manual_seed(seed)
    batches = [collate([images[i * size + j] for j in range(size)]) for i in range(BATCHES)]
    step = Step(model, recipe, batches)
    step_costs = {"multiply_adds": round(step.multiply_adds())}
    step()  # makes AdamW's moments
    step_costs |= clocked(step, step.tensors())
    step.optimizer.zero_grad()
    with evaluating(model), torch.no_grad():
        one = make_batch((SIDE, SIDE))
        inference = {"multiply_adds": count(model, (SIDE, SIDE))[0]}
        alive = [*model.parameters(), *model.buffers(), one.images, one.mask]
        inference |= clocked(lambda: model(one), alive)
    return [
        *(row("step", size, metric, value) for metric, value in step_costs.items()),
        *(row("inference", 1, metric, value) for metric, value in inference.items()),
    ]


def clocked(call: Callable[[], object], alive: list[Tensor]) -> dict[str, float]:
    """Milliseconds of one core, and the most bytes held at once, with those alive before."""
    call()
    milliseconds = 1e3 * least(call)
    with LiveTensors(alive) as live:
        call()
    return {"milliseconds": milliseconds, "peak_bytes": live.peak}


STUDY = Study(
    name="member_costs",
    question="multiply-adds per image, milliseconds of one core and bytes held: a step of training "
    "on so many images, and an inference",
    configurations=MEMBERS.configurations
    | DENOISING.configurations
    | PARTS.configurations
    | {n: c for n, c in SPARSE.configurations.items() if c not in MEMBERS.configurations.values()},
    seeds=(0,),
    trial=measure,
    usual=10,
    describe=describe,
    data=DATA,
)


def main() -> None:
    """The command."""
    run(("member_costs",))


if __name__ == "__main__":
    main()
