"""How fast do they learn? One map and several, refinement, two stages, at equal images.

    python experiments/convergence.py

Fig. 3 of "Deformable DETR" at the digits' scale; experiments/detr.py has the dense side.
"""

from detectors import DATA, Detector, describe, train_detector
from study import Study
from study import main as run

ONE_MAP = ("model.num_levels=1", "model.refine=false", "model.two_stage=false")
TWO_MAPS = ("model.num_levels=2",)  # strides 8 and 16
LEARNED = ("model.refine=false", "model.two_stage=false")

STUDY = Study(
    name="convergence",
    question="AP against images: deformable attention on one map, on two, with refinement, "
    "with two stages",
    configurations={
        "one map": Detector(settings=ONE_MAP, steps=450, evaluations=6),
        "two maps": Detector(settings=TWO_MAPS + LEARNED, steps=450, evaluations=6),
        "two maps, refinement": Detector(
            settings=(*TWO_MAPS, "model.two_stage=false"), steps=450, evaluations=6
        ),
        "two maps, two stages": Detector(settings=TWO_MAPS, steps=450, evaluations=6),
    },
    seeds=(0, 1, 2, 3, 4),
    trial=train_detector,
    usual=95,
    seconds={"one map": 65},
    describe=describe,
    headline=("test", "ap"),
    data=DATA,
)


def main() -> None:
    """The command."""
    run(("convergence",))


if __name__ == "__main__":
    main()
