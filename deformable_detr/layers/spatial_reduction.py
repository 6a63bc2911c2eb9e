"""Attention to a smaller map (PVT's spatial reduction), beside which DAT's paper sets its own
attention. The chapter on DAT compares them."""

import torch.nn.functional as F
from torch import Tensor, nn

from deformable_detr.layers.dense_attention import check_heads
from deformable_detr.layers.window_attention import pad_to_multiple


class SpatialReductionAttention(nn.Module):
    """Multi-head attention from every pixel of a map to the squares of r x r pixels that make it,
    each one key.

    "Pyramid Vision Transformer" (Wang et al., 2021), in the form of its authors' code.

    embed_dim: C. num_heads: M, which divides C. reduction: r; PVT has 8, 4, 2 and 1 in its four
    stages. With 1 the attention is dense. Where a size is no multiple of r, zeros are added on the
    right and at the bottom; PVT leaves out what is over.
    """

    def __init__(self, embed_dim: int, num_heads: int, reduction: int = 1) -> None:
        super().__init__()
        check_heads(embed_dim, num_heads)
        if reduction < 1:
            raise ValueError(f"reduction must be at least 1, got {reduction}")
        self.num_heads, self.reduction = num_heads, reduction
        self.query, self.out = (nn.Linear(embed_dim, embed_dim) for _ in range(2))
        self.key_value = nn.Linear(embed_dim, 2 * embed_dim)
        if reduction > 1:
            self.reduce = nn.Conv2d(embed_dim, embed_dim, reduction, reduction)
            self.norm = nn.LayerNorm(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same. ValueError where r is larger than the map."""
        key, value = self.key_value(self._reduced(x)).chunk(2, -1)
        query, key, value = (self._heads(part) for part in (self.query(x), key, value))
        mixed = F.scaled_dot_product_attention(query, key, value)  # (B, M, H * W, D)
        return self.out(mixed.transpose(1, 2).reshape(x.shape))

    def _reduced(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, ceil(H / r), ceil(W / r), C)."""
        r, size = self.reduction, tuple(x.shape[1:3])
        if r > min(size):
            raise ValueError(f"reduction must be at most the map's size {size}, got {r}")
        if r == 1:
            return x
        squares = self.reduce(pad_to_multiple(x, r).permute(0, 3, 1, 2))
        return self.norm(squares.permute(0, 2, 3, 1))

    def _heads(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, M, H * W, D)."""
        return x.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
