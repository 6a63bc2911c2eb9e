"""Deformable attention as modules: one scale (Eq. 2, chapter deformable_attention) and many (Eq.
3, chapter many_scales)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deformable_detr.layers.dense_attention import check_heads
from deformable_detr.ops import ms_deform_attn
from deformable_detr.ops.sizes import (
    Shapes,
    SpatialShapes,
    check_spatial_shapes,
    numbers,
    quietly,
)
from deformable_detr.structures import Queries, Tokens


@dataclass
class Sampling:
    """Where an attention module looked, and how much each sample counted.

    locations: (B, Q, M, L, K, 2) as (x, y), normalised to the (padded) maps; may leave [0, 1].
    weights: (B, Q, M, L, K), non-negative, summing to one over the last two axes together.
    spatial_shapes: the L sizes (H, W) of the maps; 0-d tensors where they are not known yet.
    """

    locations: Tensor
    weights: Tensor
    spatial_shapes: Shapes


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention, Eq. 3 and Appendix A.4 of "Deformable DETR".

    Each query asks for K points on each of L feature levels, per head; offsets are linear in the
    query, and weights are the softmax of what is, so there are no keys. Parameter names and
    initialisation are the official ones, so published weights load.
    """

    def __init__(
        self, embed_dim: int = 256, num_levels: int = 4, num_heads: int = 8, num_points: int = 4
    ) -> None:
        super().__init__()
        if min(embed_dim, num_levels, num_heads, num_points) < 1:
            raise ValueError(
                "embed_dim, num_levels, num_heads and num_points must be at least 1, "
                f"got {embed_dim}, {num_levels}, {num_heads} and {num_points}"
            )
        check_heads(embed_dim, num_heads)
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.num_levels, self.num_points = num_levels, num_points
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(embed_dim, samples * 2)
        self.attention_weights = nn.Linear(embed_dim, samples)
        self.value_proj = nn.Linear(embed_dim, embed_dim)
        self.output_proj = nn.Linear(embed_dim, embed_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform weights, and offsets that point away from the reference: head m looks in
        direction 2*pi*m/M, its point k at a distance of k pixels (Appendix A.4)."""
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            offsets = star(self.num_heads, self.num_levels, self.num_points)
            self.sampling_offsets.bias.copy_(offsets.flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def sampling(
        self, query: Tensor, reference_points: Tensor, spatial_shapes: SpatialShapes
    ) -> Sampling:
        """Where these queries look, and with what weights; arguments as in `forward`."""
        shapes = check_spatial_shapes(spatial_shapes)
        check_queries(query, reference_points, shapes, self.embed_dim, self.num_levels)
        if reference_points.dtype != torch.float64:  # autocast must not round coordinates
            reference_points = reference_points.float()
        B, Q, _ = query.shape
        M, L, K = self.num_heads, self.num_levels, self.num_points
        reference_points = reference_points.expand(-1, -1, L, -1)
        offsets = self.sampling_offsets(query).view(B, Q, M, L, K, 2)
        logits = self.attention_weights(query).view(B, Q, M, L * K)
        weights = logits.softmax(-1).view(B, Q, M, L, K)  # one softmax over all levels
        offsets = offsets.to(reference_points.dtype)
        if reference_points.shape[-1] == 2:  # offsets in pixels of each level
            pairs = [n for height, width in shapes for n in (width, height)]
            size = numbers(pairs, like=offsets).view(L, 2)
            # flat rows of L * K * 2 numbers: ten times as fast as many small axes
            size = size.unsqueeze(1).expand(-1, K, -1).flatten()
            centre = reference_points.unsqueeze(3).expand(-1, -1, -1, K, -1).flatten(2).unsqueeze(2)
            locations = (centre + offsets.flatten(3) / size).view(B, Q, M, L, K, 2)
        else:  # offsets in units of the box: K of them reach from the centre to its edge
            centre, box_size = reference_points[:, :, None, :, None].split(2, -1)
            locations = centre + offsets / K * box_size * 0.5
        return Sampling(locations, weights, shapes)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        spatial_shapes: SpatialShapes,
        padding_mask: Tensor | None = None,
        return_sampling: bool = False,
    ) -> Tensor | tuple[Tensor, Sampling]:
        """Attend from Q queries to the samples that they ask for.

        query: (B, Q, C), content plus position. reference_points: (B, Q, L, 2) as (x, y) or
        (B, Q, L, 4) as (cx, cy, w, h), normalised to each padded level; one in place of L is for
        all levels. input_flatten: (B, S, C), the levels one after another. spatial_shapes: L pairs
        (H, W), or a tensor as in `ms_deform_attn`. padding_mask: (B, S), True on padding, whose
        values count as zero. Returns (B, Q, C); with return_sampling also the Sampling. Raises
        ValueError on shapes that do not fit, TypeError on other dtypes.
        """
        sampling = self.sampling(query, reference_points, spatial_shapes)
        return self._attend(sampling, input_flatten, padding_mask, return_sampling)

    def attend(
        self, queries: Queries, memory: Tokens, return_sampling: bool = False
    ) -> Tensor | tuple[Tensor, Sampling]:
        """What a layer of encoder or decoder calls: `forward`, with references (B, Q, 2 or 4) that
        are relative to the images without their padding. Returns (B, Q, C)."""
        return self(
            queries.content + queries.position,
            on_levels(queries.references, memory),
            memory.features,
            memory.spatial_shapes,
            memory.padding_mask,
            return_sampling,
        )

    def _attend(
        self,
        sampling: Sampling,
        input_flatten: Tensor,
        padding_mask: Tensor | None,
        return_sampling: bool,
    ) -> Tensor | tuple[Tensor, Sampling]:
        check_tokens(input_flatten, padding_mask, sampling.locations.shape[0], self.embed_dim)
        value = self.value_proj(input_flatten)
        if padding_mask is not None:
            value = value.masked_fill(padding_mask.unsqueeze(-1), 0)
        B, S, _ = value.shape
        value = value.view(B, S, self.num_heads, self.embed_dim // self.num_heads)
        output = ms_deform_attn(
            value, sampling.spatial_shapes, sampling.locations, sampling.weights
        )
        output = self.output_proj(output)
        return (output, sampling) if return_sampling else output


@quietly
def check_queries(
    query: Tensor, reference_points: Tensor, shapes: Shapes, embed_dim: int, num_levels: int
) -> None:
    """ValueError or TypeError unless these are as `MSDeformAttn.forward` has them."""
    if query.ndim != 3 or query.shape[-1] != embed_dim:
        raise ValueError(f"query must be (B, Q, C={embed_dim}), got {tuple(query.shape)}")
    if len(shapes) != num_levels:
        raise ValueError(f"expected {num_levels} levels, got spatial_shapes {shapes}")
    B, Q, _ = query.shape
    given = tuple(reference_points.shape)
    fits = len(given) == 4 and given[:2] == (B, Q) and given[3] in (2, 4)
    if not fits or given[2] not in (1, num_levels):
        raise ValueError(
            f"reference_points must be (B={B}, Q={Q}, L={num_levels} or 1, 2 or 4), got {given}"
        )
    if not reference_points.is_floating_point():
        raise TypeError(f"reference_points must be floating, got {reference_points.dtype}")
    if (reference_points.dtype == torch.float64) != (query.dtype == torch.float64):
        raise TypeError(
            "query and reference_points must be float64 both or neither, got "
            f"{query.dtype} and {reference_points.dtype}"
        )


@quietly
def check_tokens(input_flatten: Tensor, padding_mask: Tensor | None, B: int, C: int) -> None:
    """ValueError unless these are as `MSDeformAttn.forward` has them."""
    if input_flatten.ndim != 3 or input_flatten.shape[::2] != (B, C):
        given = tuple(input_flatten.shape)
        raise ValueError(f"input_flatten must be (B={B}, S, C={C}), got {given}")
    S = input_flatten.shape[1]
    if padding_mask is None:
        return
    if padding_mask.shape != (B, S) or padding_mask.dtype != torch.bool:
        given = f"{tuple(padding_mask.shape)} of {padding_mask.dtype}"
        raise ValueError(f"padding_mask must be (B={B}, S={S}) of bool, got {given}")


def on_levels(references: Tensor, memory: Tokens) -> Tensor:
    """References (B, Q, 2 or 4), relative to the images without their padding, as (B, Q, L, 2 or
    4), relative to each padded level."""
    ratios = memory.valid_ratios.repeat(1, 1, references.shape[-1] // 2)  # (B, L, 2 or 4)
    return references[:, :, None] * ratios[:, None]


def star(num_heads: int, num_levels: int, num_points: int) -> Tensor:
    """The offsets (M, L, K, 2) that attention starts from, in pixels; see `MSDeformAttn`."""
    angle = torch.arange(num_heads) * (2 * math.pi / num_heads)
    direction = torch.stack([angle.cos(), angle.sin()], -1)  # (M, 2) as (x, y)
    direction = direction / direction.abs().amax(-1, keepdim=True)  # onto a square
    distance = torch.arange(1, num_points + 1)
    offsets = direction[:, None, None] * distance[:, None]  # (M, 1, K, 2)
    return offsets.expand(-1, num_levels, -1, -1)


class DeformAttn(MSDeformAttn):
    """Deformable attention on one feature map, Eq. 2 of "Deformable DETR"."""

    def __init__(self, embed_dim: int = 256, num_heads: int = 8, num_points: int = 4) -> None:
        super().__init__(embed_dim, 1, num_heads, num_points)

    def sampling(
        self, query: Tensor, reference_points: Tensor, spatial_shape: tuple[int, int]
    ) -> Sampling:
        """Where these queries look, and with what weights; arguments as in `forward`."""
        if reference_points.ndim != 3:
            given = tuple(reference_points.shape)
            raise ValueError(f"reference_points must be (B, Q, 2 or 4), got {given}")
        return super().sampling(query, reference_points.unsqueeze(2), [spatial_shape])

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        feature: Tensor,
        spatial_shape: tuple[int, int],
        padding_mask: Tensor | None = None,
        return_sampling: bool = False,
    ) -> Tensor | tuple[Tensor, Sampling]:
        """Attend from Q queries to K points per head of one map.

        query: (B, Q, C). reference_points: (B, Q, 2 or 4), normalised. feature: (B, H*W, C).
        spatial_shape: (H, W). padding_mask: (B, H*W), True on padding. Returns (B, Q, C); with
        return_sampling also the Sampling, of which L = 1.
        """
        sampling = self.sampling(query, reference_points, spatial_shape)
        return self._attend(sampling, feature, padding_mask, return_sampling)
