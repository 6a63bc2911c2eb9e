"""One training in several processes, on Accelerate: what they share.
Chapter training_at_every_size."""

import dataclasses
import os
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor

from deformable_detr.training.config import PRECISIONS, TrainConfig
from deformable_detr.training.random_states import random_states

LAUNCHED = {  # options that `accelerate launch` may set too, by the variables it passes them in
    "mixed_precision": "ACCELERATE_MIXED_PRECISION",
    "accumulate": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
}
REFUSED = {  # what it can also set, and a loop written for DDP cannot do
    "DeepSpeed": "ACCELERATE_USE_DEEPSPEED",
    "FSDP": "ACCELERATE_USE_FSDP",
    "Megatron-LM": "ACCELERATE_USE_MEGATRON_LM",
    "a parallelism configuration": "ACCELERATE_USE_PARALLELISM_CONFIG",
}
PATIENCE = timedelta(hours=3)  # how long processes wait while one checks data or evaluates


def make_accelerator() -> Accelerator:
    """Accelerate on the GPUs, or on the CPU where there is none; patient while one process works.

    The first call in a process decides that for all. ValueError where `accelerate launch` was told
    what the loop cannot do.
    """
    for name, variable in REFUSED.items():
        if os.environ.get(variable, "false").lower() in ("true", "1", "yes"):
            raise ValueError(f"accelerate launch asks for {name}, which this training cannot do")
    return Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="no",  # `training.precision` sets it: evaluation stays in float32
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )


def as_launched(config: TrainConfig) -> TrainConfig:
    """With the precision and accumulation that `accelerate launch` was told, where the recipe
    leaves them at their defaults; ValueError where the two say different things."""
    changes: dict[str, object] = {}
    for name, variable in LAUNCHED.items():
        default, here = getattr(TrainConfig(), name), getattr(config, name)
        asked = type(default)(os.environ.get(variable) or default)
        if name == "mixed_precision" and asked not in PRECISIONS:
            raise ValueError(f"accelerate launch asks for {name} {asked}; there are {PRECISIONS}")
        if asked == default:  # which is also what it passes on where it was told nothing
            continue
        if here not in (asked, default):
            raise ValueError(f"accelerate launch asks for {name} {asked}, the recipe for {here}")
        changes[name] = asked
    return dataclasses.replace(config, **changes)


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
