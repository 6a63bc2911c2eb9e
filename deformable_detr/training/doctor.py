"""A self-test before a long training: overfit one batch, and say what is wrong. Chapter 12."""

import copy
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO

import torch
from pycocotools.coco import COCO
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.ops import box_convert
from torchvision.transforms import v2
from tqdm import tqdm

from deformable_detr.boxes import cxcywh_to_xyxy
from deformable_detr.data.checks import check_annotations
from deformable_detr.data.coco import CocoDataset, collate
from deformable_detr.data.picture_checks import look_at, picture_faults
from deformable_detr.evaluation.coco import score
from deformable_detr.inference.postprocess import postprocess
from deformable_detr.losses.criterion import SetCriterion
from deformable_detr.models import BaseDetector
from deformable_detr.structures import Batch
from deformable_detr.training.config import TrainConfig
from deformable_detr.training.faults import all_finite, first_not_finite
from deformable_detr.training.optimiser import parameter_groups

IMAGES = 4  # in the batch
RATE = 1e-3  # for all parameters: high, as nothing has to be learned beyond one batch
WARM_UP = 10  # steps
LOSS_FALLS_TO = 0.4  # of what it was, at most
AP_REACHES = 0.2  # on the batch, at least: dense attention gets to 0.4, deformable to 0.9
ENOUGH_STEPS = 100  # to expect that of a model
PIXELS = 1.5  # by which a box may miss its place: rounding, twice, and resizing by nearest pixels


@dataclass
class Finding:
    """One line of a diagnosis. level: "ok", "warning" or "fatal"."""

    level: str
    text: str


@dataclass
class Diagnosis:
    """What `doctor` found. losses: of each step on the batch. ap: on the batch at the end."""

    findings: list[Finding] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    ap: float = float("nan")

    @property
    def healthy(self) -> bool:
        """Whether nothing fatal was found."""
        return all(finding.level != "fatal" for finding in self.findings)

    def table(self) -> str:
        """All findings, a line each, and a verdict."""
        lines = [f"{finding.level:8} {finding.text}" for finding in self.findings]
        count = Counter(finding.level for finding in self.findings)
        verdict = "ready to train" if self.healthy else "do not train yet"
        return "\n".join(
            [*lines, f"{verdict}: {count['fatal']} fatal, {count['warning']} warnings"]
        )

    def add(self, bad: str, text: str, good: bool = False) -> None:
        """A finding that is "ok" if good, else of the level `bad`."""
        self.findings.append(Finding("ok" if good else bad, text))


def doctor(
    model: BaseDetector,
    dataset: CocoDataset,
    steps: int = 150,
    progress: bool = True,
    seconds: float = 90.0,
) -> Diagnosis:
    """Test data and model together, by overfitting one batch of the data set.

    Looks for faults of the annotations, boxes that a transform moves elsewhere than its pixels,
    parts of the model that get no gradient, infinity and NaN, a loss that does not fall and objects
    that are not found although the model has seen little else. The model is left as it was; the
    transform is applied once, as training would. seconds: what the whole may take; a large model
    gets fewer steps in it, and is judged more mildly. ValueError where steps is less than 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    end = time.monotonic() + seconds
    diagnosis = Diagnosis()
    check_data(diagnosis, dataset, time.monotonic() + seconds / 6)
    classes, categories = model.config.num_classes, len(dataset.categories)
    text = f"the model has {classes} classes, the data {categories} categories"
    diagnosis.add("fatal", text, classes == categories)
    if not diagnosis.healthy:
        return diagnosis
    indices = choose_images(dataset)
    if not indices:
        diagnosis.add("fatal", "no image has a box: there is nothing to learn")
        return diagnosis
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        check_transform(diagnosis, dataset, indices)
        batch = collate([dataset[i] for i in indices])
        check_targets(diagnosis, batch, categories)
        if diagnosis.healthy:
            overfit(diagnosis, model, dataset, batch, steps, progress, end)
    return diagnosis


def check_data(diagnosis: Diagnosis, dataset: CocoDataset, end: float) -> None:
    """The faults of annotations and images by kind; as many images as can be read until `end`."""
    content = dataset.coco.dataset
    faults = check_annotations(content)
    images = random.Random(0).sample(content["images"], len(content["images"]))
    seen = []
    for image in images:
        seen.append(look_at(dataset.pictures, image))
        if time.monotonic() > end:
            break
    faults += picture_faults(dataset.pictures, seen)
    kinds: dict[tuple, list] = {}
    for fault in faults:
        kinds.setdefault((fault.kind, fault.fatal), []).append(fault.message)
    for (kind, fatal), messages in kinds.items():
        diagnosis.add("fatal" if fatal else "warning", f"{len(messages)} x {kind}: {messages[0]}")
    text = f"{len(content['annotations'])} annotations and {len(seen)} of {len(images)} images"
    diagnosis.add("ok", f"{text} checked", good=True)
    if not any(kind == "unused category" for kind, _ in kinds):
        text = f"each of {len(dataset.categories)} categories has boxes"
        diagnosis.add("ok", text, good=True)


def choose_images(dataset: CocoDataset) -> list[int]:
    """A few images with boxes, by index: those that add the most categories come first."""
    wanted: list[int] = []
    seen: set[int] = set()
    candidates = random.Random(0).sample(range(len(dataset)), min(len(dataset), 1000))
    labels = {
        i: {
            annotation["category_id"]
            for annotation in dataset.coco.imgToAnns[dataset.image_ids[i]]
            if not annotation["iscrowd"] and min(annotation["bbox"][2:]) > 0
        }
        for i in candidates
    }
    labels = {i: found for i, found in labels.items() if found}
    while labels and len(wanted) < IMAGES:
        best = max(labels, key=lambda i: len(labels[i] - seen))
        wanted.append(best)
        seen |= labels.pop(best)
    return wanted


def check_transform(diagnosis: Diagnosis, dataset: CocoDataset, indices: list[int]) -> None:
    """Whether boxes move with the pixels, drawn back to the original images."""
    worst, where = 0.0, "no box is left after the transform"
    for index in indices:
        for key, error in box_errors(dataset, index):
            if error >= worst:
                worst, where = error, f"annotation {key}"
    text = f"after the transform boxes lie within {worst:.1f} pixels of their place, {where}"
    diagnosis.add("fatal", text, worst <= PIXELS)


def box_errors(dataset: CocoDataset, index: int) -> Iterator[tuple[int, float]]:
    """By how much each box of an image, with its annotation's id, misses its pixels after the
    transform.

    A map of where each pixel was goes through the transform with the image, as a mask, which keeps
    its values.
    """
    image_id = dataset.image_ids[index]
    image = dataset.load_image(image_id)
    found = [a for a in dataset.coco.imgToAnns[image_id] if not a["iscrowd"]]
    boxes = torch.tensor([a["bbox"] for a in found], dtype=torch.float32)
    boxes[:, 2:] += boxes[:, :2]  # xywh to xyxy
    canvas = image.height, image.width
    boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=canvas)
    boxes = v2.functional.clamp_bounding_boxes(boxes)
    y, x = torch.meshgrid(*(torch.arange(side) + 0.5 for side in canvas), indexing="ij")
    origin = tv_tensors.Mask(torch.stack([x, y]) + 1)  # 0 is left to padding
    _, moved, rows, origin = dataset.transform(image, boxes, torch.arange(len(found)), origin)
    boxes, moved, origin = (value.as_subclass(Tensor) for value in (boxes, moved, origin))
    for row, box in zip(rows.tolist(), moved, strict=True):
        if (box[2:] > box[:2]).all():  # others are dropped
            yield found[row]["id"], misplacement(boxes[row], box, origin - 1)


def misplacement(before: Tensor, after: Tensor, origin: Tensor) -> float:
    """How far a box is from its pixels, in pixels of the original image or, where those are
    smaller, of the transformed one; up to PIXELS is rounding.

    before, after: (4,) xyxy in the original and the transformed image. origin: (2, H, W), the
    original (x, y) of each transformed pixel's centre, -1 on padding.
    """
    inside = (origin >= before[:2, None, None]) & (origin < before[2:, None, None])
    y, x = inside.all(0).nonzero(as_tuple=True)
    if not len(x):  # thinner than a pixel, or not where it says
        return 0.0 if (after[2:] - after[:2]).min() < 2 else torch.inf
    pixels = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1])
    came_from = origin[:, y, x]
    scale = (pixels[2:] - pixels[:2]) / (came_from.amax(1) - came_from.amin(1) + 1)
    return ((after - pixels).abs().max() / scale.max().clamp(min=1)).item()


def check_targets(diagnosis: Diagnosis, batch: Batch, categories: int) -> None:
    """Whether boxes and labels are in range as the model gets them."""
    boxes = torch.cat([target.boxes for target in batch.targets])
    labels = torch.cat([target.labels for target in batch.targets])
    corners = cxcywh_to_xyxy(boxes)
    inside = (corners > -1e-3).all() and (corners < 1 + 1e-3).all() and (boxes[:, 2:] > 0).all()
    text = f"{len(boxes)} boxes of the batch in [0, 1] and of some size"
    diagnosis.add("fatal", text, bool(inside))
    known = bool(((labels >= 0) & (labels < categories)).all())
    diagnosis.add("fatal", f"their labels in [0, {categories})", known)
    if not len(boxes):
        diagnosis.add("fatal", "the transform leaves no box in the batch")


def overfit(
    diagnosis: Diagnosis,
    model: BaseDetector,
    dataset: CocoDataset,
    batch: Batch,
    steps: int,
    progress: bool,
    end: float,
) -> None:
    """Train a copy of the model on the batch, and judge how that went."""
    model = without_dropout(copy.deepcopy(model)).train()
    batch = batch.to(next(model.parameters()).device)
    same_rate = TrainConfig(lr=RATE, backbone_lr=RATE, sampling_lr_factor=1.0)
    optimizer = torch.optim.AdamW(parameter_groups(model, same_rate), weight_decay=0.0)
    criterion, touched = SetCriterion(), set()
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
        if time.monotonic() > end:
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
        text = f"{len(still)} parameters had no gradient, such as {still[0]}"
        diagnosis.add("warning", text)


def judge_learning(diagnosis: Diagnosis) -> None:
    """Whether the loss fell and the batch's objects are found; mildly after only a few steps."""
    losses, ap = diagnosis.losses, diagnosis.ap
    enough = len(losses) >= ENOUGH_STEPS
    last = sum(losses[-5:]) / len(losses[-5:])
    text = f"loss from {losses[0]:.2f} to {last:.2f} in {len(losses)} steps on one batch"
    if not enough:
        text += f", too few to expect what {ENOUGH_STEPS} bring"
    bad = "fatal" if enough else "warning"
    expected = f"expected: to {LOSS_FALLS_TO:.0%} or less"
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
        scale = target.boxes.new_tensor([width, height, width, height])
        truth = cxcywh_to_xyxy(target.boxes) * scale
        for boxes, labels, scores, into in (
            (truth, target.labels, torch.ones(len(truth)), annotations),
            (found.boxes, found.labels, found.scores, results),
        ):
            into += [
                {"image_id": image, "category_id": ids[label], "bbox": box, "score": value}
                for box, label, value in zip(
                    box_convert(boxes, "xyxy", "xywh").tolist(),
                    labels.tolist(),
                    scores.tolist(),
                    strict=True,
                )
            ]
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
