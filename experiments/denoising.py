"""What is denoising worth? DN-DETR and DINO without it, and with less; the rest is the same.

    python experiments/denoising.py

experiments/members.py has the other side: DN-DETR with its five groups, DINO with its pairs.
"""

from detectors import DATA, Detector, describe, train_detector
from members import TWO_MAPS
from study import Study
from study import main as run

STUDY = Study(
    name="denoising",
    question="AP after 300 steps by groups of noised objects, on two maps",
    configurations={
        "DN-DETR, no groups": Detector("digits-dn-detr", (*TWO_MAPS, "model.denoising_groups=0")),
        "DN-DETR, 1 group": Detector("digits-dn-detr", (*TWO_MAPS, "model.denoising_groups=1")),
        "DINO, no pairs": Detector("digits-dino", (*TWO_MAPS, "model.denoising_pairs=0")),
    },
    seeds=(0, 1, 2),
    trial=train_detector,
    usual=60,
    describe=describe,
    headline=("test", "ap"),
    data=DATA,
)


def main() -> None:
    """The command."""
    run(("denoising",))


if __name__ == "__main__":
    main()
