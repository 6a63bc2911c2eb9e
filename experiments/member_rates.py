"""Which learning rate does each member of the family want? Three each, on val, with one budget.

    python experiments/member_rates.py

One seed, 300 steps each. 0.001 is the recipes' own, with which experiments/members.py has run.
experiments/tuned_members.py takes for each what `chosen` finds.
"""

import csv
import dataclasses
from contextlib import suppress

from detectors import DATA, Detector, describe, train_detector
from members import STUDY as MEMBERS
from rates import at
from study import DONE, RESULTS, Study
from study import main as run

USUAL = 1e-3
RATES = (5e-4, USUAL, 2e-3)
SPLIT, METRIC = "val", "object_ap"  # as in experiments/rates.py


def with_rate(detector: Detector, rate: float) -> Detector:
    """At the usual rate the same detector, which is trained once for all studies."""
    if rate == USUAL:
        return detector
    return dataclasses.replace(detector, settings=detector.settings + at(rate))


def chosen(member: str) -> float | None:
    """The rate with which a member is best on val at the end; None until all are known."""
    rows = []
    with suppress(FileNotFoundError), (RESULTS / "member_rates.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["status"] == DONE]
    found = {
        row["configuration"]: float(row["value"])
        for row in rows  # the last of a training counts
        if (row["split"], row["metric"]) == (SPLIT, METRIC)
    }
    names = {rate: f"{member}, {rate:g}" for rate in RATES}
    if not set(names.values()) <= found.keys():
        return None
    return max(RATES, key=lambda rate: found[names[rate]])


STUDY = Study(
    name="member_rates",
    question="object AP on val after 300 steps by learning rate: each member of the family",
    configurations={
        f"{name}, {rate:g}": with_rate(member, rate)
        for name, member in MEMBERS.configurations.items()
        for rate in RATES
    },
    seeds=(0,),
    trial=train_detector,
    usual=65,
    describe=describe,
    headline=(SPLIT, METRIC),
    data=DATA,
)


def main() -> None:
    """The command."""
    run(("member_rates",))


if __name__ == "__main__":
    main()
