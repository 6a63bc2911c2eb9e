"""Detectors in two stages: queries are made of the encoder's best proposals. Chapter refinement."""

from dataclasses import dataclass

from torch import nn

from deformable_detr.models.base import Sets
from deformable_detr.models.decoder import Decoder, RefiningDecoder
from deformable_detr.models.deformable import DeformableConfig, DeformableDetector
from deformable_detr.models.selection import FirstStage
from deformable_detr.options import option
from deformable_detr.structures import Queries, Target, Tokens


@dataclass(frozen=True)
class TwoStageConfig(DeformableConfig):
    """What decides the shape of a detector in two stages."""

    anchor_size: float = option(
        0.05,
        "side, as a part of the image's, of the boxes that proposals start from on the finest "
        "level; it doubles on each next one. 0.05 suits stride 8 and images of 800 pixels",
    )


class TwoStage(DeformableDetector):
    """A detector whose decoder refines the best of the encoder's proposals (A.4)."""

    config: TwoStageConfig

    def make_decoder(self, layers: list[nn.Module]) -> Decoder:
        """One that refines its boxes."""
        return RefiningDecoder(layers)

    def number_of_heads(self) -> int:
        """Each layer of the decoder has its own."""
        return self.config.decoder_layers

    def make_first_stage(self) -> FirstStage:
        """What proposes and selects."""
        c = self.config
        return FirstStage(c.embed_dim, c.num_classes, self.scoring, c.anchor_size)

    def build_queries(self) -> None:
        """The first stage."""
        self.first_stage = self.make_first_stage()

    def reset_queries(self) -> None:
        """The official initialisation."""
        self.first_stage.reset_parameters()

    def queries(self, memory: Tokens, targets: list[Target] | None) -> tuple[Queries, Sets]:
        """Those made of the best proposals."""
        queries, proposals = self.first_stage(memory, self.config.num_queries)
        return queries, {"first": proposals}
