"""How long does DETR take to be useful? Dense attention on the map of stride 16, thirteen times as
many steps as experiments/convergence.py gives deformable attention.

    python experiments/detr.py
"""

from detectors import DATA, Detector, describe, train_detector
from study import Study
from study import main as run

STUDY = Study(
    name="detr",
    question="AP against images: dense attention on one map, with thirteen times as many steps",
    configurations={
        "DETR": Detector("digits-detr", (), 6_000, 12),
        "DETR, focal loss": Detector("digits-detr", ("model.scoring=focal",), 6_000, 12),
    },
    seeds=(0, 1, 2),
    trial=train_detector,
    usual=600,
    describe=describe,
    headline=("test", "ap"),
    data=DATA,
)


def main() -> None:
    """The command."""
    run(("detr",))


if __name__ == "__main__":
    main()
