"""How long does DETR take to be useful? Dense attention on the map of stride 16, eight times as
many steps as deformable attention on the same map. The rates are what experiments/rates.py found on
val: 0.001 for deformable attention, 0.0002 for dense. Since dense attention has learned next to
nothing after the 1,500 steps there, a second rate is tried to the end.

    python experiments/detr.py
"""

from convergence import ONE_MAP
from detectors import DATA, Detector, describe, train_detector
from rates import at
from study import Study
from study import main as run

STUDY = Study(
    name="detr",
    question="AP against images: dense and deformable attention on one map",
    configurations={
        "one map": Detector("digits", ONE_MAP + at(1e-3), 1_500, 3),
        "DETR": Detector("digits-detr", at(2e-4), 12_000, 24),
        "DETR, 0.0005": Detector("digits-detr", at(5e-4), 12_000, 24),
    },
    seeds=(0, 1, 2),
    trial=train_detector,
    usual=165,
    seconds={"DETR": 1_250, "DETR, 0.0005": 1_250},
    describe=describe,
    headline=("test", "ap"),
    data=DATA,
)


def main() -> None:
    """The command."""
    run(("detr",))


if __name__ == "__main__":
    main()
