"""DETR, the detector with dense attention that the others descend from (Carion et al., 2020)."""

from dataclasses import dataclass

from deformable_detr.models.dense import DenseConfig, DenseDetector


@dataclass(frozen=True)
class DETRConfig(DenseConfig):
    """Everything that decides the detector's shape; the defaults are the paper's base model."""


class DETR(DenseDetector):
    """The detector of "End-to-End Object Detection with Transformers".

    One map of the backbone, dense attention in encoder and decoder, learned queries whose content
    starts at zero, boxes without references. pretrained_backbone loads torchvision's ImageNet
    weights.
    """

    config: DETRConfig
