"""UPerNet: a class for every pixel, from the maps of any backbone, as DAT's paper has it under DAT
in Table 5. The chapter on DAT."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deformable_detr.models.semantic_fpn import resize

POOLED = (1, 2, 3, 6)  # cells of a side that the last map is pooled to


class UPerNet(nn.Module):
    """What the whole image shows, brought down a feature pyramid, whose maps tell the classes
    together.

    "Unified Perceptual Parsing for Scene Understanding" (Xiao et al., 2018), section 3.1 and Fig. 4
    with its object head alone: the last map and what it is when pooled to 1, 4, 9 and 36 cells (the
    pyramid pooling of PSPNet); from there down the pyramid, map by map; all of them at the finest
    one's size, fused. Without the auxiliary head that OpenMMLab, and so DAT's authors, train on the
    third stage beside it.

    backbone: with `channels` and `strides` of its maps, such as `DATBackbone(CONFIGS["dat_tiny"],
    stages=4)`, whose finest stride is the paper's 4, or one of `build_backbone`. width: of all maps
    in the head.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, width: int = 512) -> None:
        super().__init__()
        if num_classes < 1 or width < 1:
            raise ValueError(
                f"num_classes and width must be at least 1, got {num_classes} and {width}"
            )
        self.backbone = backbone
        *finer, last = backbone.channels
        self.pooled = nn.ModuleList(convolution(last, width, 1) for _ in POOLED)
        self.whole = convolution(last + len(POOLED) * width, width, 3)
        self.lateral = nn.ModuleList(convolution(channels, width, 1) for channels in finer)
        self.smooth = nn.ModuleList(convolution(width, width, 3) for _ in finer)
        self.fuse = convolution((len(finer) + 1) * width, width, 3)
        self.classify = nn.Conv2d(width, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W), normalised as the backbone expects. Returns logits
        (B, num_classes, H, W), for `torch.nn.functional.cross_entropy`.

        ValueError where a training batch has one image: the batch norm of the map that is pooled to
        one cell then has nothing to compare.
        """
        *finer, last = self.backbone(images)
        x = self._pool(last)
        found = [x]
        for y, lateral, smooth in zip(
            finer[::-1], self.lateral[::-1], self.smooth[::-1], strict=True
        ):
            x = lateral(y) + resize(x, y.shape[2:])
            found.insert(0, smooth(x))
        size = found[0].shape[2:]
        x = self.fuse(torch.cat([resize(y, size) for y in found], 1))
        return resize(self.classify(x), images.shape[2:])

    def _pool(self, x: Tensor) -> Tensor:
        """The last map with its surroundings, from the nearest to the whole image."""
        parts = [
            resize(convolve(F.adaptive_avg_pool2d(x, side)), x.shape[2:])
            for side, convolve in zip(POOLED, self.pooled, strict=True)
        ]
        return self.whole(torch.cat([x, *parts], 1))


def convolution(channels_in: int, channels_out: int, side: int) -> nn.Sequential:
    """(B, channels_in, H, W) to (B, channels_out, H, W)."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, side, padding=side // 2, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )
