"""How much each token was read: what an attention map is where attention samples. Chapter "Fewer
tokens"."""

import torch
from torch import Tensor

from deformable_detr.layers.attention import Sampling
from deformable_detr.ops import ms_deform_attn
from deformable_detr.ops.sizes import numbers


def tokens_read(samplings: list[Sampling], half_cell: bool = False) -> Tensor:
    """The weight with which each token entered the samples of all queries and heads, (B, S).

    samplings: of one or more modules on the same maps. Every sample's weight is shared out among
    the four tokens around it as it was read from them: it is the derivative of all that was read,
    by each token, which the operator's backward pass has. half_cell: half a cell further to the
    right and below, as Sparse DETR's code draws it. No gradient flows.
    """
    shapes = samplings[0].spatial_shapes
    locations = torch.cat([sampling.locations.detach() for sampling in samplings], 1)
    weights = torch.cat([sampling.weights.detach() for sampling in samplings], 1)
    if half_cell:
        size = numbers([n for height, width in shapes for n in (width, height)], like=locations)
        locations = locations + 0.5 / size.view(len(shapes), 1, 2)
    B, _, M = locations.shape[:3]
    tokens = sum(height * width for height, width in shapes)
    with torch.enable_grad():
        value = locations.new_zeros(B, tokens, M, 1, requires_grad=True)
        read = ms_deform_attn(value, shapes, locations, weights.to(locations.dtype))
        (share,) = torch.autograd.grad(read.sum(), value)
    return share.sum((2, 3))
