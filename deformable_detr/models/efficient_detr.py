"""Efficient DETR (Yao et al., 2021): queries that are good from the start, so that one layer of a
decoder will do. Chapter "Groups and queries".

No official code exists. What the paper leaves open is said where it is decided.
"""

from dataclasses import dataclass

from torch import nn

from deformable_detr.models.selection import TokenStage
from deformable_detr.models.two_stage import TwoStage, TwoStageConfig
from deformable_detr.options import option, with_default


@dataclass(frozen=True)
class EfficientDETRConfig(TwoStageConfig):
    """Everything that decides the detector's shape; the defaults are the paper's.

    Its proposals are said to sink from 300 to 100 in the course of training; here they are 100.
    """

    num_queries: int = with_default(TwoStageConfig, "num_queries", 100)
    encoder_layers: int = with_default(TwoStageConfig, "encoder_layers", 3)
    decoder_layers: int = with_default(TwoStageConfig, "decoder_layers", 1)
    shared_head: bool = option(
        True, "first stage and decoder have one head, as in the paper; the codes of others have two"
    )


class EfficientDETR(TwoStage):
    """The detector of "Efficient DETR: Improving End-to-End Object Detector with Dense Prior".

    The first stage, its dense part, knows classes, and the tokens that it chooses are the queries'
    contents, as they leave the encoder and with their gradient; positions come from the proposed
    boxes, which the paper leaves open, as in the two-stage "Deformable DETR". pretrained_backbone
    loads torchvision's ImageNet weights.
    """

    config: EfficientDETRConfig

    def make_first_stage(self) -> TokenStage:
        """One that chooses by class, and passes tokens on."""
        c = self.config
        return TokenStage(c.embed_dim, c.num_classes, self.scoring, c.anchor_size)

    def number_of_heads(self) -> int:
        """None beside the first stage's, or one for each layer of the decoder."""
        return 0 if self.config.shared_head else self.config.decoder_layers

    def heads_of_layers(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """The first stage's, where they are shared."""
        if not self.config.shared_head:
            return super().heads_of_layers()
        layers, stage = self.config.decoder_layers, self.first_stage
        return [stage.class_head] * layers, [stage.box_head] * layers
