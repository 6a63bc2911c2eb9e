"""What a detector gets wrong: metrics, curves, confusions, kinds of errors, the worst images.

Chapter your_own_data reads one.
"""

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pycocotools.cocoeval import COCOeval

from deformable_detr.data.coco import CocoDataset
from deformable_detr.data.crowding import QUERIES, TOP_K, crowding
from deformable_detr.data.names import listed, printable
from deformable_detr.evaluation.coco import (
    Metrics,
    check_classes,
    coco_evaluation,
    metrics_of,
    without_nan,
)
from deformable_detr.evaluation.detections import predict_dataset
from deformable_detr.evaluation.mistakes import (
    FOUND,
    KINDS,
    ImageReport,
    ap50_gains,
    choose_threshold,
    count_objects,
    judge_all,
    match,
    overlap_of,
)
from deformable_detr.files import write_json
from deformable_detr.models.base import BaseDetector

OVER_ALL = "over all scores"  # whatever the threshold is
WORST = 12  # images that a report shows at most
MEASURES = (  # two sentences, and two lines of a terminal
    "Precision and recall are of all these detections, so recall can be high where AP is low:",
    "AP is over IoU 0.50 to 0.95 and all scores, and counts 100 detections of a class in an image.",
)


@dataclass
class Curve:
    """Precision over recall of one class at IoU 0.5, at recalls 0, 0.01 ... 1.

    precision: the best at this recall or beyond, in [0, 1]. scores: the least score that gives this
    recall, 0 where none does. Both are empty for a class without objects.
    """

    name: str
    precision: list[float]
    scores: list[float]

    @property
    def ap50(self) -> float:
        """The mean precision; NaN for a class without objects."""
        return float(np.mean(self.precision)) if self.precision else math.nan


@dataclass
class Confusion:
    """How often an object of one class (row) was detected as another (column), at IoU 0.5.

    names: the classes, then "background": as a column objects that were not found, as a row
    every detection left without an object of its own, whatever its kind: of nothing, out of place,
    or of an object that another detection has. counts: (classes + 1, classes + 1) int64. Each
    object and each detection counts once; where several fit, those of one class are paired first,
    then the best detection.
    """

    names: list[str]
    counts: np.ndarray

    def most(self, n: int = 10) -> list[tuple[str, str, int]]:
        """The n most frequent mistakes between two classes, as (object, detected as, count)."""
        between = self.counts[:-1, :-1].copy()
        np.fill_diagonal(between, 0)
        order = np.argsort(-between, axis=None, kind="stable")[:n]
        pairs = [np.unravel_index(i, between.shape) for i in order]
        return [
            (self.names[i], self.names[j], int(between[i, j])) for i, j in pairs if between[i, j]
        ]


@dataclass
class Errors:
    """How many detections are correct, and how many errors there are of each of KINDS.

    objects: of the whole data set, without crowds. gains: by kind, the AP50 that correcting these
    errors alone would win, over all scores: see `ap50_gains`; NaN without objects.
    """

    objects: int
    counts: dict[str, int]
    gains: dict[str, float]

    @property
    def precision(self) -> float:
        """The correct part of all detections; NaN without any."""
        detections = sum(self.counts.values()) - self.counts["missed"]
        return self.counts["correct"] / detections if detections else math.nan

    @property
    def recall(self) -> float:
        """The part of all objects that was found; NaN without any."""
        return self.counts["correct"] / self.objects if self.objects else math.nan


@dataclass
class Report:
    """What `analyse` found. Confusion, error counts and worst images are those at `threshold`.

    remarks: sentences without which the figures would be misread, such as on images with more
    objects than a detector has queries. about: what was measured, such as {"model": its file}.
    """

    metrics: Metrics
    curves: list[Curve]
    confusion: Confusion
    errors: Errors
    worst: list[ImageReport]
    threshold: float
    dataset: CocoDataset = field(repr=False)
    remarks: list[str] = field(default_factory=list)
    about: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """For a JSON file: None where undefined."""
        rates = {"precision": self.errors.precision, "recall": self.errors.recall}
        content = {
            "about": self.about,
            "remarks": self.remarks,
            "metrics": self.metrics.to_dict(),
            "threshold": self.threshold,
            "errors": dataclasses.asdict(self.errors) | rates,
            "confusion": {"names": self.confusion.names, "counts": self.confusion.counts.tolist()},
            "curves": [dataclasses.asdict(c) | {"ap50": c.ap50} for c in self.curves],
            "worst": [dataclasses.asdict(image) for image in self.worst],
        }
        return without_nan(content)

    def table(self) -> str:
        """As text for a terminal."""
        errors = self.errors
        lines = [f"{name}: {printable(text)}" for name, text in self.about.items()]
        lines += [
            f"{OVER_ALL}, on {self.metrics}",
            *self.remarks,
            "",
            f"at the threshold: scores from {self.threshold:.3f} on, and IoU {FOUND}",
        ]
        lines += [
            f"{name:28}{figure(value):>7}"
            for name, value in (("precision", errors.precision), ("recall", errors.recall))
        ]
        lines += [
            *MEASURES,
            "",
            f"{'detections':12}{'count':>7}  AP50 if mended, {OVER_ALL}",
            f"{'correct':12}{errors.counts['correct']:>7}",
        ]
        for kind, text in KINDS.items():
            gain = figure(errors.gains[kind], "+.3f")
            lines.append(f"{kind:12}{errors.counts[kind]:>7}  {gain:>14}  {text}")
        mistaken = self.confusion.most()
        lines += ["", "most often confused: object, detected as"] if mistaken else []
        lines += [f"{count:>7}  {listed((name, other))}" for name, other, count in mistaken]
        lines += ["", "worst images"] if self.worst else []
        return "\n".join([*lines, *map(str, self.worst)])

    def write_json(self, path: Path | str) -> None:
        """`to_dict` as a file, atomically. OSError where it cannot be written."""
        write_json(path, self.to_dict())


def analyse(
    model: BaseDetector,
    dataset: CocoDataset,
    batch_size: int = 8,
    threshold: float | None = 0.5,
    progress: bool = True,
    top_k: int = 100,
) -> Report:
    """Detect on every image of a data set, once, and say what is wrong with what was found.

    threshold: the least score of a detection, in [0, 1], for confusion, error counts and worst
    images; None takes the one with the best F1 on this data set. top_k: detections of an image at
    most. ValueError on another number of classes or a threshold out of range.
    """
    check_classes(model, dataset)
    check_threshold(threshold)
    results = predict_dataset(model, dataset, batch_size, progress=progress, top_k=top_k)
    return analyse_results(results, dataset, threshold, model.config.num_queries, top_k)


def analyse_results(
    results: list[dict],
    dataset: CocoDataset,
    threshold: float | None = 0.5,
    num_queries: int = QUERIES,
    top_k: int = TOP_K,
    about: dict[str, str] | None = None,
) -> Report:
    """The same for detections that are there already, as `predict_dataset` gives them.

    num_queries, top_k: the most that were detected in an image. about: what was measured.
    """
    check_threshold(threshold)
    if threshold is None:
        threshold = choose_threshold(results, dataset)
    images = judge_all([r for r in results if r["score"] >= threshold], dataset)
    counts = sum((image.counts() for image in images), Counter())
    objects = count_objects(dataset)
    evaluation = coco_evaluation(results, dataset)
    worst = sorted(images, key=lambda image: -image.errors())[:WORST]
    return Report(
        metrics=metrics_of(evaluation, dataset),
        curves=_curves(evaluation, dataset),
        confusion=_confusion(images, dataset),
        errors=Errors(
            objects=objects.total(),
            counts={kind: counts[kind] for kind in ("correct", *KINDS)},
            gains=ap50_gains(judge_all(results, dataset), objects),
        ),
        worst=[image for image in worst if image.errors()],
        threshold=float(threshold),
        dataset=dataset,
        remarks=crowding(_content(dataset), num_queries, top_k),
        about=about or {},
    )


def _content(dataset: CocoDataset) -> dict:
    """The annotations of a data set's images, which may be a part of its file's."""
    found = dataset.coco.imgToAnns
    return {"annotations": [a for image_id in dataset.image_ids for a in found[image_id]]}


def check_threshold(threshold: float | None) -> None:
    """ValueError where a threshold is out of range."""
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1], or None to choose it, got {threshold}")


def _curves(evaluation: COCOeval, dataset: CocoDataset) -> list[Curve]:
    """From pycocotools' tables (IoU, recall, class, area, detections); -1 without objects."""
    curves = []
    for label, category in enumerate(dataset.categories):
        precision, scores = (
            evaluation.eval[table][0, :, label, 0, -1] for table in ("precision", "scores")
        )
        known = precision > -1
        curves.append(Curve(category["name"], precision[known].tolist(), scores[known].tolist()))
    return curves


def _confusion(images: list[ImageReport], dataset: CocoDataset) -> Confusion:
    background = len(dataset.categories)
    counts = np.zeros((background + 1, background + 1), dtype=np.int64)
    for image in images:
        correct = [each for each in image.judged if each.kind == "correct"]
        wrong = [each for each in image.judged if each.kind not in ("correct", "missed")]
        found = {each.object_id for each in correct}
        annotations = dataset.coco.imgToAnns[image.image_id]
        left = [a for a in annotations if not a["iscrowd"] and a["id"] not in found]
        truth = [dataset.label_of[a["category_id"]] for a in left]
        partner = match(overlap_of([each.box for each in wrong], [a["bbox"] for a in left]))
        for each in correct:
            counts[each.label, each.label] += 1
        for each, j in zip(wrong, partner, strict=True):
            counts[truth[j] if j >= 0 else background, each.label] += 1
        for j in set(range(len(left))) - set(partner.tolist()):
            counts[truth[j], background] += 1
    return Confusion([c["name"] for c in dataset.categories] + ["background"], counts)


def figure(value: float, form: str = ".3f") -> str:
    """A number as text, or n/a for NaN."""
    return "n/a" if math.isnan(value) else format(value, form)
