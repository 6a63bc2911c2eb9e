"""Learned queries, each with a content, a position and a point that it starts from.
Chapter pixels_to_boxes."""

from dataclasses import dataclass

from torch import nn

from deformable_detr.models.base import Sets, for_each_image, xavier
from deformable_detr.models.decoder import Decoder, RefiningDecoder
from deformable_detr.models.deformable import DeformableConfig, DeformableDetector
from deformable_detr.models.heads import in_full
from deformable_detr.options import option
from deformable_detr.structures import Queries, Target, Tokens


@dataclass(frozen=True)
class LearnedConfig(DeformableConfig):
    """What decides the shape of a detector with learned queries."""

    refine: bool = option(False, "iterative box refinement", "with_box_refine", "with_box_refine")


class LearnedQueries(DeformableDetector):
    """A detector whose queries are a table of positions and contents, the same for every image;
    with config.refine each layer of the decoder starts from the boxes of the one before (A.4)."""

    config: LearnedConfig

    def make_decoder(self, layers: list[nn.Module]) -> Decoder:
        """One that refines its boxes, or not."""
        return (RefiningDecoder if self.config.refine else Decoder)(layers)

    def number_of_heads(self) -> int:
        """With refinement each layer has its own."""
        return self.config.decoder_layers if self.config.refine else 1

    def build_queries(self) -> None:
        """A table of positions and contents, and what makes points of positions."""
        C = self.config.embed_dim
        self.query_embed = nn.Embedding(self.learned_queries(), 2 * C)
        self.reference_points = nn.Linear(C, 2)

    def reset_queries(self) -> None:
        """The official initialisation."""
        xavier(self.reference_points)
        nn.init.zeros_(self.reference_points.bias)
        self.box_heads[0].start_small()

    def queries(self, memory: Tokens, targets: list[Target] | None) -> tuple[Queries, Sets]:
        """The table's rows."""
        position, content = self.query_embed.weight.chunk(2, dim=-1)
        references = in_full(self.reference_points, position).sigmoid()
        return Queries(*for_each_image(memory, content, position, references)), {}
