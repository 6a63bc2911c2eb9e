"""DAT, the Deformable Attention Transformer: windows first, then shared keys that move.

"Vision Transformer with Deformable Attention" (Xia et al., 2022), Fig. 3 and Table 1, in the form
of the authors' first code and weights (v1). The chapter on DAT builds it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from deformable_detr.layers.dat_attention import DAttention
from deformable_detr.layers.spatial_reduction import SpatialReductionAttention
from deformable_detr.layers.stack import Stack
from deformable_detr.layers.window_attention import WindowAttention, pad_to_multiple

KERNELS = (9, 7, 5, 3)  # of the offset network in each stage
REDUCTIONS = (8, 4, 2, 1)  # of spatial reduction in each stage


@dataclass(frozen=True)
class DATConfig:
    """What decides the shape of a DAT; the defaults are those of DAT-T.

    embed_dim: C of the first stage; each next one has twice as many. blocks: of each stage, a
    letter for each block: W attends in windows, S in shifted ones, D to keys that move, P to a
    smaller map, which is PVT's way (Table 6). heads, and groups of moved keys: of each stage.
    window: pixels of a side. image_size: that the tables of position bias are made for. stride,
    offset_range: r and s of the moved keys; see `DAttention`. drop_path: probability with which the
    last block is left out in training; it falls in equal steps to 0 for the first (stochastic
    depth). The authors have 0.2 for T, 0.3 for S, 0.5 for B.
    """

    embed_dim: int = 96
    blocks: tuple[str, ...] = ("WS", "WS", "WDWDWD", "WD")
    heads: tuple[int, ...] = (3, 6, 12, 24)
    groups: tuple[int, ...] = (1, 2, 3, 6)
    window: int = 7
    image_size: int = 224
    stride: int = 1
    offset_range: float = 2.0
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        each = self.blocks, self.heads, self.groups
        if {len(x) for x in each} != {len(KERNELS)}:
            raise ValueError(f"blocks, heads and groups must be of 4 stages, got {each}")
        if wrong := set("".join(self.blocks)) - set("WSDP"):
            raise ValueError(f"blocks must be W, S, D or P, got {min(wrong)!r}")
        if self.window < 1 or self.image_size < 32:
            raise ValueError(
                "window must be at least 1, and image_size 32, which is one pixel of the last "
                f"stage, got {self.window} and {self.image_size}"
            )
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must be in [0, 1), got {self.drop_path}")


SMALL = ("WS", "WS", "WD" * 9, "WD")
BASE = DATConfig(128, SMALL, heads=(4, 8, 16, 32), groups=(1, 2, 4, 8))
CONFIGS = {
    "dat_tiny": DATConfig(),
    "dat_small": DATConfig(blocks=SMALL),
    "dat_base": BASE,
    "dat_base_384": DATConfig(128, SMALL, BASE.heads, BASE.groups, window=12, image_size=384),
}


class DAT(nn.Module):
    """DAT with ImageNet's head: from images to logits of classes."""

    def __init__(self, config: DATConfig = CONFIGS["dat_tiny"], num_classes: int = 1000) -> None:
        super().__init__()
        self.config = config
        self.body = DATBody(config)
        self.norm = nn.LayerNorm(self.body.channels[-1])
        self.head = nn.Linear(self.body.channels[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W), normalised as ImageNet's. Returns (B, num_classes)."""
        return self.head(self.norm(self.body(images)[-1]).mean((1, 2)))


class DATBackbone(nn.Module):
    """The last stages of a DAT, as detectors take them: a map of each, normalised.

    stages: how many, from 1 to 4; 3 have strides 8, 16 and 32. The authors' detectors put a norm
    after every stage too; weights of a classifier do not have it, so it starts as it is.
    """

    def __init__(self, config: DATConfig, stages: int = 3) -> None:
        super().__init__()
        if not 1 <= stages <= 4:
            raise ValueError(f"stages must be from 1 to 4, got {stages}")
        self.config = config
        self.body = DATBody(config)
        self.channels = self.body.channels[-stages:]
        self.strides = [4, 8, 16, 32][-stages:]
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in self.channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        """images: (B, 3, H, W). Returns maps (B, channels[i], H_i, W_i), finest first, where H_i is
        H / strides[i], rounded up."""
        maps = self.body(images)[-len(self.norms) :]
        pairs = zip(self.norms, maps, strict=True)
        return [norm(x).permute(0, 3, 1, 2).contiguous() for norm, x in pairs]


class DATBody(nn.Module):
    """The stem and the four stages.

    Its parts are called stem and stage1 to stage4, by which training freezes them. Images may have
    any size from one window of the first stage up, 28 x 28 pixels where windows are of 7. Where a
    size is no multiple of 4 at the stem, or odd between two stages, zeros are added on the right
    and at the bottom, so that every pixel counts; the authors' model takes image_size alone.
    """

    def __init__(self, config: DATConfig) -> None:
        super().__init__()
        self.least = 4 * config.window
        self.channels = [config.embed_dim * 2**i for i in range(4)]
        self.stem = Patches(3, config.embed_dim, 4, bias=True)
        last = max(1, len("".join(config.blocks)) - 1)
        rates = (config.drop_path * block / last for block in range(last + 1))
        self.stage1, self.stage2, self.stage3, self.stage4 = (
            Stage(config, number, rates) for number in range(4)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """images: (B, 3, H, W). Returns the stages' maps (B, H_i, W_i, C_i). ValueError where the
        images are smaller than a window."""
        if min(images.shape[2:]) < self.least:
            size = f"{images.shape[2]} x {images.shape[3]}"
            raise ValueError(
                f"images must be at least {self.least} x {self.least} pixels, which is one window "
                f"of the first stage, got {size}"
            )
        x = self.stem(images.permute(0, 2, 3, 1))
        maps = []
        for stage in (self.stage1, self.stage2, self.stage3, self.stage4):
            x = stage(x)
            maps.append(x)
        return maps


class Stage(Stack):
    """Blocks on one map, which all but the first stage halve before."""

    def __init__(self, config: DATConfig, number: int, rates: Iterator[float]) -> None:
        super().__init__()
        width = config.embed_dim * 2**number
        self.down = Patches(width // 2, width, 2, bias=False) if number else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(width, make_attention(config, number, kind), next(rates))
            for kind in config.blocks[number]
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C / 2) to (B, ceil(H / 2), ceil(W / 2), C); in the first stage, as it comes."""
        x = self.down(x)
        for block in self.blocks:
            x = self.run(block, x)
        return x


def make_attention(config: DATConfig, number: int, kind: str) -> nn.Module:
    """The attention of one block of a stage, numbered from 0."""
    width, heads = config.embed_dim * 2**number, config.heads[number]
    if kind == "D":
        side = config.image_size // 2 ** (number + 2)
        groups, kernel = config.groups[number], KERNELS[number]
        rest = kernel, config.stride, config.offset_range
        return DAttention(width, heads, groups, (side, side), *rest)
    if kind == "P":
        return SpatialReductionAttention(width, heads, REDUCTIONS[number])
    shift = -(-config.window // 2) if kind == "S" else 0  # 4 of 7, where Swin has 3
    return WindowAttention(width, heads, config.window, shift)


class Block(nn.Module):
    """Attention and two linear layers, each normalised before and added after (Eq. 4 and 5)."""

    def __init__(self, embed_dim: int, attention: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(embed_dim), nn.LayerNorm(embed_dim)
        self.attention = attention
        self.linear1 = nn.Linear(embed_dim, 4 * embed_dim)
        self.linear2 = nn.Linear(4 * embed_dim, embed_dim)
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        x = x + self.drop_path(self.attention(self.norm1(x)))
        inner = F.gelu(self.linear1(self.norm2(x)))
        return x + self.drop_path(self.linear2(inner))


class Patches(nn.Module):
    """Squares of a map that do not overlap, each made one pixel, and normalised."""

    def __init__(self, channels_in: int, channels_out: int, side: int, bias: bool) -> None:
        super().__init__()
        self.side = side
        self.linear = nn.Linear(side * side * channels_in, channels_out, bias)
        self.norm = nn.LayerNorm(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, channels_in) to (B, ceil(H / side), ceil(W / side), channels_out)."""
        side = self.side
        x = pad_to_multiple(x, side)
        x = x.unflatten(1, (-1, side)).unflatten(3, (-1, side))  # (B, rows, side, columns, side, C)
        return self.norm(self.linear(x.transpose(2, 3).flatten(3)))


def dat_backbone(
    name: str, dilation: bool, pretrained: bool, deformable_stages: int
) -> DATBackbone:
    """A DAT of CONFIGS as a detector's backbone; ValueError where more is asked of it."""
    if dilation or deformable_stages:
        raise ValueError(f"{name} has neither dilation nor deformable convolutions")
    if pretrained:
        raise ValueError(
            f"{name} has no weights to download: get the authors' file of v1 by way of "
            "github.com/LeapLabTHU/DAT, and give it to deformable_detr.weights.dat.load_backbone"
        )
    return DATBackbone(CONFIGS[name])
