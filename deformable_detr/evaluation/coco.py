"""COCO metrics by pycocotools. Chapter training."""

import dataclasses
import math
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from deformable_detr.data.coco import CocoDataset
from deformable_detr.data.names import counted, printable
from deformable_detr.data.split_checks import category_difference
from deformable_detr.evaluation.detections import predict_dataset
from deformable_detr.models.base import BaseDetector

COCO_THRESHOLDS = (32**2, 96**2)  # areas at which small and medium objects end, in pixels


@dataclass
class Metrics:
    """COCO's average precision and recall, in [0, 1]; NaN where the data has no such object.

    ap is the mean over IoU thresholds 0.50 to 0.95; ap50 and ap75 are at one threshold. Small,
    medium and large objects end at the areas in `area_thresholds`. ar: recall at 100 detections.
    """

    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ar: float
    per_class: dict[str, float]
    images: int
    area_thresholds: tuple[int, int]

    def to_dict(self) -> dict:
        """For a JSON file: None where undefined."""
        return without_nan(dataclasses.asdict(self))

    def rows(self) -> dict[str, float]:
        """Every figure under the name by which people know it."""
        small, medium = (round(area**0.5) for area in self.area_thresholds)
        return {
            "AP": self.ap,
            "AP50": self.ap50,
            "AP75": self.ap75,
            f"AP small (below {small}^2 px)": self.ap_small,
            f"AP medium (to {medium}^2 px)": self.ap_medium,
            "AP large": self.ap_large,
            "AR (100 detections)": self.ar,
        } | {f"AP of {name}": value for name, value in self.per_class.items()}

    def __str__(self) -> str:
        lines = [
            f"{printable(name):28}{'n/a' if np.isnan(value) else f'{value:.3f}':>7}"
            for name, value in self.rows().items()
        ]
        return "\n".join([counted(self.images, "image"), *lines])


def without_nan(value: object) -> object:
    """The same with None for NaN, as JSON has it. Nothing is rounded: who shows three digits of
    four shows others than a terminal, which had all."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def evaluate(
    model: BaseDetector,
    dataset: CocoDataset,
    batch_size: int = 8,
    num_workers: int = 0,
    progress: bool = True,
    top_k: int = 100,
) -> Metrics:
    """Detect on every image of a data set and compare with its annotations.

    top_k: detections of an image, of which pycocotools then counts the 100 best of each class.
    """
    check_classes(model, dataset)
    return score(predict_dataset(model, dataset, batch_size, num_workers, progress, top_k), dataset)


def check_classes(model: BaseDetector, dataset: CocoDataset) -> None:
    """ValueError unless the model has as many classes as the data has categories."""
    if model.config.num_classes != len(dataset.categories):
        raise ValueError(
            f"the model has {counted(model.config.num_classes, 'class')}, "
            f"the data has {counted(len(dataset.categories), 'category')}"
        )


def same_categories(train_set: CocoDataset, val_set: CocoDataset) -> None:
    """ValueError where two splits name their classes differently."""
    if difference := category_difference(train_set.categories, val_set.categories):
        raise ValueError(difference)


def score(results: list[dict], dataset: CocoDataset) -> Metrics:
    """COCO metrics of detections given as COCO results."""
    return metrics_of(coco_evaluation(results, dataset), dataset)


def coco_evaluation(results: list[dict], dataset: CocoDataset) -> COCOeval:
    """pycocotools' own evaluation of COCO results, accumulated, with the data's area thresholds.

    It sees the ids 1, 2, ... instead of the data's: its arrays would make numbers beyond 2^63 into
    floats, and to it an annotation of id 0 is none.
    """
    small, medium = dataset.info.get("area_thresholds", COCO_THRESHOLDS)
    images = {image_id: i for i, image_id in enumerate(dataset.image_ids, 1)}
    categories = {category["id"]: i for i, category in enumerate(dataset.categories, 1)}

    def with_own_ids(entry: dict) -> dict:
        image_id, category_id = images[entry["image_id"]], categories[entry["category_id"]]
        return entry | {"image_id": image_id, "category_id": category_id}

    for result in results:
        if result["image_id"] not in images or result["category_id"] not in categories:
            raise ValueError(
                f"a detection of category {result['category_id']!r} on image "
                f"{result['image_id']!r}, of which the data set lacks one"
            )

    # what belongs to no image or category of the list is left aside, as pycocotools does
    annotations = [
        with_own_ids(a)
        for a in dataset.coco.dataset["annotations"]
        if a["image_id"] in images and a["category_id"] in categories
    ]
    truth = COCO()
    truth.dataset = {
        "images": [{"id": i} for i in images.values()],
        "categories": [{"id": i} for i in categories.values()],
        "annotations": [a | {"id": i} for i, a in enumerate(annotations, 1)],
    }
    with redirect_stdout(StringIO()):
        truth.createIndex()
        found = truth.loadRes([with_own_ids(result) for result in results]) if results else COCO()
        found.dataset.setdefault("annotations", [])  # asked for where there are no images
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.params.imgIds = list(images.values())
        evaluation.params.areaRng = [(0, 1e10), (0, small), (small, medium), (medium, 1e10)]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def metrics_of(evaluation: COCOeval, dataset: CocoDataset) -> Metrics:
    """The figures in an evaluation by `coco_evaluation`."""
    precision = evaluation.eval["precision"]  # (IoU, recall, class, area, detections)
    recall = evaluation.eval["recall"]  # (IoU, class, area, detections)

    def mean(values: np.ndarray) -> float:
        values = values[values > -1]
        return float(values.mean()) if values.size else float("nan")

    return Metrics(
        ap=mean(precision[:, :, :, 0, -1]),
        ap50=mean(precision[0, :, :, 0, -1]),
        ap75=mean(precision[5, :, :, 0, -1]),
        ap_small=mean(precision[:, :, :, 1, -1]),
        ap_medium=mean(precision[:, :, :, 2, -1]),
        ap_large=mean(precision[:, :, :, 3, -1]),
        ar=mean(recall[:, :, 0, -1]),
        per_class={
            category["name"]: mean(precision[:, :, i, 0, -1])
            for i, category in enumerate(dataset.categories)
        },
        images=len(dataset),
        area_thresholds=tuple(dataset.info.get("area_thresholds", COCO_THRESHOLDS)),
    )
