"""Checkers of chapter questions, "Questions readers ask"."""

import math

import torch

from deformable_detr.exercises import checks, expect

CATEGORIES = [{"id": 17, "name": "cat"}, {"id": 3, "name": "car"}, {"id": 90, "name": "toothbrush"}]
BOXES = torch.tensor([[0.5, 0.4, 0.2, 0.3], [0.2, 0.6, 0.4, 0.1]])


@checks("questions.2")
def check_labels(labels_of):
    yield "ids become labels from 0, in the order of ids"
    found = labels_of([{"category_id": 3}, {"category_id": 90}, {"category_id": 17}], CATEGORIES)
    expect(list(found), [0, 2, 1], "sort the categories by id, whatever their order in the file")
    yield "ids from 1 without holes are no special case"
    plain = [{"id": 1}, {"id": 2}]
    expect(list(labels_of([{"category_id": 2}, {"category_id": 1}], plain)), [1, 0])
    yield "an image without objects, and classes without objects"
    expect(list(labels_of([], CATEGORIES)), [])
    expect(list(labels_of([{"category_id": 90}], CATEGORIES)), [2], "all categories count")


@checks("questions.3")
def check_faults(faults):
    labels = torch.tensor([0, 2])
    yield "sound targets"
    expect(faults(labels, BOXES, 3), [], "nothing is wrong with these")
    yield "one fault of each kind"
    expect(faults(torch.tensor([1, 3]), BOXES, 3), ["label"], "labels are below num_classes")
    expect(faults(torch.tensor([-1, 0]), BOXES, 3), ["label"], "and at least 0")
    expect(faults(labels, BOXES * 128, 3), ["in pixels"])
    flat = BOXES * torch.tensor([1.0, 1.0, 1.0, 0.0])
    expect(faults(labels, flat, 3), ["no size"], "a height of 0")
    thin = BOXES * torch.tensor([1.0, 1.0, -1.0, 1.0])
    expect(faults(labels, thin, 3), ["no size"], "a width below 0")
    for number in (torch.nan, -torch.inf):
        broken = BOXES.clone()
        broken[1, 0] = number
        expect(faults(labels, broken, 3), ["not finite"], f"a centre at {number}")
    yield "several at once, sorted"
    worse = flat * 128
    expect(faults(torch.tensor([1, 3]), worse, 3), ["in pixels", "label", "no size"])
    yield "an image without objects is sound"
    expect(faults(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), 3), [])


def _log(losses, error=0.0, iou=0.9):
    return {"loss": losses, "class_error": error, "iou": iou}


@checks("questions.1")
def check_diagnose(diagnose):
    falling = [15.0, 8.0, 4.0, 1.0]
    yield "a sound training"
    expect(diagnose(_log(falling)), "sound")
    expect(diagnose(_log(falling, error=40.0, iou=0.6)), "sound", "both are better than half")
    yield "the loss"
    expect(diagnose(_log([15.0, math.nan, 9.0], 90.0, 0.1)), "not finite", "anywhere in the log")
    expect(diagnose(_log([15.0, math.inf], 90.0, 0.1)), "not finite", "infinity is not finite")
    expect(diagnose(_log([15.0, 40.0, 30.0], 80.0, 0.0)), "does not fall")
    expect(diagnose(_log([15.0, 2.0, 14.9], 80.0, 0.0)), "does not fall", "its end counts")
    yield "labels or boxes"
    expect(diagnose(_log(falling, error=80.0, iou=0.9)), "labels")
    expect(diagnose(_log(falling, error=10.0, iou=0.2)), "boxes")
    expect(diagnose(_log(falling, error=50.0, iou=0.9)), "labels", "50 or more")
    expect(diagnose(_log(falling, error=10.0, iou=0.5)), "sound", "below 0.5, and not at it")
    yield "both are bad, although the loss falls"
    expect(diagnose(_log(falling, error=80.0, iou=0.2)), "too early")


def _labels(order=lambda ids: sorted(ids), shift=0, used=False):
    def labels_of(annotations, categories):
        ids = [category["id"] for category in categories]
        if used:
            ids = list({a["category_id"] for a in annotations})
        place = {each: i + shift for i, each in enumerate(order(ids))}
        return [place[a["category_id"]] for a in annotations]

    return labels_of


def _faults(finite=torch.isfinite, upper=True, size=True, first=False, empty=True, sides=(2, 3)):
    def faults(labels, boxes, num_classes):
        found = []
        if not finite(boxes).all():
            found.append("not finite")
        if (boxes > 1).any():
            found.append("in pixels")
        if size and (boxes[:, list(sides)] <= 0).any():
            found.append("no size")
        if ((labels < 0) | (labels >= num_classes if upper else labels > num_classes)).any():
            found.append("label")
        if not empty and len(labels) == 0:
            found.append("empty")
        return sorted(found)[:1] if first else sorted(found)

    return faults


def _diagnose(fall=0.9, best=False, finite=True, early=True, edge=0.0):
    def diagnose(log):
        losses = log["loss"]
        if finite and not all(map(math.isfinite, losses)):
            return "not finite"
        if (min(losses) if best else losses[-1]) > fall * losses[0]:
            return "does not fall"
        bad = log["class_error"] >= 50 + edge, log["iou"] < 0.5
        if early and all(bad):
            return "too early"
        return "labels" if bad[0] else "boxes" if bad[1] else "sound"

    return diagnose


WRONG = {
    "questions.2": [
        ("id minus one", lambda annotations, _: [a["category_id"] - 1 for a in annotations]),
        ("the order of the file", _labels(order=list)),
        ("labels from 1", _labels(shift=1)),
        ("only classes that occur", _labels(used=True)),
    ],
    "questions.3": [
        ("NaN is not looked for", _faults(finite=torch.ones_like)),
        ("infinity is not looked for", _faults(finite=lambda boxes: ~boxes.isnan())),
        ("only heights are looked at", _faults(sides=(3,))),
        ("a label of num_classes passes", _faults(upper=False)),
        ("boxes without height pass", _faults(size=False)),
        ("only the first fault", _faults(first=True)),
        ("an image without objects is called faulty", _faults(empty=False)),
    ],
    "questions.1": [
        ("the lowest loss counts", _diagnose(best=True)),
        ("NaN is not looked for", _diagnose(finite=False)),
        ("both bad is called labels", _diagnose(early=False)),
        ("an error of 50 passes", _diagnose(edge=1e-9)),
    ],
}
