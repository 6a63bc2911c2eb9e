"""Layers one after another, which training may compute twice rather than keep.
Chapter training_at_every_size."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deformable_detr.ops import keep_backend


class Stack(nn.Module):
    """Layers one after another. With gradient_checkpointing, training keeps only what goes into
    each and computes the rest again in the backward pass (Chen et al., 2016): the same gradients,
    about a third more work, and the memory of one layer instead of all."""

    gradient_checkpointing = False

    def run(self, layer: nn.Module, *inputs: object) -> Tensor:
        """A layer's output."""
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(keep_backend(layer), *inputs, use_reentrant=False)
        return layer(*inputs)
