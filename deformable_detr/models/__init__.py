"""The detectors, by name: a configuration and a class each.
Chapters pixels_to_boxes and refinement.

MODELS is what a file's metadata, a recipe and a run mean by a model's name; a file that has none
holds a model of DEFAULT.
"""

from deformable_detr.models.base import BaseDetector
from deformable_detr.models.deformable_detr import DeformableDETR, DeformableDETRConfig
from deformable_detr.models.dense_group_detr import DenseGroupDETR, DenseGroupDETRConfig
from deformable_detr.models.detr import DETR, DETRConfig
from deformable_detr.models.dino import DINO, DINOConfig
from deformable_detr.models.dn_detr import DNDETR, DNDETRConfig
from deformable_detr.models.efficient_detr import EfficientDETR, EfficientDETRConfig
from deformable_detr.models.group_detr import GroupDETR, GroupDETRConfig
from deformable_detr.models.lite_detr import LiteDETR, LiteDETRConfig
from deformable_detr.models.lite_dino import LiteDINO, LiteDINOConfig
from deformable_detr.models.sparse_detr import SparseDETR, SparseDETRConfig

__all__ = [
    "DETR",
    "DINO",
    "DNDETR",
    "MODELS",
    "BaseDetector",
    "DETRConfig",
    "DINOConfig",
    "DNDETRConfig",
    "DeformableDETR",
    "DeformableDETRConfig",
    "DenseGroupDETR",
    "DenseGroupDETRConfig",
    "EfficientDETR",
    "EfficientDETRConfig",
    "GroupDETR",
    "GroupDETRConfig",
    "LiteDETR",
    "LiteDETRConfig",
    "LiteDINO",
    "LiteDINOConfig",
    "SparseDETR",
    "SparseDETRConfig",
    "build_model",
    "model_name",
]
MODELS = {
    "deformable_detr": (DeformableDETRConfig, DeformableDETR),
    "detr": (DETRConfig, DETR),
    "dn_detr": (DNDETRConfig, DNDETR),
    "dino": (DINOConfig, DINO),
    "group_detr": (GroupDETRConfig, GroupDETR),
    "dense_group_detr": (DenseGroupDETRConfig, DenseGroupDETR),
    "efficient_detr": (EfficientDETRConfig, EfficientDETR),
    "sparse_detr": (SparseDETRConfig, SparseDETR),
    "lite_detr": (LiteDETRConfig, LiteDETR),
    "lite_dino": (LiteDINOConfig, LiteDINO),
}
DEFAULT = "deformable_detr"


def model_name(config: object) -> str:
    """The name in MODELS of the model that a configuration is of; TypeError where it is of none."""
    for name, (kind, _) in MODELS.items():
        if type(config) is kind:
            return name
    given = type(config).__name__
    raise TypeError(f"{given} is the configuration of no model in MODELS: {', '.join(MODELS)}")


def build_model(config: object, pretrained_backbone: bool = False) -> BaseDetector:
    """A new model of a configuration; pretrained_backbone loads torchvision's ImageNet weights."""
    return MODELS[model_name(config)][1](config, pretrained_backbone)
