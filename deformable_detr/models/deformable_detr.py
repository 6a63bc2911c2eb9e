"""Deformable DETR (Zhu et al., 2021) and its variants. Chapters pixels_to_boxes and refinement."""

from dataclasses import dataclass

from deformable_detr.models.base import Sets
from deformable_detr.models.learned import LearnedConfig, LearnedQueries
from deformable_detr.models.selection import FirstStage
from deformable_detr.models.two_stage import TwoStageConfig
from deformable_detr.options import option, with_default
from deformable_detr.structures import Queries, Target, Tokens


@dataclass(frozen=True)
class DeformableDETRConfig(LearnedConfig):
    """Everything that decides the detector's shape; the defaults are the paper's base model."""

    two_stage: bool = option(
        False, "queries from the encoder's proposals; needs refine", "two_stage", "two_stage"
    )
    anchor_size: float = with_default(TwoStageConfig, "anchor_size", 0.05)

    def __post_init__(self) -> None:
        if self.two_stage and not self.refine:
            raise ValueError("two_stage needs refine=True: the proposals are boxes to be refined")
        super().__post_init__()


class DeformableDETR(LearnedQueries):
    """The detector of "Deformable DETR: Deformable Transformers for End-to-End Object Detection".

    Variants by config: single-scale (num_levels=1), DC5, refinement, two-stage. pretrained_backbone
    loads torchvision's ImageNet weights.
    """

    config: DeformableDETRConfig

    def build_queries(self) -> None:
        """A first stage, or a table of queries."""
        c = self.config
        if c.two_stage:
            self.first_stage = FirstStage(c.embed_dim, c.num_classes, self.scoring, c.anchor_size)
        else:
            super().build_queries()

    def reset_queries(self) -> None:
        """The official initialisation."""
        if self.config.two_stage:
            self.first_stage.reset_parameters()
        else:
            super().reset_queries()

    def queries(self, memory: Tokens, targets: list[Target] | None) -> tuple[Queries, Sets]:
        """Learned ones, or in two stages those made of the best proposals."""
        if not self.config.two_stage:
            return super().queries(memory, targets)
        queries, proposals = self.first_stage(memory, self.config.num_queries)
        return queries, {"first": proposals}
