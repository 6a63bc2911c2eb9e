"""Queries whose position is a box: its sine code, made anew for the box that each layer looks
around (DAB-DETR, Liu et al., 2022). Chapter "Denoising"."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deformable_detr.layers.position import sine_embedding
from deformable_detr.models.base import Sets, for_each_image
from deformable_detr.models.decoder import Decoder, RefiningDecoder
from deformable_detr.models.deformable import DeformableConfig, DeformableDetector
from deformable_detr.models.heads import in_full, move
from deformable_detr.options import option, with_default
from deformable_detr.structures import Queries, Target, Tokens


@dataclass(frozen=True)
class AnchorConfig(DeformableConfig):
    """What decides the shape of a detector whose queries are boxes."""

    ffn_dim: int = with_default(DeformableConfig, "ffn_dim", 2048)
    dropout: float = with_default(DeformableConfig, "dropout", 0.0)
    padded_codes: bool = option(
        False,
        "codes of boxes relative to the image with its padding, as in the official code, so that "
        "outputs depend on it",
    )


class AnchorDecoder(RefiningDecoder):
    """A refining decoder that makes positions from the boxes that a layer looks around."""

    eps = 1e-3  # the official codes'

    def __init__(
        self,
        layers: list[nn.Module],
        embed_dim: int,
        norm: nn.Module | None = None,
        padded_codes: bool = False,
    ) -> None:
        super().__init__(layers, norm)
        self.embed_dim, self.padded_codes = embed_dim, padded_codes
        self.place = two_layers(2 * embed_dim, embed_dim)

    def position(self, queries: Queries, memory: Tokens, layer: int) -> Tensor:
        """From the code of y, x, width and height, in this order."""
        boxes = queries.references
        if self.padded_codes:
            boxes = boxes * memory.valid_ratios[:, :1].repeat(1, 1, 2)
        boxes = torch.stack([boxes[..., i] for i in (1, 0, 2, 3)], -1)
        code = sine_embedding(boxes * 2 * math.pi, self.embed_dim // 2)  # (B, Q, 2 * C)
        return self.place(code.to(memory.features.dtype))


class ScalingDecoder(AnchorDecoder):
    """From the second layer on, the position is scaled by what the content says."""

    def __init__(self, layers: list[nn.Module], embed_dim: int, **options: object) -> None:
        super().__init__(layers, embed_dim, **options)
        # one layer alone would leave it without a gradient
        self.scale = two_layers(embed_dim, embed_dim) if len(layers) > 1 else None

    def position(self, queries: Queries, memory: Tokens, layer: int) -> Tensor:
        """As an `AnchorDecoder`'s, scaled."""
        position = super().position(queries, memory, layer)
        return position * self.scale(queries.content) if layer else position


class TwiceForwardDecoder(AnchorDecoder):
    """Look forward twice (DINO, section 3.5): a layer's boxes start from the last layer's with
    their gradient, so that its loss trains that one too; it looks around the same, cut off.

    raw_references: as the official code, look around boxes of the content before the norm, while
    the loss knows those after it.
    """

    raw_references = False

    def next_references(
        self, queries: Queries, delta: Tensor, boxes: Tensor, box_head: nn.Module
    ) -> tuple[Tensor, Tensor]:
        """One step from where this layer looked, not from where its boxes started."""
        if self.raw_references:
            delta = in_full(box_head, queries.content)
        moved = move(queries.references, delta, self.eps)
        return moved.detach(), moved


class LearnedAnchors(DeformableDetector):
    """A detector whose queries are learned boxes, each with a learned content."""

    config: AnchorConfig

    def make_decoder(self, layers: list[nn.Module]) -> Decoder:
        """One that scales positions."""
        c = self.config
        return ScalingDecoder(layers, c.embed_dim, padded_codes=c.padded_codes)

    def number_of_heads(self) -> int:
        """Each layer of the decoder has its own."""
        return self.config.decoder_layers

    def content_width(self) -> int:
        """Of a row in the table of contents."""
        return self.config.embed_dim

    def contents(self) -> Tensor:
        """(Q, C), what the queries start from."""
        return self.content_embed.weight

    def build_queries(self) -> None:
        """A table of contents, and one of boxes before the sigmoid."""
        rows = self.learned_queries()
        self.content_embed = nn.Embedding(rows, self.content_width())
        self.anchors = nn.Embedding(rows, 4)

    def reset_queries(self) -> None:
        """Tables are drawn from a normal distribution, as torch does."""
        self.box_heads[0].start_small()

    def queries(self, memory: Tokens, targets: list[Target] | None) -> tuple[Queries, Sets]:
        """The tables' rows."""
        boxes = self.anchors.weight.sigmoid()
        contents, anchors = for_each_image(memory, self.contents(), boxes)
        return Queries(contents, None, anchors), {}


def two_layers(inputs: int, outputs: int) -> nn.Sequential:
    """Two linear layers."""
    return nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU(), nn.Linear(outputs, outputs))
