"""Attention inside windows of a map, and inside windows that are shifted (Liu et al., "Swin
Transformer"), as the first stages of DAT have it. The chapter on DAT builds on it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deformable_detr.layers.dense_attention import check_heads
from deformable_detr.ops.sizes import Size


class WindowAttention(nn.Module):
    """Dense attention among the tokens of each window, with a bias for each relative place.

    "Vision Transformer with Deformable Attention", section 3.3; Swin's Eq. 4. The map is padded on
    the right and at the bottom to whole windows. Padding is no key, in which this differs from
    Swin; where there is none, the numbers are the same.

    shift: 0, or by how many pixels the windows are moved down and to the right; DAT has
    ceil(window_size / 2), Swin the floor. What a shift tears apart, the map's opposite ends, does
    not attend to each other. A map no larger than a window has nothing to shift to, and is not
    shifted.
    """

    def __init__(self, embed_dim: int, num_heads: int, window_size: int = 7, shift: int = 0):
        super().__init__()
        check_heads(embed_dim, num_heads)
        if window_size < 1:
            raise ValueError(f"window_size must be at least 1, got {window_size}")
        if not 0 <= shift < window_size:
            raise ValueError(f"shift must be from 0 to {window_size - 1}, got {shift}")
        self.num_heads, self.window_size, self.shift = num_heads, window_size, shift
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.out = nn.Linear(embed_dim, embed_dim)
        # by the row and column of the query, minus those of the key, from -(w - 1) to w - 1
        self.bias_table = nn.Parameter(torch.empty((2 * window_size - 1) ** 2, num_heads))
        nn.init.trunc_normal_(self.bias_table, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        B, H, W, C = x.shape
        x = pad_to_multiple(x, self.window_size)
        shifts = [self._shift(n) for n in (H, W)]
        if any(shifts):
            x = x.roll([-n for n in shifts], (1, 2))
        query, key, value = (self._windows(part) for part in self.qkv(x).chunk(3, -1))
        scores = (query * (C // self.num_heads) ** -0.5) @ key.transpose(-2, -1)
        bias = self.bias()
        allowed = self.allowed(H, W, x.device)
        if allowed is not None:
            # The authors add -100. Its exponential, 4e-44, is a denormal number, with which a
            # processor multiplies so slowly that the layer takes three times as long.
            forbidden = torch.zeros_like(allowed, dtype=bias.dtype).masked_fill(
                ~allowed, -torch.inf
            )
            bias = bias + forbidden[:, None]  # (windows, M, w * w, w * w)
        w = self.window_size
        scores = scores.unflatten(0, (B, x.shape[1] // w * (x.shape[2] // w))) + bias
        mixed = scores.flatten(0, 1).softmax(-1) @ value
        mixed = self._map(mixed, x.shape)
        if any(shifts):
            mixed = mixed.roll(shifts, (1, 2))
        return self.out(mixed[:, :H, :W])

    def bias(self) -> Tensor:
        """(M, w * w, w * w): for every head, query and key of a window."""
        w = self.window_size
        places = self.bias_table.view(2 * w - 1, 2 * w - 1, -1)
        # the w rows that are read with a query in row i start at row i; its first key is the last
        places = places.unfold(0, w, 1).unfold(1, w, 1).flip(3, 4)  # (w, w, M, w, w)
        return places.permute(2, 0, 1, 3, 4).reshape(-1, w * w, w * w)

    def allowed(self, height: Size, width: Size, device: torch.device) -> Tensor | None:
        """(windows, w * w, w * w): whether a query may see a key, on a map of that size; None where
        all may."""
        w = self.window_size
        if not (height % w or width % w or self._shift(height) or self._shift(width)):
            return None
        rows, columns = (self._parts(n, device) for n in (height, width))
        parts = 4 * rows[:, None] + columns
        parts = parts.unflatten(0, (-1, w)).unflatten(2, (-1, w))  # (rows, w, columns, w)
        parts = parts.transpose(1, 2).reshape(-1, w * w)
        return parts[:, :, None] == parts[:, None]

    def _shift(self, size: Size) -> int:
        return self.shift if size > self.window_size else 0

    def _parts(self, size: Size, device: torch.device) -> Tensor:
        """Which tokens of an axis belong together, once it is padded and shifted: 0, those that the
        shift has brought from the start to the end; 1, all others; 2 and 3, padding."""
        padded = size + -size % self.window_size
        shift = self._shift(size)
        place = (torch.arange(padded, device=device) + shift) % padded
        return (place >= shift).long() + 2 * (place >= size)

    def _windows(self, x: Tensor) -> Tensor:
        """(B, H, W, C), of whole windows, to (B * windows, M, w * w, D)."""
        B, H, W, C = x.shape
        w, M = self.window_size, self.num_heads
        x = x.view(B, H // w, w, W // w, w, M, C // M)
        return x.permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, M, w * w, C // M)

    def _map(self, windows: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `_windows`. shape: (B, H, W, C)."""
        B, H, W, C = shape
        w, M = self.window_size, self.num_heads
        windows = windows.view(B, H // w, W // w, M, w, w, C // M)
        return windows.permute(0, 1, 4, 2, 5, 3, 6).reshape(shape)


def pad_to_multiple(x: Tensor, size: int) -> Tensor:
    """A map (B, H, W, C) with zeros on the right and at the bottom, to whole squares of a side."""
    height, width = x.shape[1:3]
    if height % size or width % size:
        x = F.pad(x, (0, 0, 0, -width % size, 0, -height % size))
    return x
