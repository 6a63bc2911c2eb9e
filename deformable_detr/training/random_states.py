"""Random numbers that go on where they were: in a resumed run, in a repeated pass.
Chapter training_at_every_size."""

import torch
from torch import Tensor


def random_states(device: torch.device) -> dict[str, Tensor]:
    """The states of this process' random numbers, by the checkpoint's names."""
    states = {"random_states": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda_random_states"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: dict[str, Tensor], device: torch.device) -> None:
    """Go on from the states of `random_states`; that of a GPU is left out on a CPU.

    A state may be a row of a larger tensor: torch misreads a view that starts within its storage,
    up to a crash, so that it gets a copy.
    """
    torch.set_rng_state(states["random_states"].clone())
    if "cuda_random_states" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda_random_states"].clone(), device)
