"""Group DETR on dense attention (Chen et al., 2023). Chapter "Groups and queries"."""

from dataclasses import dataclass

from deformable_detr.models.dense import DenseConfig, DenseDetector
from deformable_detr.models.groups import Grouped, GroupOptions


@dataclass(frozen=True)
class DenseGroupDETRConfig(GroupOptions, DenseConfig):
    """Everything that decides the detector's shape."""


class DenseGroupDETR(Grouped, DenseDetector):
    """The idea of "Group DETR: Fast DETR Training with Group-Wise One-to-Many Assignment" on the
    detector that all descend from; see `groups`. Its authors show it on Conditional DETR.

    pretrained_backbone loads torchvision's ImageNet weights.
    """

    config: DenseGroupDETRConfig
