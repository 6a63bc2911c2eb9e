"""Convolutional backbones: an image in, feature maps at three strides out."""

from itertools import pairwise

import torch
import torchvision
from torch import Tensor, nn
from torchvision.ops import DeformConv2d
from torchvision.ops.misc import FrozenBatchNorm2d

from deformable_detr.transformer import Stack

STAGES = ("layer2", "layer3", "layer4")  # torchvision's names for C3, C4 and C5
HEAD = ("avgpool", "fc")


class ResNetBackbone(Stack):
    """The stages C3 to C5 of a torchvision ResNet, with batch norm frozen as in DETR.

    The stem and the first stage are frozen too. With dilation (DC5) the last stage keeps stride 16.
    The 3x3 convolutions of the last deformable_stages stages are modulated deformable ones: 3 for
    C3 to C5, as "ResNeXt-101 + DCN" in Table 3 of the paper. The official code has no such model,
    nor the ResNeXt without it (issues 12, 34, 63).
    """

    def __init__(
        self,
        name: str,
        dilation: bool = False,
        pretrained: bool = False,
        deformable_stages: int = 0,
    ) -> None:
        super().__init__()
        resnet = torchvision.models.get_model(
            name,
            # those that detectors are published with; torchvision's later ones score higher
            weights="IMAGENET1K_V1" if pretrained else None,
            norm_layer=FrozenBatchNorm2d,
            replace_stride_with_dilation=[False, False, dilation],
        )
        for parameter_name, parameter in resnet.named_parameters():
            if not parameter_name.startswith(STAGES):
                parameter.requires_grad_(False)
        for stage in STAGES[len(STAGES) - deformable_stages :]:
            for block in getattr(resnet, stage):
                block.conv2 = ModulatedDeformConv2d.like(block.conv2)
        fold_norms(resnet)
        parts = dict(resnet.named_children())
        self.body = nn.ModuleDict({name: parts[name] for name in parts if name not in HEAD})
        width = resnet.fc.in_features
        self.channels = [width // 4, width // 2, width]
        self.strides = [8, 16, 16 if dilation else 32]

    def forward(self, images: Tensor) -> list[Tensor]:
        """images: (B, 3, H, W). Returns three maps (B, channels[i], H_i, W_i), finest first."""
        if images.device.type == "cpu" and not torch.is_grad_enabled():
            # convolutions are a fifth faster so, but a backward pass is slower
            images = images.contiguous(memory_format=torch.channels_last)
        x, maps = images, []
        for name, stage in self.body.items():
            x = self.run(stage, x) if name in STAGES else stage(x)
            if name in STAGES:
                maps.append(x)
        return maps


def fold_norms(resnet: nn.Module) -> None:
    """Let each plain convolution apply the frozen batch norm that follows it, in its own weights:
    the same numbers without two more passes over each map. Names of tensors stay as they are."""
    for module in list(resnet.modules()):
        for (name, convolution), (norm_name, norm) in pairwise(list(module.named_children())):
            if type(convolution) is nn.Conv2d and isinstance(norm, FrozenBatchNorm2d):
                folded = FoldedNorm(len(norm.weight), norm.eps)
                folded.load_state_dict(norm.state_dict())
                setattr(module, norm_name, folded)
                setattr(module, name, FoldedConv2d(convolution, folded))


class FoldedNorm(FrozenBatchNorm2d):
    """A frozen batch norm that has nothing left to do: the convolution before it has done it."""

    def forward(self, x: Tensor) -> Tensor:
        """x itself."""
        return x


class FoldedConv2d(nn.Conv2d):
    """A convolution, and the frozen batch norm after it."""

    def __init__(self, convolution: nn.Conv2d, norm: FoldedNorm) -> None:
        nn.Module.__init__(self)
        vars(self).update(vars(convolution))  # its sizes and its very weight
        self.norm = (norm,)  # in a tuple: the tensors stay registered at its own place only

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H', W')."""
        (norm,) = self.norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        weight = self.weight * scale[:, None, None, None]
        return self._conv_forward(x, weight, norm.bias - norm.running_mean * scale)


class ModulatedDeformConv2d(DeformConv2d):
    """A deformable convolution that finds its own offsets and modulation (Zhu et al., "Deformable
    ConvNets v2", Eq. 1); the operator is torchvision's.

    It starts as the plain convolution of the same weight, so that pretrained weights carry over:
    offsets of zero, and modulations of one. For that a modulation is twice a sigmoid, in (0, 2);
    Eq. 1 has it in [0, 1], where it starts at one half.
    """

    def __init__(self, *arguments: int | tuple[int, int], **options: object) -> None:
        super().__init__(*arguments, **options)
        height, width = self.kernel_size
        self.offset = nn.Conv2d(
            self.in_channels,
            3 * height * width,  # y, x of each sample, then its modulation
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
        )
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)

    @classmethod
    def like(cls, convolution: nn.Conv2d) -> "ModulatedDeformConv2d":
        """One with a plain convolution's sizes and weights."""
        deformable = cls(
            convolution.in_channels,
            convolution.out_channels,
            convolution.kernel_size,
            convolution.stride,
            convolution.padding,
            convolution.dilation,
            convolution.groups,
            bias=convolution.bias is not None,
        )
        deformable.weight, deformable.bias = convolution.weight, convolution.bias
        return deformable

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H', W'), as the plain convolution."""
        samples = self.kernel_size[0] * self.kernel_size[1]
        offsets, modulation = self.offset(x).split([2 * samples, samples], dim=1)
        return super().forward(x, offsets, 2 * modulation.sigmoid())


class SmallBackbone(nn.Module):
    """0.2 million parameters for small images: a stem and three residual blocks, each
    halving the map, to strides 4, 8 and 16. Batch norm is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        )
        widths = [16, 32, 64, 96]
        self.blocks = nn.ModuleList(
            ResidualBlock(before, after) for before, after in pairwise(widths)
        )
        self.channels = widths[1:]
        self.strides = [4, 8, 16]

    def forward(self, images: Tensor) -> list[Tensor]:
        """images: (B, 3, H, W). Returns three maps (B, channels[i], H_i, W_i), finest first."""
        x = self.stem(images)
        maps = []
        for block in self.blocks:
            x = block(x)
            maps.append(x)
        return maps


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
