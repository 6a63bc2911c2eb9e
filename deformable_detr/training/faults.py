"""Where a number that is not finite comes from: the module of a forward pass that made it first."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from deformable_detr.structures import Batch
from deformable_detr.training.precision import autocast
from deformable_detr.training.random_states import set_random_states

if TYPE_CHECKING:
    from deformable_detr.training.setup import Training


class NonFiniteLossError(RuntimeError):
    """The loss became infinite or not a number."""


def loss_error(
    training: Training, what: str, batch: Batch, before: dict[str, Tensor]
) -> NonFiniteLossError:
    """What is not finite, and the module that came first: found in the same pass once more, with
    the random states of the first one."""
    set_random_states(before, training.device)
    with autocast(training.device, training.config.mixed_precision):
        where = first_not_finite(training.model, batch)
    return error_at(training, f"{what} not finite", [batch], where)


def gradient_error(training: Training, batches: list[Batch]) -> NonFiniteLossError:
    """The parameters whose gradients are not finite, the first of them by name."""
    names = [name for name, p in training.model.named_parameters() if not all_finite(p.grad)]
    # a backward pass starts at the heads, which are the last parameters
    where = f"in {names[-1]} and {len(names) - 1} more" if names else "its norm overflows"
    return error_at(training, "the gradient is not finite", batches, where)


def error_at(training: Training, what: str, batches: list[Batch], where: str) -> NonFiniteLossError:
    """The error in one line, with step, images and the checkpoint to go back to."""
    ids = [target.image_id for batch in batches for target in batch.targets]
    path = training.run.checkpoint
    saved = f"the last checkpoint is {path}" if path.exists() else "no checkpoint yet"
    step = training.step + 1
    return NonFiniteLossError(f"{what} at step {step}, images {ids}: {where}; {saved}")


def all_finite(value: object) -> bool:
    """Whether all tensors within a value are finite; they are on one device."""
    checks = [x.isfinite().all() for x in tensors(value)]
    return not checks or bool(torch.stack(checks).all())  # which waits for a GPU once


@torch.no_grad()
def first_not_finite(model: nn.Module, batch: Batch) -> str:
    """One line on the first module whose output holds infinity or NaN, in one more forward pass.

    Says also whether its parameters or its inputs held one already. The pass is in the model's own
    mode, so batch statistics are used, and moved, in training.
    """
    if not all_finite(batch.images):
        return "the images hold numbers that are not finite"
    found: list[str] = []

    def watch(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: object) -> None:
            if not found and not all_finite(output):
                found.append(f"first in {name} ({type(module).__name__}){reason(module, inputs)}")

        return hook

    handles = [
        module.register_forward_hook(watch(name or "the model"))
        for name, module in model.named_modules()
    ]
    try:
        model(batch)
    except ValueError as error:  # a check within the model
        found.append(str(error))
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "every module's output is finite in a second pass"


def reason(module: nn.Module, inputs: tuple) -> str:
    """Why a module's output is not finite, where it is not the module's own doing."""
    bad = [name for name, x in module.named_parameters() if not all_finite(x)]
    if bad:
        return f", whose {bad[0]} is not finite"
    return "" if all_finite(inputs) else ", whose input is not finite"


def tensors(value: object) -> Iterator[Tensor]:
    """The floating tensors within tuples, lists, dictionaries and dataclasses."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
        return
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)
