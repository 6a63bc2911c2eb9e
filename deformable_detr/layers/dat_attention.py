"""DAT's deformable attention: all queries share a few keys, which are moved to where they are of
use. The chapter on DAT builds it, and sets it beside the attention of Deformable DETR."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deformable_detr.layers.dense_attention import check_heads
from deformable_detr.ops import ms_deform_attn
from deformable_detr.ops.checks import real_dtype
from deformable_detr.ops.sizes import Size, numbers

# pairs of a query and a key, counted for each head, above which queries take turns: 32 MiB
PAIRS_AT_ONCE = 1 << 23


class DAttention(nn.Module):
    """Multi-head attention from every pixel of a map to N keys at places that the map decides.

    "Vision Transformer with Deformable Attention" (Xia et al., 2022), section 3.2, Eq. 6 to 9, as
    in the authors' first version (v1), whose numbers it gives. All queries share the places; each
    group of C / G channels, and M / G heads, has its own.

    embed_dim: C. num_heads: M, which divides C. num_groups: G, which divides M. size: (H, W) of the
    map that the table of the position bias is made for, 14 x 14 in the third stage of an image of
    224 x 224. Maps may have any size; see `PositionBias`. kernel_size: of the offset network's
    convolution. stride: r; there are ceil(H / r) * ceil(W / r) keys. In the paper's text r is 2, in
    every model that was released it is 1. offset_range: s; a key leaves its place by at most s / 2
    cells of the keys' grid along each axis. 0 leaves a fixed grid.

    Memory: bias and weights have M numbers for each pair of query and key. Where that is more than
    2^23 numbers, queries take turns, some rows at a time, and in training each turn is computed
    again in the backward pass. On a CPU that costs hardly any time (benchmarks/dat.py): for the
    third stage of an image of 800 x 1066, 171 MiB of tensors at most in place of 1841. glibc may
    hold some 1 GiB for them, in pieces that it does not reuse; with MALLOC_MMAP_THRESHOLD_=1000000
    in the environment it gives them back, and a step takes half as long again.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_groups: int,
        size: tuple[int, int],
        kernel_size: int = 5,
        stride: int = 1,
        offset_range: float = 2.0,
    ) -> None:
        super().__init__()
        check_heads(embed_dim, num_heads)
        if num_groups < 1 or num_heads % num_groups:
            raise ValueError(
                f"num_heads must be divisible by num_groups, got {num_heads} and {num_groups}"
            )
        self.num_heads = num_heads
        self.query, self.key, self.value, self.out = (
            nn.Linear(embed_dim, embed_dim) for _ in range(4)
        )
        self.places = KeyPlaces(embed_dim, num_groups, kernel_size, stride, offset_range)
        self.bias = PositionBias(num_heads, size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same. ValueError where the keys' stride is larger than the map."""
        query = self.query(x)
        places = self.places(query)
        sampled = sample(x, places)  # (B, N, C)
        mixed = self.mix(query, self.key(sampled), self.value(sampled), places)
        return self.out(mixed)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, places: Tensor) -> Tensor:
        """Eq. 9: each query's sum of values. query: (B, H, W, C). key, value: (B, N, C). places: as
        `KeyPlaces` returns them. Returns (B, H, W, C)."""
        B, H, W, C = query.shape
        query, key, value = (self._heads(x.flatten(1, -2)) for x in (query, key, value))
        rows = max(1, PAIRS_AT_ONCE // max(1, B * self.num_heads * W * key.shape[1]))
        turns = []
        for top in range(0, H, rows):
            bottom = min(top + rows, H)
            part = query[:, top * W : bottom * W], key, value, places, (top, bottom, H, W)
            if rows < H and torch.is_grad_enabled():
                turns.append(checkpoint(self._rows, *part, use_reentrant=False))
            else:
                turns.append(self._rows(*part))
        mixed = turns[0] if len(turns) == 1 else torch.cat(turns, 1)  # (B * M, H * W, D)
        M = self.num_heads
        return mixed.view(B, M, H * W, C // M).transpose(1, 2).reshape(B, H, W, C)

    def _rows(
        self, query: Tensor, key: Tensor, value: Tensor, places: Tensor, rows: tuple
    ) -> Tensor:
        """Some rows of queries, (B * M, rows * W, D) in and out."""
        scale = query.shape[-1] ** -0.5
        bias = self.bias(places, rows).to(query.dtype)
        scores = torch.baddbmm(bias, query, key.transpose(1, 2), alpha=scale)
        return scores.softmax(-1) @ value

    def _heads(self, x: Tensor) -> Tensor:
        """(B, L, C) to (B * M, L, D)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2).flatten(0, 1)


class KeyPlaces(nn.Module):
    """Where the keys are: a regular grid, moved by a small network of the queries (Fig. 2b)."""

    def __init__(
        self, embed_dim: int, num_groups: int, kernel_size: int, stride: int, offset_range: float
    ) -> None:
        super().__init__()
        if stride < 1 or kernel_size % 2 == 0:
            raise ValueError(
                "stride must be at least 1 and kernel_size odd, got "
                f"stride {stride} and kernel_size {kernel_size}"
            )
        self.num_groups, self.stride, self.offset_range = num_groups, stride, offset_range
        width = embed_dim // num_groups
        padding = kernel_size // 2
        self.convolution = nn.Conv2d(width, width, kernel_size, stride, padding, groups=width)
        self.norm = nn.LayerNorm(width)  # in the authors' code, not in the paper
        self.linear = nn.Linear(width, 2, bias=False)  # no bias: no shift that all keys share

    def forward(self, query: Tensor) -> Tensor:
        """(B, H, W, C) to the places (B, G, N, 2) as (x, y), relative to the map: 0 is the first
        pixel's centre, 1 the last one's; below 0 and above 1 is off the map. N goes row by row."""
        size = tuple(query.shape[1:3])
        if self.stride > min(size):
            raise ValueError(f"stride must be at most the map's size {size}, got {self.stride}")
        grid = self._convolve(query)  # (B, H / r, W / r, G, C / G)
        offset = self.linear(F.gelu(self.norm(grid))).flip(-1)  # the authors' order is (y, x)
        offset = offset.to(real_dtype(offset))
        height, width = offset.shape[1:3]
        size = numbers((width, height), like=offset)
        like = {"dtype": offset.dtype, "device": offset.device}
        y, x = (torch.arange(n, **like) + 0.5 for n in (height, width))
        centres = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[:, :, None]
        places = (centres + self.offset_range / 2 * offset.tanh()) / size
        return places.flatten(1, 2).transpose(1, 2)

    def _convolve(self, query: Tensor) -> Tensor:
        """The depthwise convolution, whose weights all groups share."""
        G = self.num_groups
        c = self.convolution
        weight, bias = c.weight.repeat(G, 1, 1, 1), c.bias.repeat(G)
        channels = query.permute(0, 3, 1, 2)
        grid = F.conv2d(channels, weight, bias, c.stride, c.padding, groups=len(weight))
        return grid.permute(0, 2, 3, 1).unflatten(-1, (G, -1))


def sample(x: Tensor, places: Tensor) -> Tensor:
    """Eq. 8: a map's features at places, each group of channels at its own.

    x: (B, H, W, C). places: of `KeyPlaces`. Returns (B, N, C). It is Deformable DETR's operator,
    with groups for heads and one point of weight one.
    """
    B, H, W, C = x.shape
    G, N = places.shape[1:3]
    size = numbers((W, H), like=places)
    # from "0 and 1 are the first and the last pixel's centres" (align_corners=True) to "are edges"
    locations = (places * (size - 1) + 0.5) / size
    locations = locations.transpose(1, 2)[:, :, :, None, None]  # (B, N, G, 1, 1, 2)
    weights = locations.new_ones(B, N, G, 1, 1)
    return ms_deform_attn(x.reshape(B, H * W, G, C // G), [(H, W)], locations, weights)


class PositionBias(nn.Module):
    """How much a head likes a key for where it lies, as seen from the query (section 3.2,
    "Deformable relative position bias"): a table, read between its cells.

    size: (H, W) of the map that the table is made for. It has 2H - 1 by 2W - 1 cells, one for each
    difference of two rows and two columns. A difference is counted as a part of the map, from -1 to
    1, and the table is read at that part of it, so that a map may have any size.

    The authors' code has one size, and for another makes a larger table out of this one first. Made
    by linear interpolation, with corners on corners, and then read between cells once more, it says
    the same, but for bends between its cells; and exactly the same where H - 1 and W - 1 have
    become whole multiples. Of a table of 14 x 14 whose cells are like their neighbours (noise under
    a Gaussian of one cell), on a map of 50 x 67, the difference is 1 % of the table's standard
    deviation (root mean square). By cubic interpolation with edges on edges, as the authors have
    it, it is 18 %.
    """

    def __init__(self, num_heads: int, size: tuple[int, int]) -> None:
        super().__init__()
        height, width = size
        if min(size) < 1:
            raise ValueError(f"size must be at least 1 x 1, got {height} x {width}")
        self.table = nn.Parameter(torch.empty(num_heads, 2 * height - 1, 2 * width - 1))
        nn.init.trunc_normal_(self.table, std=0.01)

    def forward(self, places: Tensor, rows: tuple[Size, Size, Size, Size]) -> Tensor:
        """For the queries of the rows `top` to `bottom` of a map, (B * M, rows * W, N).

        places: of `KeyPlaces`. rows: top, bottom, and the map's H and W.
        """
        top, bottom, height, width = rows
        B, G, N, _ = places.shape
        like = {"dtype": places.dtype, "device": places.device}
        y = (torch.arange(top, bottom, **like) + 0.5) / height
        x = (torch.arange(width, **like) + 0.5) / width
        # from key to query, in [-1, 1] where both are on the map
        key_x, key_y = places.unsqueeze(-3).unbind(-1)  # (B, G, 1, N)
        dx, dy = x[:, None] - key_x, y[:, None] - key_y
        shape = B, G, len(y), width, N
        grid = torch.stack([dx[:, :, None].expand(shape), dy[:, :, :, None].expand(shape)], -1)
        table = self.table.unflatten(0, (G, -1)).expand(B, -1, -1, -1, -1)  # M / G to a group
        bias = F.grid_sample(
            table.flatten(0, 1).to(grid.dtype), grid.flatten(2, 3).flatten(0, 1), align_corners=True
        )
        return bias.flatten(0, 1)
