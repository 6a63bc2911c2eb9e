"""The deformable encoder, the decoder with iterative refinement, the first stage's proposals."""

import math

import torch
from torch import Tensor, nn

from deformable_detr.boxes import inverse_sigmoid
from deformable_detr.layers.attention import MSDeformAttn
from deformable_detr.layers.feed_forward import Dropout, FeedForward
from deformable_detr.layers.position import sine_embedding
from deformable_detr.layers.stack import Stack
from deformable_detr.structures import Tokens

Shapes = list[tuple[int, int]]


class EncoderLayer(nn.Module):
    """Queries, usually all tokens themselves, sample the tokens around them."""

    def __init__(
        self, embed_dim: int, levels: int, heads: int, points: int, ffn_dim: int, dropout: float
    ) -> None:
        super().__init__()
        self.attention = MSDeformAttn(embed_dim, levels, heads, points)
        self.norm = nn.LayerNorm(embed_dim)
        self.dropout = Dropout(dropout)
        self.ffn = FeedForward(embed_dim, ffn_dim, dropout)

    def forward(
        self,
        queries: Tensor,
        query_position: Tensor,
        references: Tensor,
        features: Tensor,
        spatial_shapes: Shapes,
        padding_mask: Tensor | None,
    ) -> Tensor:
        """queries, query_position: (B, Q, C). references: (B, Q, L, 2). features: (B, S, C), what
        is sampled. Returns the updated queries, (B, Q, C)."""
        update = self.attention(
            queries + query_position, references, features, spatial_shapes, padding_mask
        )
        return self.ffn(self.norm(queries + self.dropout(update)))


class DeformableEncoder(Stack):
    """A stack of layers in which every token asks around its own place (section 4.1)."""

    def __init__(self, num_layers: int, *layer: int | float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(*layer) for _ in range(num_layers))

    def forward(self, tokens: Tokens) -> Tensor:
        """Returns the encoded features, the memory, (B, S, C)."""
        references = token_centres(tokens.spatial_shapes, tokens.valid_ratios)
        references = references[:, :, None] * tokens.valid_ratios[:, None]  # (B, S, L, 2)
        memory = tokens.features
        for layer in self.layers:
            memory = self.run(
                layer,
                memory,
                tokens.position,
                references,
                memory,
                tokens.spatial_shapes,
                tokens.padding_mask,
            )
        return memory


def token_centres(spatial_shapes: Shapes, valid_ratios: Tensor) -> Tensor:
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


class DecoderLayer(nn.Module):
    """Queries attend to each other, then each samples the memory around its reference."""

    def __init__(
        self, embed_dim: int, levels: int, heads: int, points: int, ffn_dim: int, dropout: float
    ) -> None:
        super().__init__()
        self.self_attention = nn.MultiheadAttention(
            embed_dim, heads, dropout=dropout, batch_first=True
        )
        self.self_norm = nn.LayerNorm(embed_dim)
        self.cross_attention = MSDeformAttn(embed_dim, levels, heads, points)
        self.cross_norm = nn.LayerNorm(embed_dim)
        self.dropout = Dropout(dropout)
        self.ffn = FeedForward(embed_dim, ffn_dim, dropout)

    def forward(
        self,
        queries: Tensor,
        query_position: Tensor,
        references: Tensor,
        memory: Tensor,
        spatial_shapes: Shapes,
        padding_mask: Tensor | None,
        self_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """queries, query_position: (B, Q, C). references: (B, Q, L, 2 or 4). memory: (B, S, C).
        self_attention_mask: (Q, Q), True where a query may not look. Returns (B, Q, C)."""
        located = queries + query_position
        update, _ = self.self_attention(
            located, located, queries, attn_mask=self_attention_mask, need_weights=False
        )
        queries = self.self_norm(queries + self.dropout(update))
        update = self.cross_attention(
            queries + query_position, references, memory, spatial_shapes, padding_mask
        )
        queries = self.cross_norm(queries + self.dropout(update))
        return self.ffn(queries)


class DeformableDecoder(Stack):
    """A stack of decoder layers; with refinement each layer starts from the last one's boxes."""

    def __init__(self, num_layers: int, *layer: int | float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(*layer) for _ in range(num_layers))

    def forward(
        self,
        queries: Tensor,
        query_position: Tensor,
        references: Tensor,
        memory: Tensor,
        tokens: Tokens,
        box_heads: list[nn.Module],
        refine: bool = False,
        self_attention_mask: Tensor | None = None,
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For every layer: its queries (B, Q, C), its boxes (B, Q, 4) and the references (B, Q, 2
        or 4) that it started from.

        references: (B, Q, 2) as (x, y) or (B, Q, 4) as cxcywh, relative to the image without its
        padding. box_heads: one for each layer, (B, Q, C) to (B, Q, 4). With refine, a layer's
        references are the boxes of the layer before, through which no gradient flows (A.4).
        """
        results = []
        for layer, box_head in zip(self.layers, box_heads, strict=True):
            ratios = tokens.valid_ratios.repeat(1, 1, references.shape[-1] // 2)  # (B, L, 2 or 4)
            queries = self.run(
                layer,
                queries,
                query_position,
                references[:, :, None] * ratios[:, None],
                memory,
                tokens.spatial_shapes,
                tokens.padding_mask,
                self_attention_mask,
            )
            boxes = move(references, in_full(box_head, queries))
            results.append((queries, boxes, references))
            if refine:
                references = boxes.detach()
        return results


def in_full(head: nn.Module, x: Tensor) -> Tensor:
    """What a head makes of x without autocast: coordinates need more than bfloat16's 8 bits, which
    are four pixels in a thousand."""
    if not torch.is_autocast_enabled(x.device.type):
        return head(x)
    with torch.autocast(x.device.type, enabled=False):
        return head(x.float())


def move(references: Tensor, delta: Tensor) -> Tensor:
    """Boxes from references and what a head predicts, added before the sigmoid (A.3, A.4).

    references: (..., 2) or (..., 4) in [0, 1]. delta: (..., 4). Returns (..., 4) cxcywh in (0, 1).
    """
    start = inverse_sigmoid(references.to(delta))
    if references.shape[-1] == 2:  # a point has no size to start from
        start = torch.cat([start, torch.zeros_like(start)], -1)
    return (start + delta).sigmoid()


class FirstStage(nn.Module):
    """Every token of the memory proposes a box; the best become the queries (Appendix A.4)."""

    def __init__(self, embed_dim: int, anchor_size: float = 0.05) -> None:
        super().__init__()
        self.embed_dim, self.anchor_size = embed_dim, anchor_size
        self.output = nn.Linear(embed_dim, embed_dim)
        self.output_norm = nn.LayerNorm(embed_dim)
        self.query = nn.Linear(2 * embed_dim, 2 * embed_dim)
        self.query_norm = nn.LayerNorm(2 * embed_dim)

    def propose(
        self, memory: Tensor, tokens: Tokens, class_head: nn.Module, box_head: nn.Module
    ) -> tuple[Tensor, Tensor]:
        """The class logits (B, S, classes) and boxes (B, S, 4) cxcywh of all tokens.

        A token that is padding, or whose anchor comes within 1 % of the border, is blanked: its
        box is (1, 1, 1, 1).
        """
        anchors, usable = token_anchors(tokens, self.anchor_size)
        features = memory.masked_fill(~usable.unsqueeze(-1), 0)
        features = self.output_norm(self.output(features))
        start = (anchors / (1 - anchors)).log()
        start = start.masked_fill(~usable.unsqueeze(-1), torch.inf)
        return class_head(features), (in_full(box_head, features) + start).sigmoid()

    def select(self, logits: Tensor, boxes: Tensor, num_queries: int) -> tuple[Tensor, ...]:
        """The boxes with the highest logit of class 0, and queries made from them.

        Q is num_queries, or the number of tokens where a small image has fewer.
        Returns queries and their position, (B, Q, C) each, and the boxes, (B, Q, 4), detached.
        """
        best = logits[..., 0].topk(min(num_queries, logits.shape[1]), dim=1).indices
        references = boxes.detach().gather(1, best.unsqueeze(-1).expand(-1, -1, 4))
        waves = sine_embedding(references * 2 * math.pi, self.embed_dim // 2)  # (B, Q, 2 * C)
        waves = waves.to(self.query.weight.dtype)
        position, queries = self.query_norm(self.query(waves)).chunk(2, dim=-1)
        return queries, position, references


def token_anchors(tokens: Tokens, size: float = 0.05) -> tuple[Tensor, Tensor]:
    """The box that each token starts from: its centre, and size * 2^l as its sides on level l.

    Returns (B, S, 4) cxcywh relative to the image without its padding, and (B, S), True where the
    token is no padding and all four numbers lie in (0.01, 0.99).
    """
    centres = token_centres(tokens.spatial_shapes, tokens.valid_ratios)
    sizes = [
        centres.new_full((height * width, 2), size * 2**level)
        for level, (height, width) in enumerate(tokens.spatial_shapes)
    ]
    anchors = torch.cat([centres, torch.cat(sizes).expand_as(centres)], -1)
    inside = ((anchors > 0.01) & (anchors < 0.99)).all(-1)
    return anchors, inside & ~tokens.padding_mask
