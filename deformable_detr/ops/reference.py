"""Multi-scale deformable attention in plain PyTorch, in two forms: any device, any dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor

from deformable_detr.ops.sizes import Shapes, numbers


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Shapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Eq. 3 of the paper without its projections; shapes as in `deformable_detr.ms_deform_attn`.

    Levels are accumulated one by one: stacking all samples before weighting them, as the official
    pure-PyTorch form does, needs the memory of L levels at once.
    """
    B, _, M, D = value.shape
    Q = sampling_locations.shape[1]
    # Beyond [-2, 2] every sample is zero and so is its gradient: the clamp changes nothing but
    # keeps infinite and NaN coordinates, which contribute nothing, from poisoning the sum.
    grid = (2 * sampling_locations - 1).nan_to_num(nan=-2.0).clamp(-2, 2)  # (B, Q, M, L, K, 2)
    output = 0
    levels = value.split([height * width for height, width in spatial_shapes], dim=1)
    for level, ((height, width), features) in enumerate(zip(spatial_shapes, levels, strict=True)):
        features = features.permute(0, 2, 3, 1).reshape(B * M, D, height, width)
        points = grid[:, :, :, level].transpose(1, 2).flatten(0, 1)  # (B*M, Q, K, 2)
        weights = attention_weights[:, :, :, level].transpose(1, 2).flatten(0, 1)  # (B*M, Q, K)
        samples = F.grid_sample(
            features, points, mode="bilinear", padding_mode="zeros", align_corners=False
        )  # (B*M, D, Q, K)
        output = output + (samples * weights.unsqueeze(1)).sum(-1)  # (B*M, D, Q)
    return output.reshape(B, M * D, Q).transpose(1, 2)


def ms_deform_attn_gather(
    value: Tensor,
    spatial_shapes: Shapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """The same from gathers, products and sums alone, for runtimes without grid_sample, and where
    sizes are tensors."""
    B, _, M, D = value.shape
    Q, K = sampling_locations.shape[1], sampling_locations.shape[4]
    heads = value.transpose(1, 2)  # (B, M, S, D)
    output = 0
    start = 0
    for level, (height, width) in enumerate(spatial_shapes):
        points = sampling_locations[:, :, :, level].transpose(1, 2)  # (B, M, Q, K, 2)
        weights = attention_weights[:, :, :, level].transpose(1, 2)  # (B, M, Q, K)
        size = numbers((width, height), like=points)
        position = points * size - 0.5
        inside = ((position > -1) & (position < size)).all(-1)
        position = position.where(inside.unsqueeze(-1), torch.zeros_like(position))
        low = position.floor()
        part = position - low
        for right in (0, 1):
            for bottom in (0, 1):
                x, y = low[..., 0] + right, low[..., 1] + bottom
                weight = (part[..., 0] if right else 1 - part[..., 0]) * (
                    part[..., 1] if bottom else 1 - part[..., 1]
                )
                exists = inside & (x >= 0) & (x < width) & (y >= 0) & (y < height)
                column = x.clamp(min=0).minimum(size[0] - 1).long()
                row = y.clamp(min=0).minimum(size[1] - 1).long()
                token = (start + row * width + column).flatten(2).unsqueeze(-1)
                rows = heads.gather(2, token.expand(-1, -1, -1, D)).reshape(B, M, Q, K, D)
                weight = (weight * weights).where(exists, torch.zeros_like(weight))
                output = output + (rows * weight.unsqueeze(-1)).sum(3)  # (B, M, Q, D)
        start = start + height * width  # not in place: it may be a tensor
    return output.transpose(1, 2).reshape(B, Q, M * D)
