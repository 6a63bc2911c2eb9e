"""One training in several processes, on Accelerate: what they share. Chapter 13."""

from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor

from deformable_detr.training.random_states import random_states

PATIENCE = timedelta(hours=3)  # how long processes wait while one checks data or evaluates


def make_accelerator() -> Accelerator:
    """Accelerate on the GPUs, or on the CPU where there is none; patient while one process works.

    The first call in a process decides that for all.
    """
    return Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="no",  # `training.precision` sets it: evaluation stays in float32
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )


def in_any_process(accelerator: Accelerator, here: bool) -> bool:
    """Whether it is so in any process: clocks and signals differ, and all must act together."""
    if accelerator.num_processes == 1:
        return here
    count = torch.tensor(float(here), device=accelerator.device)
    return accelerator.reduce(count, "sum").item() > 0


def in_each_process(accelerator: Accelerator, number: int) -> list[int]:
    """A number as each process has it."""
    return accelerator.gather(torch.tensor([number], device=accelerator.device)).tolist()


def mean_over_processes(accelerator: Accelerator, values: dict[str, Tensor]) -> dict[str, float]:
    """Numbers on the device, each as its mean over all processes."""
    numbers = torch.stack([*values.values()])
    if accelerator.num_processes > 1:
        numbers = accelerator.reduce(numbers, "mean")
    return dict(zip(values, numbers.tolist(), strict=True))


def gather_random_states(accelerator: Accelerator) -> dict[str, Tensor]:
    """`random_states` of all processes, a row for each."""
    return {
        name: accelerator.gather(state[None].to(accelerator.device)).cpu()
        for name, state in random_states(accelerator.device).items()
    }
