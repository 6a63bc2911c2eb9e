"""Detecting in bfloat16: smaller weights, and less time where the processor has AMX.
Chapter training_at_every_size."""

import copy
from types import MethodType

import torch
from torch import Tensor, nn

from deformable_detr.evaluation_mode import evaluating
from deformable_detr.models import BaseDetector
from deformable_detr.structures import Batch, Output

PRECISIONS = ("float32", "bf16", "auto")
SIDE = 256  # pixels of the image that shows which layers autocast narrows


def choose_precision(precision: str, device: torch.device) -> str:
    """ "float32" or "bf16"; "auto" is bf16 where the device multiplies such numbers by itself.

    ValueError for what is not in PRECISIONS.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    # AVX512-BF16 alone is slower than float32: 4.7 s instead of 3.3 for an image of 800 x 1066
    has_products = device.type == "cpu" and torch.cpu._is_amx_tile_supported()
    return "bf16" if has_products else "float32"


def in_bf16(model: BaseDetector) -> BaseDetector:
    """A copy for detecting, whose products and convolutions are in bfloat16; what comes out, boxes
    and places of samples are in float32. Autocast would narrow the weights at each call: here it
    is done once. A model that is such a copy is returned as it is."""
    if is_narrow(model):
        return model
    narrow = copy.deepcopy(model)
    for layer in _narrowed(narrow):
        layer.to(torch.bfloat16)
    narrow.forward = MethodType(_autocast_forward, narrow)  # a copy's is bound to the copy
    return narrow


def is_narrow(model: BaseDetector) -> bool:
    """Whether `in_bf16` has made this model."""
    return getattr(model.forward, "__func__", None) is _autocast_forward


def _autocast_forward(model: BaseDetector, batch: Batch) -> Output:
    with torch.autocast(batch.images.device.type, torch.bfloat16):
        return type(model).forward(model, batch).float()


def _narrowed(model: BaseDetector) -> list[nn.Module]:
    """The layers whose products autocast takes in bfloat16, and in nothing else."""
    dtypes: dict[nn.Module, set[torch.dtype]] = {}

    def note(layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        dtypes.setdefault(layer, set()).add(output.dtype)

    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    device = next(model.parameters()).device
    batch = Batch.from_images([torch.zeros(3, SIDE, SIDE, device=device)])
    with evaluating(model), torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        model(batch)
    for hook in hooks:
        hook.remove()
    return [layer for layer, found in dtypes.items() if found == {torch.bfloat16}]
