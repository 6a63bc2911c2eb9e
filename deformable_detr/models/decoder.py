"""The decoder: object queries ask each other and the memory, and find boxes.
Chapters pixels_to_boxes and refinement."""

import dataclasses
from collections.abc import Sequence

from torch import Tensor, nn

from deformable_detr.layers.feed_forward import Dropout, FeedForward
from deformable_detr.layers.stack import Stack
from deformable_detr.models.heads import in_full, move
from deformable_detr.structures import Queries, Tokens

Decoded = tuple[Tensor, Tensor, Tensor | None]  # content, boxes, and the references of a layer


class DecoderLayer(nn.Module):
    """Queries attend to each other, then each to the memory.

    self_attention: a module whose `mix(queries)` returns (B, Q, C). cross_attention: one whose
    `attend(queries, memory)` does.
    """

    def __init__(
        self,
        self_attention: nn.Module,
        cross_attention: nn.Module,
        embed_dim: int,
        ffn_dim: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.self_attention = self_attention
        self.self_norm = nn.LayerNorm(embed_dim)
        self.cross_attention = cross_attention
        self.cross_norm = nn.LayerNorm(embed_dim)
        self.dropout = Dropout(dropout)
        self.ffn = FeedForward(embed_dim, ffn_dim, dropout)

    def forward(self, queries: Queries, memory: Tokens) -> Tensor:
        """The updated content of the queries, (B, Q, C)."""
        content = queries.content + self.dropout(self.self_attention.mix(queries))
        queries = dataclasses.replace(queries, content=self.self_norm(content))
        content = queries.content + self.dropout(self.cross_attention.attend(queries, memory))
        return self.ffn(self.cross_norm(content))


class Decoder(Stack):
    """A stack of decoder layers, whose references stay where they are.

    norm: of each layer's output before the heads, where a model has one. A member of the family
    changes two methods, `position` and `next_references`, and `eps`, how near to 0 and 1 references
    come when boxes are made from them.
    """

    eps = 1e-5

    def __init__(self, layers: list[nn.Module], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm or nn.Identity()

    def forward(
        self, queries: Queries, memory: Tokens, box_heads: Sequence[nn.Module]
    ) -> list[Decoded]:
        """For every layer: its queries' content (B, Q, C), its boxes (B, Q, 4) and the references
        (B, Q, 2 or 4) that it looked around. box_heads: one for each layer."""
        results = []
        starts = queries.references
        for index, (layer, box_head) in enumerate(zip(self.layers, box_heads, strict=True)):
            queries = dataclasses.replace(queries, position=self.position(queries, memory, index))
            queries = dataclasses.replace(queries, content=self.run(layer, queries, memory))
            content = self.norm(queries.content)
            delta = in_full(box_head, content)
            boxes = move(starts, delta, self.eps)
            results.append((content, boxes, queries.references))
            references, starts = self.next_references(queries, delta, boxes, box_head)
            queries = dataclasses.replace(queries, references=references)
        return results

    def position(self, queries: Queries, memory: Tokens, layer: int) -> Tensor:
        """The position (B, Q, C) that a layer adds to its queries."""
        return queries.position

    def next_references(
        self, queries: Queries, delta: Tensor, boxes: Tensor, box_head: nn.Module
    ) -> tuple[Tensor | None, Tensor | None]:
        """What the next layer looks around, and what its boxes start from; usually the same.

        queries: as they left this layer, before the norm, with the references that it looked
        around. delta: what its box_head said. boxes: what came of that, (B, Q, 4).
        """
        return queries.references, queries.references


class RefiningDecoder(Decoder):
    """Iterative box refinement: each layer starts from the last one's boxes, through which no
    gradient flows (A.4)."""

    def next_references(
        self, queries: Queries, delta: Tensor, boxes: Tensor, box_head: nn.Module
    ) -> tuple[Tensor, Tensor]:
        """The boxes, cut from the graph, for both."""
        boxes = boxes.detach()
        return boxes, boxes
