"""Position encodings of feature maps and of boxes.
Chapter attention shows why attention needs them."""

import math

import torch
from torch import Tensor, nn


def sine_embedding(
    coordinates: Tensor, num_features: int = 128, temperature: float = 10_000
) -> Tensor:
    """Sines and cosines, interleaved, of each coordinate at num_features / 2 frequencies.

    coordinates: (..., N) in radians, computed in float32 or wider. Returns (..., N * num_features):
    the features of the first coordinate, then those of the second, and so on.
    """
    pair = torch.arange(num_features, device=coordinates.device) // 2
    period = temperature ** (2 * pair.to(coordinates.dtype) / num_features)
    phase = coordinates.unsqueeze(-1) / period  # (..., N, num_features)
    waves = torch.stack([phase[..., 0::2].sin(), phase[..., 1::2].cos()], dim=-1)
    return waves.flatten(-3)


class SinePositionEncoding(nn.Module):
    """Two-dimensional sine encoding that counts only pixels which are not padding.

    DETR's encoding. centre: where a pixel's centre lies between its edges, 0.5 as in the official
    "Deformable DETR", or 1 as in DETR, which counts pixels from 1.
    """

    def __init__(
        self,
        num_features: int = 128,
        temperature: float = 10_000,
        scale: float = 2 * math.pi,
        centre: float = 0.5,
    ) -> None:
        super().__init__()
        self.num_features, self.temperature, self.scale = num_features, temperature, scale
        self.shift = 1 - centre  # of what counts from 1

    def forward(self, mask: Tensor) -> Tensor:
        """mask: (B, H, W), True on padding. Returns (B, 2 * num_features, H, W) in float32, the
        features of y before those of x."""
        valid = (~mask).float()
        y, x = valid.cumsum(1), valid.cumsum(2)  # 1, 2, ... up to the valid height or width
        # 1e-6 keeps rows and columns that are all padding finite
        y = (y - self.shift) / (y[:, -1:, :] + 1e-6) * self.scale
        x = (x - self.shift) / (x[:, :, -1:] + 1e-6) * self.scale
        code = sine_embedding(torch.stack([y, x], -1), self.num_features, self.temperature)
        return code.permute(0, 3, 1, 2)


class LearnedPositionEncoding(nn.Module):
    """A learned vector for each of the first `size` columns and rows, side by side.

    The official tables end at 50; an image of 1333 pixels has 167 columns at stride 8.
    """

    def __init__(self, num_features: int = 128, size: int = 50) -> None:
        super().__init__()
        self.row_embed = nn.Embedding(size, num_features)
        self.col_embed = nn.Embedding(size, num_features)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, mask: Tensor) -> Tensor:
        """mask: (B, H, W) with H, W <= size. Returns (B, 2 * num_features, H, W), x before y.
        Raises ValueError on larger maps."""
        batch, height, width = mask.shape
        size = self.row_embed.num_embeddings
        if max(height, width) > size:
            raise ValueError(
                f"learned positions cover {size} x {size} cells, got a map of {height} x {width}; "
                f"use position_size={max(height, width)} or more, or position='sine'"
            )
        x = self.col_embed.weight[:width].expand(height, -1, -1)  # (H, W, F)
        y = self.row_embed.weight[:height, None].expand(-1, width, -1)
        code = torch.cat([x, y], -1).permute(2, 0, 1)
        return code.expand(batch, -1, -1, -1)


def build_position_encoding(name: str, embed_dim: int, size: int = 50, **sine: float) -> nn.Module:
    """The encoding called "sine" or "learned", embed_dim channels in all; size: the columns and
    rows that learned ones cover; sine: options of `SinePositionEncoding`."""
    if name not in ("sine", "learned"):
        raise ValueError(f"position must be one of ['learned', 'sine'], got {name!r}")
    if embed_dim % 4:
        raise ValueError(f"embed_dim must be a multiple of 4, got {embed_dim}")
    if name == "sine":
        return SinePositionEncoding(embed_dim // 2, **sine)
    return LearnedPositionEncoding(embed_dim // 2, size)
