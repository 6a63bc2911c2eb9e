"""Deformable attention whose weights look at what is sampled (Li et al., 2023). Chapter "Fewer
tokens"."""

import torch
from torch import Tensor, nn

from deformable_detr.layers.attention import check_queries, check_tokens, on_levels, star
from deformable_detr.layers.dense_attention import check_heads
from deformable_detr.ops import (
    SpatialShapes,
    check_spatial_shapes,
    ms_deform_attn,
    sampled_products,
)
from deformable_detr.ops.sizes import Shapes, numbers
from deformable_detr.structures import Queries, Tokens


class KeyAwareAttention(nn.Module):
    """Key-aware deformable attention (Lite DETR, section 3.4): a query's K points on L levels are
    keys, and its weights the softmax of its dot products with them, over the root of D.

    Keys are the projected values, as in the authors' code, whose names the parameters have. A
    sample outside, or of padding, is a key of zeros: it takes part in the softmax. The operator
    runs twice, for the products and for the sum; no tensor holds all samples.
    """

    def __init__(
        self, embed_dim: int = 256, num_levels: int = 4, num_heads: int = 8, num_points: int = 4
    ) -> None:
        super().__init__()
        check_heads(embed_dim, num_heads)
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.num_levels, self.num_points = num_levels, num_points
        self.sampling_offsets = nn.Linear(embed_dim, num_heads * num_levels * num_points * 2)
        self.query_proj = nn.Linear(embed_dim, embed_dim)
        self.value_proj = nn.Linear(embed_dim, embed_dim)
        self.output_proj = nn.Linear(embed_dim, embed_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Offsets as those of deformable attention; matrices drawn."""
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            offsets = star(self.num_heads, self.num_levels, self.num_points)
            self.sampling_offsets.bias.copy_(offsets.flatten())
        for projection in (self.query_proj, self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def attend(self, queries: Queries, memory: Tokens) -> Tensor:
        """What a layer of encoder or decoder calls, as `MSDeformAttn.attend`: (B, Q, C)."""
        return self(
            queries.content + queries.position,
            on_levels(queries.references, memory),
            memory.features,
            memory.spatial_shapes,
            memory.padding_mask,
        )

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        spatial_shapes: SpatialShapes,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Arguments and errors as `MSDeformAttn.forward` has them. Returns (B, Q, C)."""
        shapes = check_spatial_shapes(spatial_shapes)
        check_queries(query, reference_points, shapes, self.embed_dim, self.num_levels)
        check_tokens(input_flatten, padding_mask, query.shape[0], self.embed_dim)
        value = self.value_proj(input_flatten)
        if padding_mask is not None:
            value = value.masked_fill(padding_mask.unsqueeze(-1), 0)
        value = value.unflatten(-1, (self.num_heads, -1))  # (B, S, M, D)
        places = self.places(query, reference_points, shapes)
        asked = self.query_proj(query) * value.shape[-1] ** -0.5
        products = sampled_products(asked, value, shapes, places)  # (B, Q, M, L, K)
        weights = products.flatten(3).softmax(-1).view_as(products)
        return self.output_proj(ms_deform_attn(value, shapes, places, weights))

    def places(self, query: Tensor, reference_points: Tensor, shapes: Shapes) -> Tensor:
        """Where these queries look, (B, Q, M, L, K, 2): offsets are in pixels of each level, or,
        from boxes, in units of which K reach from the centre to the edge."""
        if reference_points.dtype != torch.float64:  # autocast must not round coordinates
            reference_points = reference_points.float()
        axes = self.num_heads, self.num_levels, self.num_points, 2
        offsets = self.sampling_offsets(query).unflatten(-1, axes).to(reference_points.dtype)
        references = reference_points[:, :, None, :, None]  # (B, Q, 1, L, 1, 2 or 4)
        centre, sides = references[..., :2], references[..., 2:]
        if sides.shape[-1]:
            return centre + offsets * sides / (2 * self.num_points)
        size = numbers([n for height, width in shapes for n in (width, height)], like=offsets)
        return centre + offsets / size.view(self.num_levels, 1, 2)
