"""Which learning rate does each side of a comparison want? Three each, on val, with one budget.

    python experiments/rates.py

Each side has 1,500 steps for each rate, since DETR starts slowly. Chosen is the rate with the best
object AP, which is AP without classes: boxes are found before digits are read.
"""

from convergence import ONE_MAP
from detectors import DATA, Detector, describe, train_detector
from study import Study
from study import main as run

RATES = (2e-4, 5e-4, 1e-3)


def at(rate: float) -> tuple[str, ...]:
    """The backbone's rate keeps its ratio."""
    return (f"train.lr={rate}",)


STUDY = Study(
    name="rates",
    question="object AP on val by learning rate: dense and deformable attention on one map",
    configurations={
        **{f"DETR, {r:g}": Detector("digits-detr", at(r), 1500, 3) for r in RATES},
        **{f"one map, {r:g}": Detector("digits", ONE_MAP + at(r), 1500, 3) for r in RATES},
    },
    seeds=(0, 1),
    trial=train_detector,
    usual=165,
    describe=describe,
    headline=("val", "object_ap"),
    data=DATA,
)


def main() -> None:
    """The command."""
    run(("rates",))


if __name__ == "__main__":
    main()
