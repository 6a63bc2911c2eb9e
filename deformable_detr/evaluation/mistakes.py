"""The kind of each error of a detector, as in "TIDE" (Bolya et al., 2020), and what it costs.

Chapter your_own_data.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from pycocotools import mask

from deformable_detr.data.coco import CocoDataset
from deformable_detr.data.names import printable

FOUND = 0.5  # the IoU from which a detection finds an object
NEAR = 0.1  # the IoU from which it is a miss of this object, and not of nothing
KINDS = {
    "class": "finds an object, but says another class",
    "place": "of the right class, but only near an object",
    "both": "only near an object, and of another class",
    "duplicate": "finds an object that a better detection has found",
    "background": "not even near an object",
    "missed": "object that is neither found, nor meant by an error of class or place",
}
NO_THRESHOLD = 0.5  # where no score is better than another


@dataclass
class Judged:
    """A detection, or an object that was missed, with its kind.

    kind: "correct" or one of KINDS. label: its class index. box: xywh in pixels. score: in [0, 1],
    None for a missed object. object_id: of the annotation that it finds or means, and truth: this
    one's class index; None on background.
    """

    kind: str
    label: int
    box: list[float]
    score: float | None
    object_id: int | None
    truth: int | None


@dataclass
class ImageReport:
    """One image: its detections, best first, then the objects that were missed."""

    image_id: int
    file_name: str
    judged: list[Judged]

    def counts(self) -> Counter:
        """How many there are of each kind."""
        return Counter(each.kind for each in self.judged)

    def errors(self) -> int:
        """How many are not correct."""
        return len(self.judged) - self.counts()["correct"]

    def __str__(self) -> str:
        counts = self.counts()
        found = ", ".join(f"{counts[kind]} {kind}" for kind in ("correct", *KINDS) if counts[kind])
        return f"{printable(self.image_id)}  {printable(self.file_name)}: {found}"


def judge_all(results: list[dict], dataset: CocoDataset) -> list[ImageReport]:
    """Every image's detections and missed objects with their kinds, in the data set's order.

    results: as `predict_dataset` gives them. ValueError on an image that the data set lacks.
    """
    by_image = {image_id: [] for image_id in dataset.image_ids}
    for result in results:
        if result["image_id"] not in by_image:
            raise ValueError(f"a detection on image {result['image_id']}, which the data set lacks")
        by_image[result["image_id"]].append(result)
    return [
        ImageReport(
            image_id,
            dataset.coco.imgs[image_id]["file_name"],
            judge(found, dataset.coco.imgToAnns[image_id], dataset.label_of),
        )
        for image_id, found in by_image.items()
    ]


def judge(
    detections: list[dict], annotations: list[dict], label_of: dict[int, int]
) -> list[Judged]:
    """The kinds of one image's detections, best first, and of the objects that they miss.

    As in COCO's metrics, the best detection picks first among the objects of its class, and one
    that only lies on a crowd of its class is left out. As in TIDE's code, the kinds are tried in
    the order place, class, duplicate, background, both.
    """
    detections = sorted(detections, key=lambda detection: -detection["score"])
    objects = [a for a in annotations if not a["iscrowd"]]
    crowds = [a for a in annotations if a["iscrowd"]]
    boxes = [detection["bbox"] for detection in detections]
    overlap = overlap_of(boxes, [a["bbox"] for a in objects])
    on_crowd = overlap_of(boxes, [a["bbox"] for a in crowds], crowds=True)
    same = _same_class(detections, objects)
    ignored = (on_crowd * _same_class(detections, crowds) >= FOUND).any(1)
    partner = match(overlap * same)
    judged, meant = [], set(partner)
    for i, detection in enumerate(detections):
        kind, target = _kind(overlap[i], same[i], partner[i])
        if kind == "correct" or not ignored[i]:
            if kind in ("class", "place"):
                meant.add(target)
            about = None if target is None else objects[target]
            judged.append(_judged(kind, detection, about, label_of))
    missed = (a for j, a in enumerate(objects) if j not in meant)
    return judged + [_judged("missed", a, a, label_of) for a in missed]


def match(overlap: np.ndarray) -> np.ndarray:
    """For each row (D, G), best first, the free column of the highest IoU from 0.5 on; else -1."""
    overlap = overlap.copy()
    partner = np.full(len(overlap), -1)
    for i in np.flatnonzero((overlap >= FOUND).any(1)):
        best = overlap[i].argmax()
        if overlap[i, best] >= FOUND:
            partner[i] = best
            overlap[:, best] = 0
    return partner


def _kind(overlap: np.ndarray, same: np.ndarray, partner: int) -> tuple[str, int | None]:
    """A detection's kind and the object that it is about, from its IoU with each object."""
    if partner >= 0:
        return "correct", int(partner)
    if not overlap.size or overlap.max() < NEAR:
        return "background", None
    own, other = overlap * same, overlap * ~same
    if NEAR <= own.max() < FOUND:
        return "place", int(own.argmax())
    if other.max() >= FOUND:
        return "class", int(other.argmax())
    if own.max() >= FOUND:
        return "duplicate", int(own.argmax())
    return "both", int(other.argmax())


def overlap_of(boxes: list, others: list, crowds: bool = False) -> np.ndarray:
    """(D, G) IoU of boxes, xywh; with crowds, the part of each box that lies on each other."""
    if not boxes or not others:
        return np.zeros((len(boxes), len(others)))
    first, second = (np.array(each, dtype=float) for each in (boxes, others))
    return mask.iou(first, second, [int(crowds)] * len(others))


def _same_class(detections: list[dict], objects: list[dict]) -> np.ndarray:
    """(D, G), True where the categories agree."""
    columns = ([x["category_id"] for x in each] for each in (detections, objects))
    return np.equal.outer(*(np.array(column, dtype=object) for column in columns)).astype(bool)


def _judged(kind: str, box: dict, about: dict | None, label_of: dict[int, int]) -> Judged:
    return Judged(
        kind=kind,
        label=label_of[box["category_id"]],
        box=list(box["bbox"]),
        score=box.get("score"),
        object_id=None if about is None else about["id"],
        truth=None if about is None else label_of[about["category_id"]],
    )


def count_objects(dataset: CocoDataset) -> Counter:
    """The number of objects by class index, without crowds."""
    return Counter(
        dataset.label_of[annotation["category_id"]]
        for image_id in dataset.image_ids
        for annotation in dataset.coco.imgToAnns[image_id]
        if not annotation["iscrowd"]
    )


def choose_threshold(results: list[dict], dataset: CocoDataset) -> float:
    """The score from which on detections have the best F1 at IoU 0.5, all classes together.

    results: as `predict_dataset` gives them, with all their scores; of validation data, and not of
    those that the choice is judged by. Returns a number half way to the next lower score; 0.5 where
    nothing is correct, and thus no threshold is better than another.
    """
    judged = [each for image in judge_all(results, dataset) for each in image.judged]
    found = sorted((e.score, e.kind == "correct") for e in judged if e.kind != "missed")[::-1]
    if not any(correct for _, correct in found):
        return NO_THRESHOLD
    scores, correct = np.array(found).T
    f1 = 2 * correct.cumsum() / (np.arange(1, len(found) + 1) + count_objects(dataset).total())
    lower = np.append(scores[1:], 0)
    f1[:-1] *= lower[:-1] < scores[:-1]  # a threshold cannot part equal scores
    best = f1.argmax()
    return float(scores[best] + lower[best]) / 2


def ap50_gains(images: list[ImageReport], objects: Counter) -> dict[str, float]:
    """For each kind the AP50 that is won if these errors alone are corrected (TIDE's dAP).

    An error of class or place becomes correct, unless its object is found already: then it goes,
    as do the other kinds; missed objects no longer count. images: judged over all scores. objects:
    by class index. NaN without objects.
    """
    judged = [each for image in images for each in image.judged]
    missed = Counter(each.label for each in judged if each.kind == "missed")
    before = _ap50(_corrected(judged, ""), objects, Counter())
    return {
        kind: _ap50(_corrected(judged, kind), objects, missed if kind == "missed" else Counter())
        - before
        for kind in KINDS
    }


def _corrected(judged: list[Judged], kind: str) -> np.ndarray:
    """(N, 3): score, whether correct, class index of each detection, one kind of them mended."""
    rows = []
    found = {each.object_id for each in judged if each.kind == "correct"}
    for each in judged:
        if each.kind == "missed":
            continue
        if each.kind != kind:
            rows.append((each.score, each.kind == "correct", each.label))
        elif kind in ("class", "place") and each.object_id not in found:
            found.add(each.object_id)
            rows.append((each.score, True, each.truth))
    return np.array(rows, dtype=float).reshape(-1, 3)


def _ap50(rows: np.ndarray, objects: Counter, excused: Counter) -> float:
    """COCO's AP at IoU 0.5, the mean over the classes that have objects; NaN without any."""
    precisions = []
    for label, number in objects.items():
        number -= excused[label]
        of_class = rows[rows[:, 2] == label]
        correct = of_class[np.argsort(-of_class[:, 0], kind="stable"), 1].cumsum()
        precision = correct / np.arange(1, len(correct) + 1)
        best = np.maximum.accumulate(precision[::-1])[::-1]  # at this recall or beyond
        reached = np.searchsorted(correct / max(number, 1), np.linspace(0, 1, 101))
        # where all are excused, there is nothing left to find
        precisions.append(np.append(best, 0)[reached].mean() if number else 1.0)
    return float(np.mean(precisions)) if precisions else float("nan")
