"""What matters? One thing changed at a time, from two maps with two stages.

    python experiments/ablations.py

Table 2 of "Deformable DETR" at the digits' scale, and what the paper says without a table.
"""

import dataclasses
import math
from collections.abc import Callable

import torch
from detectors import DATA, Detector, describe, train_detector
from study import Study
from study import main as run
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from deformable_detr.layers.attention import MSDeformAttn, Sampling
from deformable_detr.models import BaseDetector
from deformable_detr.models.tokens import MultiScaleTokens

BASE = Detector(settings=("model.num_levels=2",))


def with_settings(*settings: str) -> Detector:
    """The base with other settings, of which the last counts."""
    return dataclasses.replace(BASE, settings=BASE.settings + settings)


def zero_offsets(model: BaseDetector) -> None:
    """All points start at the reference."""
    for module in model.modules():
        if isinstance(module, MSDeformAttn):
            nn.init.zeros_(module.sampling_offsets.bias)


def random_offsets(model: BaseDetector) -> None:
    """Points start in random directions, with the distances of the star."""
    for module in model.modules():
        if isinstance(module, MSDeformAttn):
            M, L, K = module.num_heads, module.num_levels, module.num_points
            angle = 2 * math.pi * torch.rand(M, L, K)
            direction = torch.stack([angle.cos(), angle.sin()], -1)
            distance = torch.arange(1, K + 1)[:, None]
            module.sampling_offsets.bias.data.copy_((direction * distance).flatten())


def shared_heads(model: BaseDetector) -> None:
    """One head for all layers of the decoder, as without refinement."""
    model.class_heads, model.box_heads = model.class_heads[:1], model.box_heads[:1]


def open_gradient(model: BaseDetector) -> None:
    """The gradient flows through the boxes from layer to layer."""
    model.decoder.next_references = lambda queries, delta, boxes, box_head: (boxes, boxes)


class Pyramid(nn.Module):
    """A backbone's last maps, and torchvision's feature pyramid on them, all of one width."""

    def __init__(self, backbone: nn.Module, maps: int, width: int) -> None:
        super().__init__()
        self.backbone, self.channels, self.strides = backbone, [width] * maps, backbone.strides
        self.fpn = FeaturePyramidNetwork(backbone.channels[-maps:], width)

    def forward(self, images: Tensor) -> list[Tensor]:
        """images: (B, 3, H, W). Returns maps (B, width, H_i, W_i), finest first."""
        maps = self.backbone(images)[-len(self.channels) :]
        return list(self.fpn({str(i): x for i, x in enumerate(maps)}).values())


def with_fpn(model: BaseDetector) -> None:
    """Coarse maps are added to finer ones before the encoder sees them."""
    C, L = model.config.embed_dim, model.config.num_levels
    model.backbone = Pyramid(model.backbone, L, C)
    model.neck = MultiScaleTokens(model.backbone.channels, L, C, model.position_encoding())
    model.neck.reset_parameters()


def weights_per_level(model: BaseDetector) -> None:
    """Each level has the same share of the attention, and a softmax of its own."""
    for module in model.modules():
        if isinstance(module, MSDeformAttn):
            module.sampling = each_level_alone(module.sampling)


def each_level_alone(sampling: Callable[..., Sampling]) -> Callable[..., Sampling]:
    """A module's `sampling`, whose weights sum to 1 / L on each level."""

    def call(*arguments: object) -> Sampling:
        found = sampling(*arguments)
        L = found.weights.shape[-2]
        found.weights = found.weights / (L * found.weights.sum(-1, keepdim=True))
        return found

    return call


STUDY = Study(
    name="ablations",
    question="what each choice is worth, against two maps with two stages, after 300 steps",
    configurations={
        "base": BASE,
        "one map": with_settings("model.num_levels=1"),
        "K = 1": with_settings("model.num_points=1"),
        "K = 2": with_settings("model.num_points=2"),
        "K = 8": with_settings("model.num_points=8"),
        "offsets start at zero": dataclasses.replace(BASE, change=zero_offsets),
        "offsets start at random": dataclasses.replace(BASE, change=random_offsets),
        "offsets learn x 0.1": with_settings("train.sampling_lr_factor=0.1"),
        "first boxes 0.05": with_settings("model.anchor_size=0.05"),
        "first boxes 0.2": with_settings("model.anchor_size=0.2"),
        "shared heads": dataclasses.replace(BASE, change=shared_heads),
        "gradient through boxes": dataclasses.replace(BASE, change=open_gradient),
        "three maps": with_settings("model.num_levels=3"),
        "FPN on the maps": dataclasses.replace(BASE, change=with_fpn),
        "weights per level": dataclasses.replace(BASE, change=weights_per_level),
    },
    seeds=(0, 1, 2, 3, 4),
    trial=train_detector,
    usual=60,
    seconds={"one map": 45, "three maps": 100},
    describe=describe,
    headline=("test", "ap"),
    data=DATA,
)


def main() -> None:
    """The command."""
    run(("ablations",))


if __name__ == "__main__":
    main()
