"""An encoder that updates the many fine tokens seldom and the few coarse ones in every layer (Li et
al., 2023). Chapter "Fewer tokens"."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deformable_detr.layers.feed_forward import FeedForward
from deformable_detr.layers.key_aware_attention import KeyAwareAttention
from deformable_detr.models.base import Sets
from deformable_detr.models.deformable import DeformableDetector
from deformable_detr.models.encoder import EncoderLayer
from deformable_detr.options import option
from deformable_detr.structures import Tokens


@dataclass(frozen=True)
class LiteOptions:
    """Which tokens are updated when, and how, beside the other options of a configuration; the
    defaults are those of the authors' best model, H3L1-(2+1)x3."""

    fine_levels: int = option(
        1, "levels, the first, whose tokens are fine; the others every layer of the encoder updates"
    )
    block_layers: int = option(
        2, "layers of a block, the last of which updates all tokens; 1 is the dense encoder"
    )
    key_aware: bool = option(True, "weights look at what is sampled; else they are linear")
    small_ffn: bool = option(True, "fine tokens have a feed-forward of their own, embed_dim wide")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.fine_levels < self.num_levels:
            given = f"got fine_levels={self.fine_levels} of num_levels={self.num_levels}"
            raise ValueError(f"at least one level must be coarse, {given}")


class WholeLayer(EncoderLayer):
    """A layer that updates all tokens, the fine ones by a small feed-forward of their own.

    fine_levels: how many of the levels, the first, are fine.
    """

    def __init__(
        self, attention: nn.Module, embed_dim: int, ffn_dim: int, dropout: float, fine_levels: int
    ) -> None:
        super().__init__(attention, embed_dim, ffn_dim, dropout)
        self.small_ffn = FeedForward(embed_dim, embed_dim, dropout)
        self.fine_levels = fine_levels

    def feed(self, content: Tensor, memory: Tokens) -> Tensor:
        """(B, S, C) to the same."""
        fine = count_fine(memory, self.fine_levels)
        return torch.cat([self.small_ffn(content[:, :fine]), self.ffn(content[:, fine:])], 1)


class LiteEncoded(DeformableDetector):
    """A detector whose encoder interleaves its updates: each layer of a block updates the coarse
    tokens, and the last of them the fine ones too. All can always be attended to."""

    config: LiteOptions

    def updates_all(self, index: int) -> bool:
        """Whether the encoder's layer of this number updates all tokens; the last one does."""
        c = self.config
        return (index + 1) % c.block_layers == 0 or index + 1 == c.encoder_layers

    def attention(self) -> nn.Module:
        """In encoder and decoder."""
        c = self.config
        if not c.key_aware:
            return super().attention()
        return KeyAwareAttention(c.embed_dim, c.num_levels, c.num_heads, c.num_points)

    def encoder_layer(self, index: int) -> nn.Module:
        """One that updates all tokens may have two feed-forward parts."""
        if not (self.config.small_ffn and self.updates_all(index)):
            return super().encoder_layer(index)
        return WholeLayer(self.attention(), *self.layer_sizes(), self.config.fine_levels)

    def encode(self, tokens: Tokens) -> tuple[Tokens, Sets]:
        """The memory."""
        B, S, _ = tokens.features.shape
        fine = count_fine(tokens, self.config.fine_levels)
        coarse = torch.arange(fine, S, device=tokens.features.device).expand(B, -1)
        layers = range(self.config.encoder_layers)
        return self.encoder(tokens, [None if self.updates_all(i) else coarse for i in layers]), {}


def count_fine(tokens: Tokens, fine_levels: int) -> int:
    """How many tokens, the first, are on the fine levels."""
    return sum(height * width for height, width in tokens.spatial_shapes[:fine_levels])
