"""Crowns of trees in aerial pictures: one remedy for each kind of error, and what it changes.

    python experiments/tree_errors.py     # about 30 minutes

The same weights are looked through in several ways, for most remedies need no training. Errors are
counted where as many boxes are shown as val has trees, so that a remedy cannot win by showing
fewer; the least score that shows so many on val then counts on test as well. Chapter
your_own_data reads the table.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from study import Study, row
from study import main as run
from trees import DETECTOR, Remedy, fit, held_out, training_set

from deformable_detr.cli.views import SCALES
from deformable_detr.data.coco import CocoDataset
from deformable_detr.evaluation.mistakes import KINDS, count_objects
from deformable_detr.evaluation.report import analyse_results
from deformable_detr.inference.postprocess import as_results
from deformable_detr.inference.predict import detect
from deformable_detr.inference.views import make_views
from deformable_detr.models import BaseDetector
from deformable_detr.provenance import checksum

TRANSFORMS, SIDE, AT_ONCE = "coco", 128, 8


@dataclass(frozen=True)
class Way:
    """A way to look at tiles: in which sizes, whether mirrored as well, above which overlap the
    weaker of two boxes goes, and how many boxes are shown for each tree of val."""

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    nms: float | None = None
    boxes: float = 1.0


WAYS = {
    "as it is": Way(),
    "nms": Way(nms=0.5),
    "half the boxes": Way(boxes=0.5),
    "larger": Way(scales=(1.5,)),
    "several views": Way(scales=SCALES, flip=True),
}


@dataclass(frozen=True)
class Training:
    """For how many epochs, on all tiles or only on those with trees, and how looked through."""

    epochs: int = 5
    empty: bool = True
    ways: tuple[str, ...] = ("as it is",)


def measure(training: Training, seed: int, folder: Path) -> list[dict]:
    """Errors of each kind and AP50, for each way to look at val and test."""
    remedy = Remedy("digits", training.epochs)
    learned = training_set(remedy, seed)
    if not training.empty:
        trees = learned.coco.imgToAnns
        learned.image_ids = [image_id for image_id in learned.image_ids if trees[image_id]]
    model = fit(remedy, learned, seed, folder)
    return [each for name in training.ways for each in look(model, name)]


def describe(training: Training) -> dict:
    """What makes two trials the same, the weights that they start from too."""
    return dataclasses.asdict(training) | {"weights": checksum(DETECTOR)}


def look(model: BaseDetector, name: str) -> list[dict]:
    """The rows of one way to look, whose threshold is chosen on val."""
    rows, threshold = [], None
    for split in ("val", "test"):
        tiles = held_out(split)
        found = detect_in(WAYS[name], model, tiles)
        if threshold is None:
            shown = round(WAYS[name].boxes * count_objects(tiles).total())
            threshold = sorted((each["score"] for each in found), reverse=True)[shown - 1]
        report = analyse_results(found, tiles, threshold)
        counts = {kind: report.errors.counts[kind] for kind in ("correct", *KINDS)}
        figures = counts | {"objects": report.errors.objects, "threshold": threshold}
        figures |= {"ap": report.metrics.ap, "ap50": report.metrics.ap50}
        rows += [row(split, name, metric, value) for metric, value in figures.items()]
    return rows


def detect_in(way: Way, model: BaseDetector, tiles: CocoDataset) -> list[dict]:
    """COCO results of all tiles."""
    views = make_views(TRANSFORMS, way.scales, way.flip, SIDE)
    results = []
    for start in range(0, len(tiles), AT_ONCE):
        ids = tiles.image_ids[start : start + AT_ONCE]
        pictures = [tiles.load_image(image_id) for image_id in ids]
        for image_id, found in zip(ids, detect(model, pictures, views, nms=way.nms), strict=True):
            categories = [tiles.categories[label]["id"] for label in found.labels.tolist()]
            results += as_results(found, image_id, categories)
    return results


STUDY = Study(
    name="tree_errors",
    question="Trees from the air: does the remedy for each kind of error mend this kind?",
    configurations={
        "five epochs": Training(ways=tuple(WAYS)),
        "without empty tiles": Training(epochs=7, empty=False),
        "ten epochs": Training(epochs=10, ways=("as it is", "several views")),
    },
    seeds=(0, 1, 2),
    trial=measure,
    describe=describe,
    usual=200,
    seconds={"without empty tiles": 120, "ten epochs": 280},
)


def main() -> None:
    """The command."""
    run(("tree_errors",))


if __name__ == "__main__":
    main()
