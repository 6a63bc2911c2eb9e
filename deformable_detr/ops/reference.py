"""Multi-scale deformable attention in plain PyTorch, in two forms: any device, any dtype.

Chapter many_scales writes both: with grid_sample, and from the four pixels of chapter sampling.
"""

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
    output = 0
    levels = value.split([height * width for height, width in spatial_shapes], dim=1)
    for level, ((height, width), features) in enumerate(zip(spatial_shapes, levels, strict=True)):
        features = features.permute(0, 2, 3, 1).reshape(B * M, D, height, width)
        points = 2 * sampling_locations[:, :, :, level] - 1  # (B, Q, M, K, 2) in [-1, 1]
        # A pixel away from the border a sample is zero. 2 is further out; put there, NaN and
        # infinite coordinates, which contribute nothing, do not poison the sum.
        near = points.abs() < 1 + 1 / numbers((width, height), like=points)
        points = points.where(near, 2.0).transpose(1, 2).flatten(0, 1)  # (B*M, Q, K, 2)
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
    output = 0
    for level in range(len(spatial_shapes)):
        samples = _sample_level(value, spatial_shapes, level, sampling_locations[:, :, :, level])
        weights = attention_weights[:, :, :, level].unsqueeze(-1)  # (B, Q, M, K, 1)
        output = output + (samples * weights).sum(3)  # (B, Q, M, D)
    return output.flatten(2)


def sample_levels(value: Tensor, spatial_shapes: Shapes, locations: Tensor) -> Tensor:
    """Bilinear samples of every level, before anything weights or sums them; what chapter sampling
    computes, at all points at once.

    value: (B, S, M, D), the L maps one after another; spatial_shapes: their sizes (H, W).
    locations: (B, Q, M, L, K, 2) as (x, y), normalised: (0, 0) is the top-left corner of the
    top-left pixel, (1, 1) the bottom-right corner of the bottom-right one. Whatever lies outside
    counts as zero, NaN included. Returns (B, Q, M, L, K, D), differentiable in both any number of
    times; where the slope jumps, on a pixel's centre, it is the one to the right and below, as
    grid_sample's. Shapes are the caller's to check.
    """
    levels = range(len(spatial_shapes))
    points = locations.unbind(3)
    return torch.stack([_sample_level(value, spatial_shapes, n, points[n]) for n in levels], 3)


def _sample_level(value: Tensor, spatial_shapes: Shapes, level: int, points: Tensor) -> Tensor:
    """One level's samples (B, Q, M, K, D) at its points (B, Q, M, K, 2)."""
    B, S, M, D = value.shape
    height, width = spatial_shapes[level]
    start = sum(rows * columns for rows, columns in spatial_shapes[:level])
    size = numbers((width, height), like=points)
    position = points * size - 0.5  # in pixels, whose centres are whole numbers
    inside = ((position > -1) & (position < size)).all(-1)  # False for NaN
    position = position.where(inside.unsqueeze(-1), 0)
    low = position.floor()
    x_part, y_part = (position - low).unbind(-1)
    left, top = low.long().unbind(-1)  # (B, Q, M, K)
    last_column, last_row = (size.long() - 1).unbind()

    rows = value.reshape(B * S * M, D)
    image = torch.arange(B, device=value.device).view(B, 1, 1, 1)
    head = torch.arange(M, device=value.device).view(M, 1)
    samples = value.new_zeros(())
    for x, x_weight in ((left, 1 - x_part), (left + 1, x_part)):
        for y, y_weight in ((top, 1 - y_part), (top + 1, y_part)):
            exists = inside & (x >= 0) & (x < width) & (y >= 0) & (y < height)
            weight = (x_weight * y_weight).where(exists, 0).unsqueeze(-1)
            column, row = x.clamp(min=0).minimum(last_column), y.clamp(min=0).minimum(last_row)
            token = start + row * width + column
            index = (image * S + token) * M + head
            corner = rows.index_select(0, index.flatten()).view(*index.shape, D)
            samples = torch.addcmul(samples, corner, weight)
    return samples
