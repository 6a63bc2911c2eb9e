"""Evaluation without classes: how well are objects found, whatever they are called? Chapter
your_own_data."""

import copy
from collections.abc import Iterable
from contextlib import redirect_stdout
from io import StringIO

from pycocotools.coco import COCO

from deformable_detr.data.coco import CocoDataset

OBJECT = {"id": 1, "name": "object"}


def with_categories(dataset: CocoDataset, categories: list[dict]) -> CocoDataset:
    """The same images with others' categories, in which a detector names what it finds there."""
    same = copy.copy(dataset)
    same.categories = categories
    return same


def without_empty(dataset: CocoDataset, known: Iterable[str]) -> tuple[CocoDataset, list[str]]:
    """The same images without the categories that have no annotation and are not among these names,
    and the names that were left out. Roboflow lists a parent category of this kind."""
    used = {a["category_id"] for a in dataset.coco.dataset["annotations"]}
    known = set(known)
    kept = [c for c in dataset.categories if c["id"] in used or c["name"] in known]
    left_out = [c["name"] for c in dataset.categories if c not in kept]
    same = with_categories(dataset, kept)
    same.label_of = {category["id"]: i for i, category in enumerate(kept)}
    return same, left_out


def without_classes(results: list[dict], dataset: CocoDataset) -> tuple[list[dict], CocoDataset]:
    """Detections and data of one class, of all objects; a box that was detected with several
    classes counts once, with its highest score."""
    best: dict[tuple, dict] = {}
    for result in results:
        key = result["image_id"], *result["bbox"]
        if key not in best or result["score"] > best[key]["score"]:
            best[key] = result | {"category_id": OBJECT["id"]}
    content, known = dataset.coco.dataset, dataset.label_of
    objects = [a for a in content["annotations"] if a["category_id"] in known]
    objects = [a | {"category_id": OBJECT["id"]} for a in objects]
    one = with_categories(dataset, [OBJECT])
    one.label_of = {OBJECT["id"]: 0}
    one.coco = COCO()
    one.coco.dataset = content | {"annotations": objects, "categories": [OBJECT]}
    with redirect_stdout(StringIO()):
        one.coco.createIndex()
    return list(best.values()), one
