"""A small backbone for small images. Chapter pixels_to_boxes."""

from itertools import pairwise

from torch import Tensor, nn


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


def small_backbone(dilation: bool, pretrained: bool, deformable_stages: int) -> SmallBackbone:
    """The small backbone; ValueError where more is asked of it than it has."""
    if dilation or pretrained or deformable_stages:
        raise ValueError(
            "the small backbone has neither dilation nor ImageNet weights nor deformable stages"
        )
    return SmallBackbone()
