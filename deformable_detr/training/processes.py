"""One training in several processes, on Accelerate: what they agree on, and each one's own chance.

Chapter 13.
"""

from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor

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


def random_states(device: torch.device) -> dict[str, Tensor]:
    """The states of this process' random numbers, by the checkpoint's names."""
    states = {"random_states": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda_random_states"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: dict[str, Tensor], device: torch.device) -> None:
    """Go on from the states of `random_states`; those of a GPU are left out on a CPU.

    A state may be a row of a larger tensor. torch reads a generator's state from the start of the
    storage, whatever a view's offset is, so it gets a copy.
    """
    torch.set_rng_state(states["random_states"].clone())
    if "cuda_random_states" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda_random_states"].clone(), device)


def gather_random_states(accelerator: Accelerator) -> dict[str, Tensor]:
    """`random_states` of all processes, a row for each."""
    return {
        name: accelerator.gather(state[None].to(accelerator.device)).cpu()
        for name, state in random_states(accelerator.device).items()
    }
