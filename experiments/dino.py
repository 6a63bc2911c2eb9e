"""What is contrast worth, and what mixed query selection? DINO without each; the rest is the same.

    python experiments/dino.py

Without contrast it has its near copies alone, as many as before. Of the trained detectors the
errors on test are counted too, duplicates among them, where as many boxes are shown as there are
digits.
"""

from collections import Counter
from pathlib import Path

from detectors import AT_THE_END, DATA, Detector, describe, fit
from digits import load_split
from members import STUDY as MEMBERS
from members import TWO_MAPS
from study import Study, row
from study import main as run

from deformable_detr.data.coco import CocoDataset
from deformable_detr.evaluation.coco import predict_dataset
from deformable_detr.evaluation.mistakes import KINDS, count_objects, judge_all
from deformable_detr.models import BaseDetector


def near_copies_alone(model: BaseDetector) -> None:
    """No farther copy that must say that there is nothing."""
    model.copies = 1


def train_and_judge(detector: Detector, seed: int, folder: Path) -> list[dict]:
    """The rows of one training, with the kinds of errors at its end."""
    model, rows = fit(detector, seed, folder)
    recipe = detector.resolved(seed)
    dataset = load_split("test", recipe.eval_transform())
    dataset.image_ids = dataset.image_ids[:AT_THE_END]
    found = predict_dataset(model, dataset, progress=False, top_k=recipe.train.top_k)
    counts = kinds(found, dataset)
    return rows + [row("test", detector.steps, kind, count) for kind, count in counts.items()]


def kinds(found: list[dict], dataset: CocoDataset) -> dict[str, int]:
    """How many of the best detections, as many as there are objects, are correct, and how many
    errors of each kind there are."""
    shown = sorted(found, key=lambda detection: -detection["score"])
    shown = shown[: count_objects(dataset).total()]
    counts = sum((report.counts() for report in judge_all(shown, dataset)), Counter())
    return {kind: counts[kind] for kind in ("correct", *KINDS)}


STUDY = Study(
    name="dino",
    question="AP and kinds of errors after 300 steps: DINO, without contrast, with pure query "
    "selection, on two maps",
    configurations={
        "DINO": MEMBERS.configurations["DINO"],
        "DINO, near copies alone": Detector("digits-dino", TWO_MAPS, change=near_copies_alone),
        "DINO, pure selection": Detector("digits-dino", (*TWO_MAPS, "model.pure_selection=true")),
    },
    seeds=(0, 1, 2),
    trial=train_and_judge,
    usual=80,
    describe=describe,
    headline=("test", "ap"),
    data=DATA,
)


def main() -> None:
    """The command."""
    run(("dino",))


if __name__ == "__main__":
    main()
