"""What torch.onnx makes of the registered operator, where it meets it in an exported program."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._decomp import register_decomposition

from deformable_detr.ops import reference
from deformable_detr.ops.registration import fake, pairs

OPERATOR = torch.ops.deformable_detr.ms_deform_attn.default


def in_plain_operations(
    value: Tensor,
    spatial_shapes: Sequence[int],
    locations: Tensor,
    weights: Tensor,
    hidden: Tensor | None = None,
) -> Tensor:
    """The operator, arguments as it has them, as ONNX can say it: one GridSample for each level, or
    gathers where sizes come from a tensor."""
    wide = value.to(locations.dtype)
    if hidden is None:
        output = reference.ms_deform_attn(wide, pairs(spatial_shapes), locations, weights)
    else:
        shapes = pairs(hidden.unbind())
        output = reference.ms_deform_attn_gather(wide, shapes, locations, weights)
    return output.to(value.dtype).contiguous()


# torch.onnx takes this table for what it has no translation of; torch.compile does not
register_decomposition(OPERATOR)(in_plain_operations)
# fake tensors with symbols in their shapes would take it too, were there no shorter form
register_decomposition(OPERATOR, type="meta")(fake)
