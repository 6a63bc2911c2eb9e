"""DAT under torchvision's RetinaNet, Faster R-CNN and Mask R-CNN, for which the paper has detection
tables (Tables 3 and 4). The chapter on DAT names them."""

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool

from deformable_detr.backbones.dat import CONFIGS, DATBackbone, DATConfig


class DATFPN(nn.Module):
    """A DAT's maps and torchvision's feature pyramid on them, as its detectors take a backbone.

    `backbone` is the DAT, for `weights.dat.load_backbone`; `out_channels` the pyramid's width.
    """

    def __init__(self, backbone: DATBackbone, extra_blocks: ExtraFPNBlock) -> None:
        super().__init__()
        self.backbone = backbone
        self.out_channels = 256
        self.fpn = FeaturePyramidNetwork(backbone.channels, self.out_channels, extra_blocks)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """images: (B, 3, H, W). Returns (B, 256, H_i, W_i) by name, finest first: "0", "1" ..., and
        those of extra_blocks."""
        return self.fpn({str(i): x for i, x in enumerate(self.backbone(images))})


def dat_fpn(
    dat: str | DATConfig = "dat_tiny", stages: int = 4, extra_blocks: ExtraFPNBlock | None = None
) -> DATFPN:
    """A backbone for torchvision's detectors:

        FasterRCNN(dat_fpn("dat_tiny"), num_classes=91)
        MaskRCNN(dat_fpn("dat_tiny"), num_classes=91)
        RetinaNet(dat_fpn("dat_tiny", 3, LastLevelP6P7(256, 256)), 91, anchor_generator=anchors)

    dat: a key of CONFIGS, or a configuration. stages: how many of the last; their maps have strides
    4, 8, 16 and 32. extra_blocks: what makes levels above them; without it, a pooled one, as these
    detectors have with a ResNet. RetinaNet needs anchors for them, such as
    torchvision.models.detection.retinanet._default_anchorgen(). ValueError for other names.

    Cascade Mask R-CNN (Table 4b) is not in torchvision. It would take the same backbone; what is
    lacking is its head in the place of `roi_heads`: three box heads in a row, each with its own
    weights and its own scale of box deltas, given the boxes of the one before and trained on those
    with an IoU of at least 0.5, then 0.6, then 0.7; scores are the mean of all three.
    """
    if isinstance(dat, str) and dat not in CONFIGS:
        raise ValueError(f"dat must be one of {', '.join(CONFIGS)}, got {dat!r}")
    config = CONFIGS[dat] if isinstance(dat, str) else dat
    return DATFPN(DATBackbone(config, stages), extra_blocks or LastLevelMaxPool())
