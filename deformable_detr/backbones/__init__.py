"""Backbones: an image in, feature maps at three strides out. Chapter 8; deformable convolution,
chapter 3."""

import torchvision
from torch import nn

from deformable_detr.backbones.resnet import STAGES, ResNetBackbone
from deformable_detr.backbones.small import SmallBackbone


def build_backbone(
    name: str, dilation: bool = False, pretrained: bool = False, deformable_stages: int = 0
) -> nn.Module:
    """The backbone called `name`: "small" or a ResNet of torchvision ("resnet50", "resnet101",
    "resnext101_32x8d", "resnext101_64x4d"...).

    pretrained loads torchvision's ImageNet weights. deformable_stages: how many of the last stages
    have deformable convolutions, 0 to 3. ValueError on other names and numbers.
    """
    if not 0 <= deformable_stages <= len(STAGES):
        raise ValueError(f"deformable_stages must be from 0 to 3, got {deformable_stages}")
    if name == "small":
        if dilation or pretrained or deformable_stages:
            raise ValueError(
                "the small backbone has neither dilation nor ImageNet weights nor deformable stages"
            )
        return SmallBackbone()
    resnets = [n for n in torchvision.models.list_models() if n.startswith(("resn", "wide_resn"))]
    if name not in resnets:
        raise ValueError(f"backbone must be 'small' or one of {resnets}, got {name!r}")
    if dilation and name in ("resnet18", "resnet34"):
        raise ValueError(f"{name} has no dilated form in torchvision; use resnet50 or deeper")
    return ResNetBackbone(name, dilation, pretrained, deformable_stages)
