"""Tokens of an image that know nothing of its padding.
Chapter pixels_to_boxes has those of the official code."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from deformable_detr.models.tokens import MultiScaleTokens, level_mask
from deformable_detr.structures import Tokens


class ExactTokens(MultiScaleTokens):
    """As `MultiScaleTokens`, with padding left out to the pixel.

    The official code normalises the projections over padding too, and reckons an image's part of a
    map in whole cells of its mask: one of 57 pixels has 8 of stride 8, which are 64 pixels, so that
    places in it are off by up to a cell, and by how much depends on the batch.

    strides: of the backbone's maps, in pixels.
    """

    def __init__(
        self,
        channels: list[int],
        num_levels: int,
        embed_dim: int,
        position: nn.Module,
        strides: list[int],
    ) -> None:
        super().__init__(channels, num_levels, embed_dim, position)
        used = strides[-num_levels:]
        self.strides = used + [used[-1] * 2**i for i in range(1, num_levels - len(used) + 1)]

    def project(self, level: int, feature: Tensor, mask: Tensor) -> Tensor:
        """Normalised over the image alone."""
        convolution, norm = self.input_proj[level]
        feature = convolution(feature)
        return norm_inside(norm, feature, level_mask(mask, feature.shape[-2:]))

    def forward(self, maps: list[Tensor], mask: Tensor) -> Tokens:
        """maps: (B, channels[i], H_i, W_i), finest first. mask: (B, H, W) of the images."""
        tokens = super().forward(maps, mask)
        x, y = (~mask[:, 0]).sum(1), (~mask[:, :, 0]).sum(1)  # (B,), pixels of each image
        ratios = [
            torch.stack([x / (width * stride), y / (height * stride)], -1)
            for (height, width), stride in zip(tokens.spatial_shapes, self.strides, strict=True)
        ]
        ratio = torch.stack(ratios, 1).to(tokens.valid_ratios)
        return replace(tokens, valid_ratios=ratio)


def norm_inside(norm: nn.GroupNorm, x: Tensor, mask: Tensor) -> Tensor:
    """GroupNorm of x, (B, C, H, W), with mean and variance of what is no padding; mask: (B, H, W).

    The variance is that of deviations from the mean, so that nothing cancels.
    """
    B, C, H, W = x.shape
    groups = x.float().view(B, norm.num_groups, C // norm.num_groups, H, W)
    inside = (~mask).view(B, 1, 1, H, W).to(groups)
    count = inside.sum((2, 3, 4), keepdim=True) * groups.shape[2]
    centred = groups - (groups * inside).sum((2, 3, 4), keepdim=True) / count
    variance = (centred.square() * inside).sum((2, 3, 4), keepdim=True) / count
    normal = (centred * (variance + norm.eps).rsqrt()).view(B, C, H, W)
    return (normal * norm.weight.view(C, 1, 1) + norm.bias.view(C, 1, 1)).to(x.dtype)
