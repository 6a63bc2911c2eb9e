"""Lite DETR on "Deformable DETR" in two stages (Li et al., 2023). Chapter "Fewer tokens"."""

from dataclasses import dataclass

from deformable_detr.models.lite_encoder import LiteEncoded, LiteOptions
from deformable_detr.models.two_stage import TwoStage, TwoStageConfig


@dataclass(frozen=True)
class LiteDETRConfig(LiteOptions, TwoStageConfig):
    """Everything that decides the detector's shape."""


class LiteDETR(LiteEncoded, TwoStage):
    """The detector of "Lite DETR: An Interleaved Multi-Scale Encoder for Efficient DETR", as its
    Lite-Deformable-DETR; see `lite_encoder`. pretrained_backbone loads torchvision's ImageNet
    weights.
    """

    config: LiteDETRConfig
