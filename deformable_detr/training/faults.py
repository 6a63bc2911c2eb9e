"""Where a number that is none comes from: the first module of a forward pass that made one."""

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from deformable_detr.structures import Batch


@torch.no_grad()
def first_not_finite(model: nn.Module, batch: Batch) -> str:
    """One line on the first module whose output holds infinity or NaN, in one more forward pass.

    Says also whether its parameters or its inputs held one already. The pass is in the model's own
    mode, so batch statistics are used, and moved, in training.
    """
    if not batch.images.isfinite().all():
        return "the images hold numbers that are not finite"
    found: list[str] = []

    def watch(name: str, kind: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: object) -> None:
            if found or all(x.isfinite().all() for x in tensors(output)):
                return
            bad = [key for key, x in module.named_parameters() if not x.isfinite().all()]
            why = ""
            if bad:
                why = f", whose {bad[0]} is not finite"
            elif not all(x.isfinite().all() for x in tensors(inputs)):
                why = ", whose input is not finite"
            found.append(f"first in {name} ({kind}){why}")

        return hook

    handles = [
        module.register_forward_hook(watch(name or "the model", type(module).__name__))
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
