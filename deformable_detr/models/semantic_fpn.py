"""Semantic FPN: a class for every pixel, from the maps of any backbone, as DAT's paper has it under
DAT in Table 5. The chapter on DAT."""

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork


class SemanticFPN(nn.Module):
    """A feature pyramid, each map of which is brought to the finest one's size; their sum tells the
    classes.

    "Panoptic Feature Pyramid Networks" (Kirillov et al., 2019), section 3 and Fig. 3: a convolution
    of 3 x 3, group norm, ReLU and a doubled size, as often as a map needs, once for the finest
    without doubling; convolution of 1 x 1; the size of the image.

    backbone: with `channels` and `strides` of its maps, such as `DATBackbone(CONFIGS["dat_tiny"],
    stages=4)`, whose finest stride is the paper's 4, or one of `build_backbone`. width: of the maps
    that are summed, a multiple of 32. pyramid_width: of the pyramid's.
    """

    def __init__(
        self, backbone: nn.Module, num_classes: int, width: int = 128, pyramid_width: int = 256
    ) -> None:
        super().__init__()
        if num_classes < 1 or pyramid_width < 1:
            raise ValueError(
                "num_classes and pyramid_width must be at least 1, got "
                f"{num_classes} and {pyramid_width}"
            )
        if width < 1 or width % 32:
            raise ValueError(f"width must be a multiple of 32, the norm's groups, got {width}")
        self.backbone = backbone
        self.pyramid = FeaturePyramidNetwork(backbone.channels, pyramid_width)
        levels = range(len(backbone.channels))
        self.branches = nn.ModuleList(
            nn.ModuleList(step(width if i else pyramid_width, width) for i in range(max(1, level)))
            for level in levels
        )
        self.classify = nn.Conv2d(width, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W), normalised as the backbone expects. Returns logits
        (B, num_classes, H, W), for `torch.nn.functional.cross_entropy`."""
        maps = {str(level): x for level, x in enumerate(self.backbone(images))}
        maps = list(self.pyramid(maps).values())
        sizes = [x.shape[2:] for x in maps]
        total = 0
        for level, (x, steps) in enumerate(zip(maps, self.branches, strict=True)):
            for i, convolve in enumerate(steps):
                x = resize(convolve(x), sizes[max(0, level - i - 1)])
            total = total + x
        return resize(self.classify(total), images.shape[2:])


def step(channels_in: int, channels_out: int) -> nn.Sequential:
    """(B, channels_in, H, W) to (B, channels_out, H, W)."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.GroupNorm(32, channels_out),
        nn.ReLU(),
    )


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps at another size, between pixels; as they are at their own."""
    if x.shape[2:] == tuple(size):
        return x
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)
