"""What articles, slides and papers say of deformable attention, judged again: the evidence for each
claim is computed, and must give the verdict that data/claims.toml and the chapter print."""

import json
import re
from pathlib import Path

import pytest
import torch
from claims import CLAIMS, MEASURED, RESULTS, ROOT, VERDICTS, all_evidence, claims

CLAIM = claims()
STORED = json.loads((RESULTS / "claims.json").read_text(encoding="utf-8"))["findings"]
SOURCE = ROOT / "chapters" / "22_claims_judged.py"
NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*")
AGAIN = "run python book/claims.py, and the chapter"


def numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in NUMBER.findall(text)]


def prose() -> str:
    lines = SOURCE.read_text(encoding="utf-8").splitlines()
    return " ".join(line[2:] for line in lines if line.startswith("# "))


@pytest.fixture(autouse=True)
def same_numbers():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("claim", CLAIM)
def test_claim(claim):
    finding = all_evidence()[claim]()
    expected = CLAIM[claim]["verdict"]
    if expected == MEASURED:  # a table of a study decides, which may have grown since
        assert finding.verdict in VERDICTS
    else:
        assert finding.verdict == expected, finding.value
    stored = STORED[claim]
    assert finding.verdict == stored["verdict"], AGAIN
    assert NUMBER.sub("#", finding.value) == NUMBER.sub("#", stored["value"]), AGAIN
    assert numbers(finding.value) == pytest.approx(numbers(stored["value"]), rel=0.05, abs=0.02)


def test_each_claim_has_evidence_and_all_evidence_a_claim():
    assert sorted(all_evidence()) == sorted(CLAIM) == sorted(STORED)
    assert {claim["verdict"] for claim in CLAIM.values()} <= {*VERDICTS, MEASURED}


def test_each_claim_in_the_chapter_exists():
    """And most that exist are read there: the table has all."""
    told = set(re.findall(r"\*\*\[([A-Z]\d+)\]\*\*", prose()))
    assert told and told <= set(CLAIM)
    assert len(told) >= 12


def test_a_claim_says_what_it_is_judged_by():
    sources = set(re.findall(r"^([A-Z]) = ", Path(CLAIMS).read_text(encoding="utf-8"), re.M))
    for name, claim in CLAIM.items():
        assert name[0] in sources
        assert set(claim) == {"quote", "where", "verdict", "because"}
        assert claim["because"].endswith(".") and 1 < len(claim["quote"].split()) < 45
