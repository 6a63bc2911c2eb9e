"""Ink or none, for every pixel: a small ResNet against a small DAT, with Semantic FPN and UPerNet.

    python data/make_digits.py --masks         # once
    python experiments/segmentation.py         # about three minutes of a core

Both backbones start from random weights, cost about as many multiply-adds, and see the same images
in the same order. Which digit it is they cannot learn in so short a time (a first trial, with
eleven classes and 320 steps, came to an IoU of 0.02 on the digits), so there are two classes: ink,
and none. mIoU, by scikit-learn: of each class, the pixels that prediction and mask share over
those that one of them has; their mean.
"""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from digits import DATA
from sklearn.metrics import jaccard_score
from study import Study, row
from study import main as run
from torch import Tensor, nn
from torch.utils.data import DataLoader

from deformable_detr.backbones import build_backbone
from deformable_detr.backbones.dat import DATBackbone, DATConfig
from deformable_detr.data.masks import MaskDataset
from deformable_detr.evaluation.complexity import count
from deformable_detr.evaluation_mode import evaluating
from deformable_detr.models.semantic_fpn import SemanticFPN
from deformable_detr.models.upernet import UPerNet
from deformable_detr.structures import Batch

SIDE = 128  # pixels of a scene
DIGITS = 11  # classes of the masks: 0 for what no digit covers, and ten
CLASSES = 2  # that are learned: 0, and all others as one
ON_THE_WAY, AT_THE_END = 50, 200  # images of val, and of test
# as DAT-T, which has windows in two stages and moved keys in two, with fewer blocks and channels
DAT_CONFIG = DATConfig(
    embed_dim=24,
    blocks=("W", "S", "WD", "D"),
    heads=(1, 2, 4, 8),
    groups=(1, 1, 2, 4),
    window=4,
    image_size=SIDE,
)
BACKBONES = {
    "small ResNet": partial(build_backbone, "small"),
    "small DAT": partial(DATBackbone, DAT_CONFIG, stages=4),
}
HEADS = {
    "Semantic FPN": partial(SemanticFPN, num_classes=CLASSES, width=32, pyramid_width=48),
    "UPerNet": partial(UPerNet, num_classes=CLASSES, width=32),
}


@dataclass(frozen=True)
class Segmenter:
    """A model and its training: AdamW with a rate that rises for a tenth of the steps and falls to
    zero; the measurements on val are at equal distances."""

    backbone: str
    head: str
    steps: int = 120
    batch_size: int = 8
    rate: float = 2e-3
    evaluations: int = 2

    def build(self, seed: int) -> nn.Module:
        """The new model."""
        torch.manual_seed(seed)
        return HEADS[self.head](BACKBONES[self.backbone]())


class OfBatch(nn.Module):
    """A network of images, as the instrument calls it: with a batch."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: Batch) -> Tensor:
        """What the network makes of the batch's images."""
        return self.network(batch.images)


def split(name: str) -> MaskDataset:
    """The images of a split and their masks."""
    masks = DATA / "masks" / name
    if not masks.exists():
        raise FileNotFoundError(f"no {masks}: run `python data/make_digits.py --masks`")
    return MaskDataset(DATA / name, masks, DIGITS)


def batches(segmenter: Segmenter, seed: int) -> DataLoader:
    """A training's images, drawn with replacement; the same for all models of one seed."""
    data = split("train")
    order = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(data), (segmenter.steps, segmenter.batch_size), generator=order)
    return DataLoader(data, batch_sampler=draws.tolist())


def train(segmenter: Segmenter, seed: int, folder: Path) -> list[dict]:
    """The rows of one training."""
    began, rows, losses = time.process_time(), [], []
    model = segmenter.build(seed).train()
    optimiser = torch.optim.AdamW(model.parameters(), segmenter.rate, weight_decay=0.05)
    rates = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, segmenter.rate, total_steps=segmenter.steps, pct_start=0.1
    )
    for step, (images, masks) in enumerate(batches(segmenter, seed), 1):
        loss = F.cross_entropy(model(images), masks.clamp(max=1))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        rates.step()
        losses.append(loss.item())
        if step % (segmenter.steps // segmenter.evaluations) == 0:
            rows.append(row("train", step, "loss", sum(losses) / len(losses)))
            rows += measure(model, "val", step, ON_THE_WAY)
            losses.clear()
    rows += measure(model.eval(), "test", segmenter.steps, AT_THE_END)
    multiply_adds, _ = count(OfBatch(model), (SIDE, SIDE))
    backbone, _ = count(OfBatch(model.backbone), (SIDE, SIDE))
    values = {"multiply_adds": multiply_adds, "multiply_adds_of_backbone": backbone}
    values["parameters"] = sum(p.numel() for p in model.parameters())
    values["cpu_seconds_in_all"] = round(time.process_time() - began, 1)
    return rows + [row("model", segmenter.steps, name, value) for name, value in values.items()]


@torch.no_grad()
def measure(model: nn.Module, name: str, step: int, images: int) -> list[dict]:
    """mIoU on the first images of a split, and the IoU of the ink alone."""
    data = split(name)
    data.names = data.names[:images]
    given, found = [], []
    with evaluating(model):
        for pictures, masks in DataLoader(data, 50):
            given.append(masks.clamp(max=1).flatten())
            found.append(model(pictures).argmax(1).flatten())
    each = jaccard_score(
        torch.cat(given), torch.cat(found), labels=range(CLASSES), average=None, zero_division=0.0
    )
    return [
        row(name, step, "miou", float(each.mean())),
        row(name, step, "iou_of_ink", float(each[1])),
    ]


STUDY = Study(
    name="segmentation",
    question="mIoU of ink and none after 120 steps from random weights, by backbone and head",
    configurations={
        f"{backbone}, {head}": Segmenter(backbone, head) for head in HEADS for backbone in BACKBONES
    },
    seeds=(0, 1),
    trial=train,
    usual=22,
    headline=("test", "miou"),
    data=DATA,
)


def main() -> None:
    """The command."""
    run(("segmentation",))


if __name__ == "__main__":
    main()
