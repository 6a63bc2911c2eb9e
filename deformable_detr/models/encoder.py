"""The encoder: layers in which tokens ask other tokens. Chapter pixels_to_boxes builds it."""

import dataclasses

from torch import Tensor, nn

from deformable_detr.layers.feed_forward import Dropout, FeedForward
from deformable_detr.layers.stack import Stack
from deformable_detr.models.tokens import token_centres
from deformable_detr.structures import Queries, Tokens


class EncoderLayer(nn.Module):
    """Queries, usually all tokens themselves, attend to tokens.

    attention: a module whose `attend(queries, memory)` returns (B, Q, C).
    """

    def __init__(self, attention: nn.Module, embed_dim: int, ffn_dim: int, dropout: float) -> None:
        super().__init__()
        self.attention = attention
        self.norm = nn.LayerNorm(embed_dim)
        self.dropout = Dropout(dropout)
        self.ffn = FeedForward(embed_dim, ffn_dim, dropout)

    def forward(self, queries: Queries, memory: Tokens) -> Tensor:
        """The updated content of the queries, (B, Q, C)."""
        update = self.attention.attend(queries, memory)
        return self.feed(self.norm(queries.content + self.dropout(update)), memory)

    def feed(self, content: Tensor, memory: Tokens) -> Tensor:
        """The layer's second half, of each query by itself: (B, Q, C) to (B, Q, C)."""
        return self.ffn(content)


class Encoder(Stack):
    """A stack of layers in which every token asks around its own place (section 4.1), or only
    those tokens that are chosen."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(
        self,
        tokens: Tokens,
        chosen: list[Tensor | None] | None = None,
        kept: Tensor | None = None,
        every_layer: bool = False,
    ) -> Tokens | list[Tokens]:
        """The memory: the same tokens with encoded features; with every_layer, after each layer.

        chosen: for each layer the tokens that it updates, (B, N) int64, none twice; None, for a
        layer or for all of them, is every token. All can be attended to. kept: (B, N) bool, False
        where an image has chosen fewer, and the token stays as it was.
        """
        queries = Queries(
            tokens.features,
            tokens.position,
            token_centres(tokens.spatial_shapes, tokens.valid_ratios),
        )
        memory, memories = tokens, []
        for layer, places in zip(self.layers, chosen or [None] * len(self.layers), strict=True):
            queries = dataclasses.replace(queries, content=memory.features)
            if places is None:
                features = self.run(layer, queries, memory)
            else:
                picked = pick(queries, places)
                update = self.run(layer, picked, memory)
                if kept is not None:
                    update = update.where(kept.unsqueeze(-1), picked.content)
                features = memory.features.scatter(1, _wide(places, update), update)
            memory = dataclasses.replace(memory, features=features)
            memories.append(memory)
        return memories if every_layer else memory


def pick(queries: Queries, places: Tensor) -> Queries:
    """Some of the queries; places: (B, N) int64."""
    parts = queries.content, queries.position, queries.references
    return Queries(*(rows(x, places) for x in parts))


def rows(x: Tensor, places: Tensor) -> Tensor:
    """Those rows (B, N, C) of x, (B, S, C), that places, (B, N) int64, name."""
    return x.gather(1, _wide(places, x))


def _wide(places: Tensor, like: Tensor) -> Tensor:
    return places.unsqueeze(-1).expand(-1, -1, like.shape[-1])
