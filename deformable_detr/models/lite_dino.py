"""Lite DETR on DINO (Li et al., 2023). Chapter "Fewer tokens"."""

from dataclasses import dataclass

from deformable_detr.models.denoising import Contrastive, ContrastiveOptions
from deformable_detr.models.lite_encoder import LiteEncoded, LiteOptions
from deformable_detr.models.proposed_anchors import ProposedAnchors, ProposedAnchorsConfig


@dataclass(frozen=True)
class LiteDINOConfig(LiteOptions, ContrastiveOptions, ProposedAnchorsConfig):
    """Everything that decides the detector's shape; the defaults are those of the authors' best
    model, H3L1-(2+1)x3."""


class LiteDINO(LiteEncoded, Contrastive, ProposedAnchors):
    """The detector of "Lite DETR: An Interleaved Multi-Scale Encoder for Efficient DETR", as its
    Lite-DINO; see `lite_encoder`.

    Its detections are the 300 best of an image, where others take 100. pretrained_backbone loads
    torchvision's ImageNet weights.
    """

    config: LiteDINOConfig
