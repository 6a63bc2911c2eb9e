"""Where DAT's shared keys are, and how much each is attended to. Chapter dat."""

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deformable_detr.layers.dat_attention import DAttention, sample


@dataclass(frozen=True)
class SharedKeys:
    """The N keys of one layer with G groups and M heads.

    places: (B, G, N, 2), (x, y) as parts of the map's width and height: 0 and 1 are its edges. What
    a map was padded by lies on the right and at the bottom. attention: (B, M, N), how much of a
    head's attention each key gets, on average over queries; sums to one. The first M / G heads have
    the first group's keys, and so on.
    """

    places: Tensor
    attention: Tensor


def record_shared_keys(model: nn.Module, images: Tensor) -> dict[str, SharedKeys]:
    """The keys of every `DAttention` of a model that takes images (B, 3, H, W), by its name.

    ValueError where the model has none.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, DAttention)}
    if not layers:
        raise ValueError(f"no deformable attention with shared keys in {type(model).__name__}")
    given: dict[str, Tensor] = {}
    with ExitStack() as undo, torch.no_grad():
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(
                lambda _, x, name=name: given.update({name: x[0].detach()})
            )
            undo.callback(handle.remove)
        model(images)
        return {name: _look(layers[name], x) for name, x in given.items()}


def _look(layer: DAttention, x: Tensor) -> SharedKeys:
    """A layer's keys on a map (B, H, W, C); the weights of one row of queries at a time."""
    B, H, W, _ = x.shape
    M = layer.num_heads
    query = layer.query(x)
    places = layer.places(query)
    key = layer.key(sample(x, places)).unflatten(-1, (M, -1))  # (B, N, M, D)
    total = 0.0
    for row in range(H):
        part = query[:, row].unflatten(-1, (M, -1))  # (B, W, M, D)
        scores = torch.einsum("bwmd,bnmd->bmwn", part, key) * key.shape[-1] ** -0.5
        bias = layer.bias(places, (row, row + 1, H, W)).view(B, M, W, -1)
        total = total + (scores + bias).softmax(-1).sum(2)
    size = places.new_tensor([W, H])
    return SharedKeys((places * (size - 1) + 0.5) / size, total / (H * W))
