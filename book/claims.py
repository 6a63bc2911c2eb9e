"""The judged claims: `python book/claims.py` gathers the evidence for each and writes it down.

What was said, by whom, and the verdict stand in data/claims.toml; a claim's evidence is a function
under its id in an evidence_*.py here. The verdict that the evidence gives must be the
one that stands there. Chapter claims_judged.
"""

import importlib
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from deformable_detr.files import write_json
from deformable_detr.provenance import provenance

ROOT = Path(__file__).resolve().parent.parent
CLAIMS, RESULTS = ROOT / "data" / "claims.toml", ROOT / "data" / "results"
TRUE, CONDITION = "true", "true, with a condition"
FALSE, UNTESTABLE = "false", "not testable here"
UNCONFIRMED = "not confirmed here"  # otherwise at a small scale, which refutes no larger one
VERDICTS = (TRUE, CONDITION, FALSE, UNCONFIRMED, UNTESTABLE)
MODULES = ("evidence_attention", "evidence_models", "evidence_published", "evidence_studies")
MEASURED = "measured"  # instead of a verdict: a table that may grow decides it


@dataclass(frozen=True)
class Finding:
    """What the evidence for a claim says: a value in words and numbers, and a verdict."""

    value: str
    verdict: str


Evidence = Callable[[], Finding]
EVIDENCE: dict[str, Evidence] = {}


def evidence(claim: str) -> Callable[[Evidence], Evidence]:
    """Register the decorated function as the evidence for the claim of this id."""

    def register(function: Evidence) -> Evidence:
        if claim in EVIDENCE:
            raise ValueError(f"claim {claim} has two functions")
        EVIDENCE[claim] = function
        return function

    return register


def judge(holds: bool, verdict: str) -> str:
    """The verdict where its evidence holds, and what it is not where it does not."""
    return verdict if holds else f"not: {verdict}"


def all_evidence() -> dict[str, Evidence]:
    """Every function, by the id of its claim."""
    for module in MODULES:
        importlib.import_module(module)
    return EVIDENCE


def claims() -> dict[str, dict]:
    """data/claims.toml's claims by id."""
    return tomllib.loads(CLAIMS.read_text(encoding="utf-8"))["claims"]


def main() -> None:
    """The command."""
    import claims as this  # the module that the evidence registers with, not __main__

    found = {claim: asdict(function()) for claim, function in this.all_evidence().items()}
    found = {claim: found[claim] for claim in claims()}
    about = provenance("python book/claims.py", ("torchvision", "numpy"))
    write_json(RESULTS / "claims.json", {**about, "findings": found})
    for claim, finding in found.items():
        print(f"{claim:4} {finding['verdict']:22} {finding['value']}")


if __name__ == "__main__":
    main()
