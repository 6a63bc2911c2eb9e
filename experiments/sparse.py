"""Sparse DETR by the share of tokens that its encoder updates, from a tenth to all of them.

    python experiments/sparse.py

With all of them it is the dense encoder, with a scorer beside it that decides nothing.
experiments/member_costs.py has the time that a step and an inference of each take.
"""

from detectors import DATA, Detector, describe, train_detector
from members import STUDY as MEMBERS
from members import TWO_MAPS
from study import Study
from study import main as run


def sharing(rho: float) -> Detector:
    """Sparse DETR with this share."""
    return Detector("digits-sparse-detr", (*TWO_MAPS, f"model.rho={rho}"))


STUDY = Study(
    name="sparse",
    question="AP after 300 steps by the share of tokens that the encoder updates, on two maps",
    configurations={
        "rho 1": sharing(1.0),
        "rho 0.5": sharing(0.5),
        "rho 0.3": MEMBERS.configurations["Sparse DETR"],  # the recipe's
        "rho 0.1": sharing(0.1),
    },
    seeds=(0, 1, 2),
    trial=train_detector,
    usual=65,
    describe=describe,
    headline=("test", "ap"),
    data=DATA,
)


def main() -> None:
    """The command."""
    run(("sparse",))


if __name__ == "__main__":
    main()
