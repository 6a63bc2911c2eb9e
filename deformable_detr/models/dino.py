"""DINO (Zhang et al., 2023): contrastive denoising, mixed query selection, and boxes that look
forward twice. Chapter "Denoising".

Each of its ideas stands in a file of its own: `denoising.Contrastive`, `selection.AnchorStage`,
`anchors.TwiceForwardDecoder`; `proposed_anchors` puts the latter two together.
"""

from dataclasses import dataclass

from deformable_detr.models.denoising import Contrastive, ContrastiveOptions
from deformable_detr.models.proposed_anchors import ProposedAnchors, ProposedAnchorsConfig


@dataclass(frozen=True)
class DINOConfig(ContrastiveOptions, ProposedAnchorsConfig):
    """Everything that decides the detector's shape; the defaults are those of DINO-4scale."""


class DINO(Contrastive, ProposedAnchors):
    """The detector of "DINO: DETR with Improved DeNoising Anchor Boxes for End-to-End Object
    Detection".

    Its detections are the 300 best of an image, where others take 100. pretrained_backbone loads
    torchvision's ImageNet weights.
    """

    config: DINOConfig
