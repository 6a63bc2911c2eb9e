"""DN-DETR on deformable attention (Li et al., 2022): learned boxes as queries, and beside them in
training noised objects, which need no matching. Chapter "Denoising"."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from deformable_detr.losses.scoring import FocalScoring
from deformable_detr.models.anchors import AnchorConfig, LearnedAnchors
from deformable_detr.models.denoising import Denoised, DenoisingOptions, shift
from deformable_detr.options import option


@dataclass(frozen=True)
class DNDETRConfig(DenoisingOptions, AnchorConfig):
    """Everything that decides the detector's shape; the defaults are those of the official
    DN-DAB-Deformable-DETR."""

    denoising_groups: int = option(5, "noised copies of all objects in training; 0 is none")

    may_be_zero: ClassVar[tuple[str, ...]] = ("denoising_groups",)


class DNDETR(Denoised, LearnedAnchors):
    """The detector of "DN-DETR: Accelerate DETR Training by Introducing Query DeNoising".

    The last channel of a query's content says whether it is a noised object. Without
    denoising_groups it is DAB-Deformable-DETR. pretrained_backbone loads torchvision's ImageNet
    weights.
    """

    config: DNDETRConfig

    def __init__(self, config: DNDETRConfig, pretrained_backbone: bool = False) -> None:
        super().__init__(config, pretrained_backbone, FocalScoring(loss_weight=1.0))

    def groups_for(self, most: int) -> int:
        """Always as many."""
        return self.config.denoising_groups

    def noise(self, boxes: Tensor, draws: Tensor) -> Tensor:
        """Other centres and other sides."""
        return shift(boxes, draws, self.config.box_noise)

    def label_width(self) -> int:
        """The last channel is another thing."""
        return self.config.embed_dim - 1

    content_width = label_width

    def describe(self, labels: Tensor) -> Tensor:
        """A row of the table, and 1."""
        return F.pad(self.label_embed(labels), (0, 1), value=1.0)

    def contents(self) -> Tensor:
        """A row of the other table, and 0."""
        return F.pad(super().contents(), (0, 1))
