"""The members of the family against the base, at equal images.

python experiments/members.py
"""

from ablations import BASE
from detectors import DATA, Detector, describe, train_detector
from study import Study
from study import main as run

TWO_MAPS = ("model.num_levels=2",)

STUDY = Study(
    name="members",
    question="AP after 300 steps: each member against Deformable DETR, on two maps",
    configurations={
        "Deformable DETR, two stages": BASE,
        "Deformable DETR, refinement": Detector(settings=(*TWO_MAPS, "model.two_stage=false")),
        "DN-DETR": Detector("digits-dn-detr", TWO_MAPS),
        "DINO": Detector("digits-dino", TWO_MAPS),
        "Group DETR": Detector("digits-group-detr", TWO_MAPS),
        "Sparse DETR": Detector("digits-sparse-detr", TWO_MAPS),
        "Efficient DETR": Detector("digits-efficient-detr", TWO_MAPS),
        "Lite DETR": Detector("digits-lite-detr", TWO_MAPS),
        "Lite-DINO": Detector("digits-lite-dino", TWO_MAPS),
    },
    seeds=(0, 1, 2, 3, 4),
    trial=train_detector,
    usual=60,
    describe=describe,
    headline=("test", "ap"),
    data=DATA,
)


def main() -> None:
    """The command."""
    run(("members",))


if __name__ == "__main__":
    main()
