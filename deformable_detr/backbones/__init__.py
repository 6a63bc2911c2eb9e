"""Backbones: an image in, feature maps at three strides out.
Chapters pixels_to_boxes, deformable_convolution and dat.

BACKBONES has what makes each by its name: a function of dilation, of whether ImageNet's weights are
loaded, and of how many last stages have deformable convolutions.
"""

from functools import partial

import torchvision
from torch import nn

from deformable_detr.backbones.dat import CONFIGS, dat_backbone
from deformable_detr.backbones.resnet import STAGES, ResNetBackbone
from deformable_detr.backbones.small import small_backbone

RESNETS = [n for n in torchvision.models.list_models() if n.startswith(("resn", "wide_resn"))]
BACKBONES = {"small": small_backbone} | {name: partial(ResNetBackbone, name) for name in RESNETS}
BACKBONES |= {name: partial(dat_backbone, name) for name in CONFIGS}


def build_backbone(
    name: str,
    dilation: bool = False,
    pretrained: bool = False,
    deformable_stages: int = 0,
    stride_4: bool = False,
) -> nn.Module:
    """The backbone called `name`: "small", a ResNet of torchvision ("resnet50", "resnet101",
    "resnext101_32x8d", "resnext101_64x4d"...), or a DAT ("dat_tiny", "dat_small", "dat_base").

    dilation: the last stage at stride 16 (DC5). pretrained loads torchvision's ImageNet weights.
    deformable_stages: how many of the last stages have deformable convolutions, 0 to 3. stride_4:
    a ResNet's map of that stride comes first. The module has `channels` and `strides` of its maps.
    ValueError on other names and numbers.
    """
    if not 0 <= deformable_stages <= len(STAGES):
        raise ValueError(f"deformable_stages must be from 0 to 3, got {deformable_stages}")
    if name not in BACKBONES:
        raise ValueError(f"backbone must be one of {', '.join(BACKBONES)}, got {name!r}")
    if not stride_4:
        return BACKBONES[name](dilation, pretrained, deformable_stages)
    if name not in RESNETS:
        raise ValueError(f"stride_4 needs a ResNet, got backbone {name!r}")
    return ResNetBackbone(name, dilation, pretrained, deformable_stages, stride_4)
