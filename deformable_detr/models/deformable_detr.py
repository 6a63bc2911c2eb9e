"""Deformable DETR (Zhu et al., 2021) and its variants. Chapters 8 and 10."""

from dataclasses import dataclass

from torch import nn

from deformable_detr.models.base import Sets, for_each_image, xavier
from deformable_detr.models.decoder import Decoder, RefiningDecoder
from deformable_detr.models.deformable import DeformableConfig, DeformableDetector
from deformable_detr.models.heads import in_full
from deformable_detr.models.selection import FirstStage
from deformable_detr.options import option
from deformable_detr.structures import Queries, Target, Tokens


@dataclass(frozen=True)
class DeformableDETRConfig(DeformableConfig):
    """Everything that decides the detector's shape; the defaults are the paper's base model."""

    refine: bool = option(False, "iterative box refinement", "with_box_refine", "with_box_refine")
    two_stage: bool = option(
        False, "queries from the encoder's proposals; needs refine", "two_stage", "two_stage"
    )
    anchor_size: float = option(
        0.05,
        "side, as a part of the image's, of the boxes that proposals start from on the finest "
        "level; it doubles on each next one. 0.05 suits stride 8 and images of 800 pixels",
    )

    def __post_init__(self) -> None:
        if self.two_stage and not self.refine:
            raise ValueError("two_stage needs refine=True: the proposals are boxes to be refined")
        super().__post_init__()


class DeformableDETR(DeformableDetector):
    """The detector of "Deformable DETR: Deformable Transformers for End-to-End Object Detection".

    Variants by config: single-scale (num_levels=1), DC5, refinement, two-stage. pretrained_backbone
    loads torchvision's ImageNet weights.
    """

    config: DeformableDETRConfig

    def make_decoder(self, layers: list[nn.Module]) -> Decoder:
        """One that refines its boxes, or not."""
        return (RefiningDecoder if self.config.refine else Decoder)(layers)

    def number_of_heads(self) -> int:
        """With refinement each layer has its own."""
        return self.config.decoder_layers if self.config.refine else 1

    def build_queries(self) -> None:
        """A first stage, or a table of positions and contents, and what makes points of those."""
        C = self.config.embed_dim
        if self.config.two_stage:
            self.first_stage = FirstStage(
                C, self.config.num_classes, self.scoring, self.config.anchor_size
            )
        else:
            self.query_embed = nn.Embedding(self.config.num_queries, 2 * C)
            self.reference_points = nn.Linear(C, 2)

    def reset_queries(self) -> None:
        """The official initialisation."""
        if self.config.two_stage:
            self.first_stage.reset_parameters()
        else:
            xavier(self.reference_points)
            nn.init.zeros_(self.reference_points.bias)

    def reset_parameters(self) -> None:
        """The official initialisation; the backbone's own is left alone."""
        super().reset_parameters()
        # from a point: start with boxes of sigmoid(-2) = 0.12, as the official code; A.4 says 0.1
        if not self.config.two_stage:
            nn.init.constant_(self.box_heads[0].layers[-1].bias[2:], -2.0)

    def queries(self, memory: Tokens, targets: list[Target] | None) -> tuple[Queries, Sets]:
        """Learned ones, or in two stages those made of the best proposals."""
        if self.config.two_stage:
            queries, proposals = self.first_stage(memory, self.config.num_queries)
            return queries, {"first": proposals}
        position, content = self.query_embed.weight.chunk(2, dim=-1)
        references = in_full(self.reference_points, position).sigmoid()
        return Queries(*for_each_image(memory, content, position, references)), {}
