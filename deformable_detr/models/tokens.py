"""From a backbone's maps to one sequence of tokens with positions.
Chapter pixels_to_boxes builds it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deformable_detr.structures import Tokens


class MultiScaleTokens(nn.Module):
    """L levels of one width, each token with the code of its place and of its level (A.2).

    channels: of the backbone's maps, finest first. num_levels: 1 uses the last map, 2 and 3 the
    last maps, and each level beyond is a convolution of stride 2 on the one before. position: from
    a mask (B, H, W) to codes (B, C, H, W).
    """

    def __init__(
        self, channels: list[int], num_levels: int, embed_dim: int, position: nn.Module
    ) -> None:
        super().__init__()
        self.input_proj = build_input_projections(channels, num_levels, embed_dim)
        self.position = position
        self.level_embed = nn.Parameter(torch.empty(num_levels, embed_dim))

    def reset_parameters(self) -> None:
        """The levels' codes, from a normal distribution."""
        nn.init.normal_(self.level_embed)

    def forward(self, maps: list[Tensor], mask: Tensor) -> Tokens:
        """maps: (B, channels[i], H_i, W_i), finest first. mask: (B, H, W) of the images, True on
        padding."""
        maps = maps[-len(self.input_proj) :]
        levels = []
        last = maps[-1]
        for level in range(len(self.input_proj)):
            if level < len(maps):
                feature = self.project(level, maps[level], mask)
            else:  # the first extra level sees the backbone's raw output, the next ones the last
                feature = last = self.project(level, last, mask)
            code = self.level_embed[level, :, None, None]
            levels.append(level_tokens(feature, mask, self.position, code))
        return join_levels(levels, self.level_embed.dtype)

    def project(self, level: int, feature: Tensor, mask: Tensor) -> Tensor:
        """The map of a level, (B, C, H, W), from the one that it is made of; mask: of the images,
        which the official code leaves aside."""
        return self.input_proj[level](feature)


class SingleScaleTokens(nn.Module):
    """The backbone's last map alone, projected, as DETR has it (section 3.2)."""

    def __init__(self, channels: list[int], embed_dim: int, position: nn.Module) -> None:
        super().__init__()
        self.input_proj = nn.Conv2d(channels[-1], embed_dim, 1)
        self.position = position

    def forward(self, maps: list[Tensor], mask: Tensor) -> Tokens:
        """As `MultiScaleTokens`, with L = 1."""
        feature = self.input_proj(maps[-1])
        tokens = level_tokens(feature, mask, self.position)
        return join_levels([tokens], self.input_proj.weight.dtype)


def level_tokens(
    feature: Tensor, mask: Tensor, position: nn.Module, code: Tensor | float = 0.0
) -> Tokens:
    """One map (B, C, H, W) as tokens; code: (C, 1, 1), added to their positions."""
    shape = feature.shape[-2:]
    mask = level_mask(mask, shape)
    place = position(mask).to(feature) + code
    return Tokens(
        feature.flatten(2).transpose(1, 2),  # (B, H * W, C)
        place.flatten(2).transpose(1, 2),
        mask.flatten(1),
        [tuple(shape)],
        valid_ratio(mask).unsqueeze(1),
    )


def level_mask(mask: Tensor, shape: tuple[int, int]) -> Tensor:
    """The mask of a map of that (H, W), from the images' mask (B, H, W)."""
    return F.interpolate(mask[None].float(), size=shape)[0].bool()


def join_levels(levels: list[Tokens], ratio_dtype: torch.dtype) -> Tokens:
    """All levels one after another; ratios in a dtype that autocast has not narrowed."""
    return Tokens(
        torch.cat([level.features for level in levels], 1),
        torch.cat([level.position for level in levels], 1),
        torch.cat([level.padding_mask for level in levels], 1),
        [shape for level in levels for shape in level.spatial_shapes],
        torch.cat([level.valid_ratios for level in levels], 1).to(ratio_dtype),
    )


def build_input_projections(channels: list[int], num_levels: int, embed_dim: int) -> nn.ModuleList:
    """One projection to embed_dim for each level: 1x1 on the backbone's last maps, then 3x3 of
    stride 2 for each level beyond (A.2)."""
    projections = []
    used = channels[-num_levels:]
    for channel in used:
        projections.append(nn.Conv2d(channel, embed_dim, 1))
    channel = used[-1]
    for _ in range(num_levels - len(used)):
        projections.append(nn.Conv2d(channel, embed_dim, 3, stride=2, padding=1))
        channel = embed_dim
    for convolution in projections:
        nn.init.xavier_uniform_(convolution.weight)
        nn.init.zeros_(convolution.bias)
    return nn.ModuleList(nn.Sequential(c, nn.GroupNorm(32, embed_dim)) for c in projections)


def valid_ratio(mask: Tensor) -> Tensor:
    """(B, 2): the part of the width and of the height that is not padding. mask: (B, H, W)."""
    return torch.stack([(~mask[:, 0]).float().mean(1), (~mask[:, :, 0]).float().mean(1)], -1)


def token_centres(spatial_shapes: list[tuple[int, int]], valid_ratios: Tensor) -> Tensor:
    """Where each token lies, relative to the image without its padding.

    Multiply by a level's valid ratio to get the place on that padded level. Returns (B, S, 2) as
    (x, y); above 1 on padding.
    """
    centres = []
    for level, (height, width) in enumerate(spatial_shapes):
        y, x = torch.meshgrid(
            torch.arange(height, device=valid_ratios.device) + 0.5,
            torch.arange(width, device=valid_ratios.device) + 0.5,
            indexing="ij",
        )
        grid = torch.stack([x.flatten() / width, y.flatten() / height], -1)  # (H*W, 2)
        centres.append(grid / valid_ratios[:, None, level])
    return torch.cat(centres, 1)
