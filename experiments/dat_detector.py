"""A small DAT and the small ResNet as the detector's backbone, at equal cost.

    python experiments/dat_detector.py      # about half an hour of a core

Both have maps of strides 4, 8 and 16 and cost about as many multiply-adds; the DAT has windows on
the first two, and a window and moved keys on the last. Each learns to tell crops of digits apart
first, as the shipped backbone did, and is then part of the same detector, of two maps and two
stages. Both have the same two learning rates to choose from; at half the lower one, tried with one
seed, both learned less.
"""

import dataclasses
import json
import time
from pathlib import Path

import torch
from convergence import TWO_MAPS
from detectors import DATA, SIDE, Detector, describe, train_detector
from digits import CropClassifier, crop_accuracy, load_crops, teach_crops
from safetensors.torch import save_file
from segmentation import OfBatch
from study import Row, Study, row
from study import main as run
from torch import Tensor, nn

from deformable_detr.backbones import BACKBONES, build_backbone
from deformable_detr.backbones.dat import DATBackbone, DATConfig
from deformable_detr.evaluation.complexity import count
from deformable_detr.files import write_atomically, write_json

CROPS, CROP_STEPS, STEPS = 6000, 800, 450
RESNET, DAT = "small", "three stages of a DAT"
CONFIG = DATConfig(
    embed_dim=24,
    blocks=("WS", "S", "WD", ""),
    heads=(1, 2, 4, 8),
    groups=(1, 1, 2, 4),
    window=4,
    image_size=SIDE,
)


class ThreeStages(DATBackbone):
    """A DAT's first three stages."""

    def __init__(self) -> None:
        super().__init__(CONFIG, stages=4)
        self.body.stage4 = nn.Identity()
        self.channels, self.strides, self.norms = self.channels[:3], [4, 8, 16], self.norms[:3]

    def forward(self, images: Tensor) -> list[Tensor]:
        """images: (B, 3, H, W). Returns three maps (B, channels[i], H_i, W_i), finest first."""
        pairs = zip(self.norms, self.body(images)[:3], strict=True)
        return [norm(x).permute(0, 3, 1, 2).contiguous() for norm, x in pairs]


BACKBONES[DAT] = lambda *_: ThreeStages()


def train_with_backbone(detector: Detector, seed: int, folder: Path) -> list[Row]:
    """The rows of one training: of the backbone on crops, and then of the whole."""
    torch.manual_seed(seed)
    model = CropClassifier(build_backbone(detector.resolved(seed).model["backbone"]))
    taught, card = folder / "backbone.safetensors", folder / "backbone.json"
    if not card.exists():
        began = time.process_time()
        teach_crops(model, load_crops("train", CROPS), CROP_STEPS, progress=False)
        seconds = time.process_time() - began
        write_atomically(taught, lambda path: save_file(model.backbone.state_dict(), path))
        write_json(card, {"accuracy": crop_accuracy(model.eval()), "seconds": round(seconds, 1)})
    found = json.loads(card.read_text())
    rows = train_detector(dataclasses.replace(detector, weights=taught), seed, folder)
    multiply_adds, _ = count(OfBatch(model.backbone), (SIDE, SIDE))
    return [
        *(
            row("crops", stride, "accuracy", accuracy)
            for stride, accuracy in zip((8, 16, 32), found["accuracy"], strict=True)
        ),
        row("crops", CROP_STEPS, "cpu_seconds", found["seconds"]),
        *rows,
        row("model", STEPS, "multiply_adds_of_backbone", multiply_adds),
    ]


def with_backbone(name: str, rate: float) -> Detector:
    """The detector with two maps and two stages, and one learning rate for all of it."""
    settings = f"model.backbone={name}", f"train.lr={rate}", f"train.backbone_lr={rate}"
    return Detector(settings=(*TWO_MAPS, *settings), steps=STEPS, evaluations=6)


STUDY = Study(
    name="dat_detector",
    question="AP of one detector with a small ResNet or a small DAT, both taught on crops first",
    configurations={
        "small ResNet": with_backbone(RESNET, 1e-3),
        "small DAT": with_backbone(DAT, 1e-3),
        "small DAT at 0.002": with_backbone(DAT, 2e-3),
        "small ResNet at 0.002": with_backbone(RESNET, 2e-3),
    },
    seeds=(0, 1, 2),
    trial=train_with_backbone,
    usual=140,
    describe=describe,
    headline=("test", "ap"),
    data=DATA,
)


def main() -> None:
    """The command."""
    run(("dat_detector",))


if __name__ == "__main__":
    main()
