"""A self-test before a long training: data, transform and model together. Chapter your_own_data."""

import math
import random
import time

import torch

from deformable_detr.boxes import cxcywh_to_xyxy
from deformable_detr.data.checks import check_annotations
from deformable_detr.data.coco import CocoDataset, collate
from deformable_detr.data.names import counted
from deformable_detr.data.picture_checks import look_at, picture_faults
from deformable_detr.models import BaseDetector
from deformable_detr.structures import Batch
from deformable_detr.training.batches import count_steps
from deformable_detr.training.config import TrainConfig
from deformable_detr.training.diagnosis import Diagnosis
from deformable_detr.training.overfit import overfit
from deformable_detr.training.pace import Plan
from deformable_detr.training.placement import placements

IMAGES = 4  # in the batch
PIXELS = 0.5  # of the transformed image, by which a box may miss its place: rounding to whole ones
FAR = 2.0  # of those, from which it cannot be learned well


def doctor(
    model: BaseDetector,
    dataset: CocoDataset,
    steps: int = 150,
    progress: bool = True,
    seconds: float = 90.0,
    config: TrainConfig | None = None,
    val_images: int = 0,
) -> Diagnosis:
    """Test data and model together, by overfitting one batch of the data set.

    Looks for faults of the annotations, boxes that a transform moves elsewhere than its pixels,
    parts of the model that get no gradient, infinity and NaN, a loss that does not fall and objects
    that are not found although the model has seen little else. The model is left as it was; the
    transform is applied once, as training would. seconds: what the whole may take; a large model
    gets fewer steps in it, and is judged more mildly. config, val_images: of the training to come,
    whose hours are then estimated. ValueError where steps is less than 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    end = time.monotonic() + seconds
    diagnosis = Diagnosis()
    check_data(diagnosis, dataset, model.config.num_queries, time.monotonic() + seconds / 6)
    classes, categories = model.config.num_classes, len(dataset.categories)
    text = f"the model has {counted(classes, 'class')}, the data {counted(categories, 'category')}"
    diagnosis.add("fatal", text, classes == categories)
    plan = make_plan(diagnosis, dataset, config, val_images)
    if not diagnosis.healthy:
        return diagnosis
    indices = choose_images(dataset)
    if not indices:
        diagnosis.add("fatal", "no image has a box: there is nothing to learn")
        return diagnosis
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        check_transform(diagnosis, dataset, indices)
        if not diagnosis.healthy:  # an image that cannot be read cannot be learned either
            return diagnosis
        begun = time.monotonic()
        batch = collate([dataset[i] for i in indices])
        loading = (time.monotonic() - begun) / len(indices)
        check_targets(diagnosis, batch, categories)
        if diagnosis.healthy:
            overfit(diagnosis, model, dataset, batch, steps, progress, end)
    if diagnosis.losses and plan:
        estimate(diagnosis, plan, diagnosis.step_seconds / len(indices), loading)
    return diagnosis


def make_plan(
    diagnosis: Diagnosis, dataset: CocoDataset, config: TrainConfig | None, val_images: int
) -> Plan | None:
    """The steps of the training to come; that it has none is fatal."""
    try:
        return config and Plan(config, count_steps(len(dataset), config, 1), val_images)
    except ValueError as error:
        diagnosis.add("fatal", str(error))
        return None


def check_data(diagnosis: Diagnosis, dataset: CocoDataset, num_queries: int, end: float) -> None:
    """The faults of annotations and images by kind; as many images as can be read until `end`.

    num_queries: of the model, which cannot find more objects in an image.
    """
    content = dataset.coco.dataset
    faults = check_annotations(content, num_queries)
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
        text = f"{len(messages)} x {kind}, the first: " * (len(messages) > 1) + messages[0]
        diagnosis.add("fatal" if fatal else "warning", text, count=len(messages))
    text = counted(len(content["annotations"]), "annotation")
    text += f" and {len(seen)} of {counted(len(images), 'image')}"
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
    """Whether boxes move with their pixels."""
    try:
        found = [each for index in indices for each in placements(dataset, index)]
    except (ValueError, FileNotFoundError) as error:
        diagnosis.add("fatal", str(error))
        return
    measured = [each for each in found if not math.isnan(each.error)]
    if not measured:
        why = "bends images, so that nobody knows where boxes belong" if found else "leaves no box"
        diagnosis.add("warning", f"the transform {why}: their places are not checked")
        return
    worst = max(measured, key=lambda each: each.error)
    off = sum(each.error > PIXELS for each in measured)
    text = f"boxes move with their pixels: {len(measured)} seen, off by {worst.error:.2f} at most"
    if off:
        text = (
            f"the transform misplaces {off} of {len(measured)} boxes: that of annotation "
            f"{worst.annotation_id} by {worst.error:.1f} pixels, expected {PIXELS} at most"
        )
    diagnosis.add("fatal" if worst.error > FAR else "warning", text, not off)


def check_targets(diagnosis: Diagnosis, batch: Batch, categories: int) -> None:
    """Whether boxes and labels are in range as the model gets them."""
    boxes = torch.cat([target.boxes for target in batch.targets])
    labels = torch.cat([target.labels for target in batch.targets])
    corners = cxcywh_to_xyxy(boxes)
    inside = (corners > -1e-3).all() and (corners < 1 + 1e-3).all() and (boxes[:, 2:] > 0).all()
    text = f"{counted(len(boxes), 'box')} of the batch in [0, 1] and of some size"
    diagnosis.add("fatal", text, bool(inside))
    known = bool(((labels >= 0) & (labels < categories)).all())
    diagnosis.add("fatal", f"their labels in [0, {categories})", known)
    if not len(boxes):
        diagnosis.add("fatal", "the transform leaves no box in the batch")


def estimate(diagnosis: Diagnosis, plan: Plan, per_image: float, loading: float) -> None:
    """How long the training takes, by the seconds in which the batch's images were loaded and
    learned, each."""
    config = plan.config
    per_image += 0 if config.num_workers else loading  # workers load while the model learns
    per_step = per_image * config.batch_size * config.accumulate
    text = f"{counted(config.epochs, 'epoch')} of {counted(plan.steps_per_epoch, 'step')}, "
    text += f"about {per_step:.3g} s each"
    if plan.evaluations():
        text += f", and {counted(plan.evaluations(), 'evaluation')}"
    diagnosis.add("ok", f"training takes about {duration(plan.seconds(per_step))}: {text}", True)


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds:.0f} seconds"
