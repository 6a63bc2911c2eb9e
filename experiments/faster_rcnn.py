"""How fast does a detector with anchors and suppression learn? torchvision's Faster R-CNN with FPN,
on the backbone, the images and the schedule of experiments/convergence.py.

    python experiments/faster_rcnn.py

It has three learning rates, of which the best on val counts. Its maps have strides 4, 8 and 16, and
a pooled one; widths are those of the other detectors.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from ablations import Pyramid
from detectors import AT_THE_END, DATA, ON_THE_WAY, SIDE, Draws, first_images, measure
from digits import BACKBONE
from safetensors.torch import load_file
from study import Row, Study, row
from study import main as run
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import box_convert

from deformable_detr.backbones import build_backbone
from deformable_detr.boxes import cxcywh_to_xyxy
from deformable_detr.data.coco import find_split
from deformable_detr.structures import Batch, Output
from deformable_detr.training.batches import load_batches
from deformable_detr.training.optimiser import lr_factor
from deformable_detr.training.recipe import load_recipe

WIDTH, INSIDE, FOUND = 64, 256, 100  # of the maps, of the box head; detections per image
ANCHORS = ((8,), (16,), (32,), (64,))  # sides in pixels, by level


@dataclass(frozen=True)
class Anchored:
    """A training, of as many images as those of experiments/convergence.py."""

    learning_rate: float
    steps: int = 450
    evaluations: int = 6


class Maps(Pyramid):
    """The pyramid, and its coarsest map pooled, by name, as torchvision has it."""

    out_channels = WIDTH

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """images: (B, 3, H, W). Returns (B, WIDTH, H_i, W_i), finest first."""
        maps = super().forward(images)
        return dict(zip("012p", [*maps, maps[-1][:, :, ::2, ::2]], strict=True))


class Anchors(nn.Module):
    """Faster R-CNN as the evaluation and the counting call a detector; in training it returns its
    losses by name."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        backbone = build_backbone("small")
        backbone.load_state_dict(load_file(BACKBONE))
        self.classes = classes
        self.network = FasterRCNN(
            Maps(backbone, 3, WIDTH),
            rpn_anchor_generator=AnchorGenerator(ANCHORS, ((0.5, 1.0, 2.0),) * len(ANCHORS)),
            box_head=TwoMLPHead(WIDTH * 7 * 7, INSIDE),
            box_predictor=FastRCNNPredictor(INSIDE, classes + 1),  # one is background
            min_size=SIDE,
            max_size=SIDE,
            image_mean=[0, 0, 0],  # images come normalised
            image_std=[1, 1, 1],
            rpn_pre_nms_top_n_train=500,
            rpn_pre_nms_top_n_test=500,
            rpn_post_nms_top_n_train=100,
            rpn_post_nms_top_n_test=100,
            box_batch_size_per_image=32,
            box_score_thresh=0.001,
            box_detections_per_img=FOUND,
        )

    def forward(self, batch: Batch) -> dict[str, Tensor] | Output:
        """In evaluation: a query for each detection, with a score for its class alone."""
        if self.training:
            objects = [
                {"boxes": cxcywh_to_xyxy(t.boxes) * SIDE, "labels": t.labels + 1}
                for t in batch.targets
            ]
            return self.network(list(batch.images), objects)
        found = self.network(list(batch.images))
        boxes = torch.zeros(len(found), FOUND, 4)
        logits = torch.full((len(found), FOUND, self.classes), -torch.inf)
        for i, each in enumerate(found):
            count = len(each["scores"])
            boxes[i, :count] = box_convert(each["boxes"], "xyxy", "cxcywh") / SIDE
            logits[i, torch.arange(count), each["labels"] - 1] = each["scores"].logit()
            logits[i, count:, 0] = -50.0  # of boxes without a size, behind all others
        return Output(logits, boxes)


def train_anchors(anchored: Anchored, seed: int, folder: Path) -> list[Row]:
    """The rows of one training; one that was killed begins anew."""
    recipe = load_recipe("digits").changed([f"train.seed={seed}"])
    evaluation, per_epoch = recipe.eval_transform(), anchored.steps // anchored.evaluations
    draws = Draws(*find_split(DATA, "train"), recipe.train_transform())
    draws.length = per_epoch * recipe.train.batch_size
    torch.manual_seed(seed)
    model = Anchors(len(draws.categories))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=recipe.train.weight_decay)
    steps = range(anchored.steps)
    rows, spent, began = [], 0.0, time.process_time()
    for step, (batch,) in enumerate(
        load_batches(draws, recipe.train, steps, per_epoch, 0, 1), start=1
    ):
        factor = lr_factor(step - 1, anchored.steps, per_epoch, recipe.train)
        optimizer.param_groups[0]["lr"] = anchored.learning_rate * factor
        loss = sum(model.train()(batch).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.train.clip_norm)
        optimizer.step()
        if step % per_epoch == 0:
            spent += time.process_time() - began
            rows.append(row("train", step, "cpu_seconds", round(spent, 2)))
            rows.append(row("train", step, "loss", loss.item()))
            rows += measured(model, "val", evaluation, step, ON_THE_WAY)
            began = time.process_time()
    size = sum(p.numel() for p in model.parameters())
    return [
        *rows,
        *measured(model, "test", evaluation, anchored.steps, AT_THE_END),
        row(
            "model", anchored.steps, "multiply_adds", multiply_adds(model, first_images(evaluation))
        ),
        row("model", anchored.steps, "parameters", size),
    ]


def measured(model: Anchors, split: str, transform: object, step: int, images: int) -> list[Row]:
    """As of the other detectors."""
    found = measure(model, split, transform, FOUND, images)
    return [row(split, step, name, value) for name, value in found.items()]


@torch.no_grad()
def multiply_adds(model: Anchors, batch: Batch) -> int:
    """Of an image in the mean; how many proposals it has, of 100 at most, the model decides."""
    with FlopCounterMode(display=False) as counter:
        model.eval()(batch)
    return counter.get_total_flops() // (2 * len(batch))


STUDY = Study(
    name="faster_rcnn",
    question="AP against images: Faster R-CNN with FPN at three learning rates",
    configurations={f"Faster R-CNN, {r:g}": Anchored(r) for r in (1e-3, 5e-4, 2e-4)},
    seeds=(0, 1, 2),
    trial=train_anchors,
    usual=175,
    headline=("val", "ap"),
    data=DATA,
)


def main() -> None:
    """The command."""
    run(("faster_rcnn",))


if __name__ == "__main__":
    main()
