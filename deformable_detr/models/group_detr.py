"""Group DETR on deformable attention (Chen et al., 2023). Chapter "Groups and queries"."""

from dataclasses import dataclass

from deformable_detr.models.groups import Grouped, GroupOptions
from deformable_detr.models.learned import LearnedConfig, LearnedQueries


@dataclass(frozen=True)
class GroupDETRConfig(GroupOptions, LearnedConfig):
    """Everything that decides the detector's shape."""


class GroupDETR(Grouped, LearnedQueries):
    """The idea of "Group DETR: Fast DETR Training with Group-Wise One-to-Many Assignment", on
    learned queries that sample; see `groups`. Its authors show it on other detectors.

    pretrained_backbone loads torchvision's ImageNet weights.
    """

    config: GroupDETRConfig
