"""The members of the family against the base at equal multiply-adds, from tables that are there.

    python experiments/equal_cost.py     # seconds; after members, lengths and member_costs

Nothing is trained. A member's 300 steps of training have spent so many multiply-adds, forward and
backward, noised objects and groups included (experiments/member_costs.py). For as many the base
could make fewer or more steps. What it would reach is read, seed by seed, between trainings of the
base of several lengths (experiments/lengths.py). Writes data/results/equal_cost.json.
"""

import argparse
import csv
from collections.abc import Iterable

import numpy as np
from ablations import BASE
from lengths import EVALUATIONS
from members import STUDY as MEMBERS
from study import DONE, RESULTS

from deformable_detr.evaluation.intervals import interval, verdict
from deformable_detr.files import write_json
from deformable_detr.provenance import provenance

METRICS = ("ap", "ap_small", "ap_medium", "ap_large")

Values = dict[str, dict[str, float]]  # by configuration and seed


def read(study: str, split: str, metric: str) -> Values:
    """The last value of each finished trial in a study's table."""
    found: Values = {}
    with (RESULTS / f"{study}.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if (row["status"], row["split"], row["metric"]) == (DONE, split, metric):
                found.setdefault(row["configuration"], {})[row["seed"]] = float(row["value"])
    return found


def equal_steps(costs: Values) -> dict[str, float]:
    """How many steps of the base have as many multiply-adds as all of a member's."""
    cost = {name: values["0"] for name, values in costs.items()}
    base, *_ = MEMBERS.configurations
    return {name: BASE.steps * cost[name] / cost[base] for name in MEMBERS.configurations}


def reached(lengths: Values, steps: float) -> list[float]:
    """What the base reaches in so many steps, for each seed that has all lengths; ValueError where
    no training was as short or as long."""
    if not min(EVALUATIONS) <= steps <= max(EVALUATIONS):
        raise ValueError(
            f"the base was trained for {min(EVALUATIONS)} to {max(EVALUATIONS)} steps, "
            f"not for {steps:.0f}"
        )
    curves = [lengths.get(f"{each} steps", {}) for each in EVALUATIONS]
    seeds = sorted(set.intersection(*map(set, curves)))
    return [
        float(np.interp(steps, list(EVALUATIONS), [curve[seed] for curve in curves]))
        for seed in seeds
    ]


def compare(steps: dict[str, float]) -> Iterable[tuple[str, dict]]:
    """Of each member with two seeds or more, its figures on test beside the base's."""
    tables = [(m, read("members", "test", m), read("lengths", "test", m)) for m in METRICS]
    for name, equal in steps.items():
        figures = {}
        for metric, members, lengths in tables:
            ours, theirs = list(members.get(name, {}).values()), reached(lengths, equal)
            if min(len(ours), len(theirs)) > 1:
                sides = {"member": interval(ours), "base": interval(theirs)}
                rounded = {
                    side: {k: round(v, 4) for k, v in vars(each).items()}
                    for side, each in sides.items()
                }
                figures[metric] = rounded | {"verdict": verdict(ours, theirs)}
        yield name, {"steps of the base": round(equal, 1)} | figures


def main() -> None:
    """The command."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    found = dict(compare(equal_steps(read("member_costs", "step", "multiply_adds"))))
    for name, each in found.items():
        said = each["ap"]["verdict"] if "ap" in each else "not enough trainings"
        print(f"{name:28} {each['steps of the base']:5.0f} steps of the base: {said}")
    about = provenance("python experiments/equal_cost.py", ("numpy", "scipy"))
    write_json(RESULTS / "equal_cost.json", about | {"steps": BASE.steps, "members": found})


if __name__ == "__main__":
    main()
