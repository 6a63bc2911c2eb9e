"""The members of the family against the base, at equal images, each with its own learning rate.

    python experiments/tuned_members.py     # after experiments/member_rates.py

Rates are chosen by the rule in experiments/member_rates.py, from the table that it wrote. A member
whose rates have not all been tried is left out.
"""

from detectors import DATA, describe, train_detector
from member_rates import chosen, with_rate
from members import STUDY as MEMBERS
from study import Study
from study import main as run

STUDY = Study(
    name="tuned_members",
    question="AP after 300 steps: each member against Deformable DETR, each with the best of "
    "three rates",
    configurations={
        name: with_rate(member, rate)
        for name, member in MEMBERS.configurations.items()
        if (rate := chosen(name))
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
    run(("tuned_members",))


if __name__ == "__main__":
    main()
