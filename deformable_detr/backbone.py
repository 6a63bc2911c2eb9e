"""Convolutional backbones: an image in, feature maps at strides 8, 16 and 32 out."""

from itertools import pairwise

import torchvision
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops.misc import FrozenBatchNorm2d


class ResNetBackbone(nn.Module):
    """The stages C3 to C5 of a torchvision ResNet, with batch norm frozen as in DETR.

    The stem and the first stage are frozen too. With dilation (DC5) the last stage keeps stride 16.
    """

    def __init__(self, name: str, dilation: bool = False, pretrained: bool = False) -> None:
        super().__init__()
        resnet = torchvision.models.get_model(
            name,
            weights="DEFAULT" if pretrained else None,
            norm_layer=FrozenBatchNorm2d,
            replace_stride_with_dilation=[False, False, dilation],
        )
        for parameter_name, parameter in resnet.named_parameters():
            if not parameter_name.startswith(("layer2", "layer3", "layer4")):
                parameter.requires_grad_(False)
        self.body = IntermediateLayerGetter(resnet, {"layer2": "8", "layer3": "16", "layer4": "32"})
        width = resnet.fc.in_features
        self.channels = [width // 4, width // 2, width]
        self.strides = [8, 16, 16 if dilation else 32]

    def forward(self, images: Tensor) -> list[Tensor]:
        """images: (B, 3, H, W). Returns three maps (B, channels[i], H_i, W_i), finest first."""
        return list(self.body(images).values())


class SmallBackbone(nn.Module):
    """Half a million parameters for small images: a stem and four residual blocks, each halving
    the map. Batch norm is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        )
        widths = [16, 32, 64, 96, 128]
        self.blocks = nn.ModuleList(
            ResidualBlock(before, after) for before, after in pairwise(widths)
        )
        self.channels = widths[2:]
        self.strides = [8, 16, 32]

    def forward(self, images: Tensor) -> list[Tensor]:
        """images: (B, 3, H, W). Returns three maps (B, channels[i], H_i, W_i), finest first."""
        x = self.stem(images)
        maps = []
        for block in self.blocks:
            x = block(x)
            maps.append(x)
        return maps[1:]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al., 2016), at half the resolution."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(),
            nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
        )
        self.shortcut = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 1, stride=2, bias=False),
            nn.BatchNorm2d(channels_out),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels_in, H, W) to (B, channels_out, ceil(H/2), ceil(W/2))."""
        return (self.body(x) + self.shortcut(x)).relu()


def build_backbone(name: str, dilation: bool = False, pretrained: bool = False) -> nn.Module:
    """The backbone called `name`: "small" or a ResNet of torchvision ("resnet50", "resnet101",
    "resnext101_32x8d"...). pretrained loads torchvision's ImageNet weights. ValueError on other
    names."""
    if name == "small":
        if dilation or pretrained:
            raise ValueError("the small backbone has neither dilation nor ImageNet weights")
        return SmallBackbone()
    resnets = [n for n in torchvision.models.list_models() if n.startswith(("resn", "wide_resn"))]
    if name not in resnets:
        raise ValueError(f"backbone must be 'small' or one of {resnets}, got {name!r}")
    if dilation and name in ("resnet18", "resnet34"):
        raise ValueError(f"{name} has no dilated form in torchvision; use resnet50 or deeper")
    return ResNetBackbone(name, dilation, pretrained)
