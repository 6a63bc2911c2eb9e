"""ResNets as detectors have them: three maps, frozen batch norm. Chapter pixels_to_boxes."""

from itertools import pairwise

import torch
import torchvision
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

from deformable_detr.backbones.deformable_convolution import ModulatedDeformConv2d
from deformable_detr.layers.stack import Stack

STAGES = ("layer2", "layer3", "layer4")  # torchvision's names for C3, C4 and C5
HEAD = ("avgpool", "fc")
BASIC = ("resnet18", "resnet34")  # without bottlenecks


class ResNetBackbone(Stack):
    """The stages C3 to C5 of a torchvision ResNet, with batch norm frozen as in DETR.

    The stem and the first stage are frozen too. With dilation (DC5) the last stage keeps stride 16.
    The 3x3 convolutions of the last deformable_stages stages are modulated deformable ones: 3 for
    C3 to C5, as "ResNeXt-101 + DCN" in Table 3 of the paper. The official code has no such model,
    nor the ResNeXt without it (issues 12, 34, 63). With stride_4 the map of C2 comes before C3's.
    """

    def __init__(
        self,
        name: str,
        dilation: bool = False,
        pretrained: bool = False,
        deformable_stages: int = 0,
        stride_4: bool = False,
    ) -> None:
        super().__init__()
        if dilation and name in BASIC:
            raise ValueError(f"{name} has no dilated form in torchvision; use resnet50 or deeper")
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
        self.mapped = STAGES
        if stride_4:
            self.mapped = ("layer1", *STAGES)
            self.channels, self.strides = [width // 8, *self.channels], [4, *self.strides]

    def forward(self, images: Tensor) -> list[Tensor]:
        """images: (B, 3, H, W). Returns maps (B, channels[i], H_i, W_i), finest first."""
        if images.device.type == "cpu" and not torch.is_grad_enabled():
            # convolutions are a fifth faster so, but a backward pass is slower
            images = images.contiguous(memory_format=torch.channels_last)
        x, maps = images, []
        for name, stage in self.body.items():
            x = self.run(stage, x) if name in STAGES else stage(x)
            if name in self.mapped:
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
