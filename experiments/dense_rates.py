"""Which learning rate do DETR-DC5 and DETR with focal loss want? The three and the 1,500 steps that
experiments/rates.py gives to DETR and to deformable attention.

    python experiments/dense_rates.py
"""

from dense import FOCAL, dilate
from detectors import DATA, Detector, describe, train_detector
from rates import RATES, at
from study import Study
from study import main as run

STUDY = Study(
    name="dense_rates",
    question="object AP on val by learning rate: DETR with the focal loss, and DETR-DC5",
    configurations={
        **{
            f"DETR, focal loss, {r:g}": Detector("digits-detr", at(r) + FOCAL, 1500, 3)
            for r in RATES
        },
        **{
            f"DETR-DC5, {r:g}": Detector("digits-detr", at(r), 1500, 3, change=dilate)
            for r in RATES
        },
    },
    seeds=(0, 1),
    trial=train_detector,
    usual=165,
    seconds={f"DETR-DC5, {r:g}": 240 for r in RATES},
    describe=describe,
    headline=("val", "object_ap"),
    data=DATA,
)


def main() -> None:
    """The command."""
    run(("dense_rates",))


if __name__ == "__main__":
    main()
