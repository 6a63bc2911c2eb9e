"""What do a finer map and the focal loss do for DETR? The two other rows of dense attention in
Table 1 of "Deformable DETR": DC5, and the loss and matching cost of deformable attention's side.

    python experiments/dense.py

As long as in experiments/detr.py, with which DETR itself is shared, and with its rate;
experiments/dense_rates.py tries three for each.
"""

import dataclasses

from detectors import DATA, describe, train_detector
from detr import STUDY as LONG
from study import Study
from study import main as run

from deformable_detr.models import BaseDetector

DETR = LONG.configurations["DETR"]
FOCAL = ("model.scoring=focal",)


def dilate(model: BaseDetector) -> None:
    """DC5: the small backbone's last map with the stride of the one before. A convolution that
    follows one of stride 1 in place of 2 is dilated, so that weights mean what they did."""
    last = model.backbone.blocks[-1]
    last.body[0].stride = last.shortcut[0].stride = (1, 1)
    last.body[3].dilation = last.body[3].padding = (2, 2)
    model.backbone.strides[-1] //= 2


STUDY = Study(
    name="dense",
    question="AP against images: DETR, with a finer map, with the focal loss",
    configurations={
        "DETR": DETR,
        "DETR-DC5": dataclasses.replace(DETR, change=dilate),
        "DETR, focal loss": dataclasses.replace(DETR, settings=DETR.settings + FOCAL),
    },
    seeds=(0, 1, 2),
    trial=train_detector,
    usual=1_250,
    seconds={"DETR-DC5": 1_800},
    describe=describe,
    headline=("test", "ap"),
    data=DATA,
)


def main() -> None:
    """The command."""
    run(("dense",))


if __name__ == "__main__":
    main()
