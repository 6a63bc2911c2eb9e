"""Learning one batch by heart: what a sound model can do within minutes. Chapter your_own_data."""

import copy
import time
from contextlib import redirect_stdout
from io import StringIO

import torch
from pycocotools.coco import COCO
from torch import nn
from tqdm import tqdm

from deformable_detr.boxes import cxcywh_to_xyxy
from deformable_detr.data.coco import CocoDataset
from deformable_detr.data.names import counted
from deformable_detr.evaluation.coco import score
from deformable_detr.inference.postprocess import as_results, postprocess
from deformable_detr.losses.criterion import SetCriterion
from deformable_detr.models import BaseDetector
from deformable_detr.structures import Batch, Detections
from deformable_detr.training.config import TrainConfig
from deformable_detr.training.diagnosis import Diagnosis
from deformable_detr.training.faults import all_finite, first_not_finite
from deformable_detr.training.optimiser import parameter_groups

RATE = 1e-3  # for all parameters: high, as nothing has to be learned beyond one batch
WARM_UP = 10  # steps
LOSS_FALLS_TO = 0.4  # of what it was, at most
AP_REACHES = 0.2  # on the batch, at least: dense attention gets to 0.4, deformable to 0.9
ENOUGH_STEPS = 100  # to expect that of a model


def overfit(
    diagnosis: Diagnosis,
    model: BaseDetector,
    dataset: CocoDataset,
    batch: Batch,
    steps: int,
    progress: bool,
    end: float,
) -> None:
    """Train a copy of the model on the batch, and judge how that went; at `end`, a time of
    time.monotonic, it breaks off."""
    model = without_dropout(copy.deepcopy(model)).train()
    batch = batch.to(next(model.parameters()).device)
    same_rate = TrainConfig(lr=RATE, backbone_lr=RATE, sampling_lr_factor=1.0)
    optimizer = torch.optim.AdamW(parameter_groups(model, same_rate), weight_decay=0.0)
    criterion, touched = SetCriterion(), set()
    begun = time.monotonic()
    for step in tqdm(range(steps), "overfit one batch", unit="step", disable=not progress):
        output = model(batch)
        loss = sum(criterion(output, batch.targets).values()) if all_finite(output) else None
        if loss is None or not loss.isfinite():
            where = first_not_finite(model, batch)
            diagnosis.add("fatal", f"the loss is not finite at step {step + 1}: {where}")
            return
        optimizer.zero_grad()
        loss.backward()
        learning = ((name, p.grad) for name, p in model.named_parameters() if p.requires_grad)
        touched |= {name for name, grad in learning if grad is not None and grad.any()}
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / WARM_UP)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        diagnosis.losses.append(loss.item())
        now = time.monotonic()
        if step == 0:
            begun, diagnosis.step_seconds = now, now - begun  # of the first step, which is slower
        else:
            diagnosis.step_seconds = (now - begun) / step
        if now > end:
            break
    judge_gradients(diagnosis, model, touched)
    diagnosis.ap = batch_ap(model.eval(), dataset, batch)
    judge_learning(diagnosis)


def judge_gradients(diagnosis: Diagnosis, model: nn.Module, touched: set[str]) -> None:
    """Whether each part of the model got a gradient that is not zero in some step."""
    diagnosis.add("ok", "loss and gradients finite", good=True)
    learning = [name for name, p in model.named_parameters() if p.requires_grad]
    parts = sorted({name.split(".")[0] for name in learning})
    silent = [p for p in parts if not any(n.split(".")[0] == p for n in touched)]
    text = f"no gradient reaches {silent}" if silent else f"gradients reach {', '.join(parts)}"
    # heads and sampling start at zero: some gradients come with the second step
    bad = "fatal" if len(diagnosis.losses) > 2 else "warning"
    diagnosis.add(bad, text, not silent)
    still = [name for name in learning if name not in touched and name.split(".")[0] not in silent]
    if still:
        text = f"{counted(len(still), 'parameter')} had no gradient, such as {still[0]}"
        diagnosis.add("warning", text)


def judge_learning(diagnosis: Diagnosis) -> None:
    """Whether the loss fell and the batch's objects are found; mildly after only a few steps."""
    losses, ap = diagnosis.losses, diagnosis.ap
    enough = len(losses) >= ENOUGH_STEPS
    last = sum(losses[-5:]) / len(losses[-5:])
    text = f"loss from {losses[0]:.2f} to {last:.2f} in {counted(len(losses), 'step')} on one batch"
    expected = f"expected: to {LOSS_FALLS_TO:.0%} or less"
    if not enough:
        expected += f", after {ENOUGH_STEPS} steps at the latest"
    bad = "fatal" if enough else "warning"
    diagnosis.add(bad, f"{text} ({expected})", last <= LOSS_FALLS_TO * losses[0])
    text = f"AP {ap:.2f} on that batch (expected: {AP_REACHES} or more)"
    diagnosis.add(bad, text, ap >= AP_REACHES)


@torch.no_grad()
def batch_ap(model: BaseDetector, dataset: CocoDataset, batch: Batch) -> float:
    """AP on a batch by the data's own category ids, as `evaluate` has it on a data set; the
    transformed images count as the originals."""
    sizes = [tuple(size) for size in batch.sizes.tolist()]
    ids = [category["id"] for category in dataset.categories]
    annotations, results = [], []
    for image, found in enumerate(postprocess(model(batch), sizes)):
        target, (height, width) = batch.targets[image], sizes[image]
        boxes = cxcywh_to_xyxy(target.boxes)
        scale = boxes.new_tensor([width, height, width, height])
        nobody = torch.zeros_like(target.labels)  # truth has neither scores nor queries
        truth = Detections(nobody.float(), target.labels, boxes * scale, nobody)
        for each, into in ((truth, annotations), (found, results)):
            into += as_results(each, image, [ids[label] for label in each.labels.tolist()])
    for key, annotation in enumerate(annotations, 1):
        area = annotation["bbox"][2] * annotation["bbox"][3]
        annotation |= {"id": key, "area": area, "iscrowd": 0}
    images = [{"id": image, "file_name": ""} for image in range(len(batch))]
    part = copy.copy(dataset)  # the same categories
    part.image_ids, part.coco = list(range(len(batch))), COCO()
    part.coco.dataset = {
        "images": images,
        "annotations": annotations,
        "categories": dataset.categories,
    }
    with redirect_stdout(StringIO()):
        part.coco.createIndex()
    return score(results, part).ap


def without_dropout(model: nn.Module) -> nn.Module:
    """The same model with all its dropout set to zero."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return model
