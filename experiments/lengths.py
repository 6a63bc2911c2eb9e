"""How good is the base after trainings of several lengths?

    python experiments/lengths.py

Each is a training of its own, with its rate down to almost nothing at the end, as no step in the
middle of a longer one has it. experiments/equal_cost.py reads between them what the base reaches
for as many multiply-adds as a member of the family has spent.
"""

import dataclasses

from ablations import BASE
from detectors import DATA, describe, train_detector
from study import Study
from study import main as run

BETWEEN = 75  # steps from one evaluation on val to the next, where no other study has the training
EVALUATIONS = {225: 225 // BETWEEN, 300: BASE.evaluations, 375: 375 // BETWEEN, 450: 6}

STUDY = Study(
    name="lengths",
    question="AP by the steps of a training: Deformable DETR, two stages, on two maps",
    configurations={
        f"{steps} steps": dataclasses.replace(BASE, steps=steps, evaluations=evaluations)
        for steps, evaluations in EVALUATIONS.items()
    },
    seeds=(0, 1, 2),
    trial=train_detector,
    usual=80,
    seconds={"225 steps": 55},
    describe=describe,
    headline=("test", "ap"),
    data=DATA,
)


def main() -> None:
    """The command."""
    run(("lengths",))


if __name__ == "__main__":
    main()
