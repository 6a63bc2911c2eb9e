"""What articles, slides and papers say of deformable attention, judged again: the evidence for each
claim is computed, and must give the verdict that data/claims.toml and the chapter print."""

import json
import re
from pathlib import Path

import evidence_studies
import pytest
import torch
from claims import (
    CLAIMS,
    CONDITION,
    MEASURED,
    RESULTS,
    ROOT,
    UNCONFIRMED,
    UNTESTABLE,
    VERDICTS,
    all_evidence,
    claims,
)
from evidence_published import PUBLISHED, published

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


@pytest.fixture
def ablations(monkeypatch):
    """Puts a table of APs, {row: [AP of each seed]}, in place of the study's."""

    def put(table):
        rows = [
            dict(configuration=name, seed=str(seed), split="test", metric="ap", value=str(ap))
            for name, aps in table.items()
            for seed, ap in enumerate(aps)
        ]
        monkeypatch.setattr(evidence_studies, "study", lambda name: rows)

    return put


BASE = [0.12, 0.15, 0.14]


@pytest.mark.parametrize(
    ("gains", "first_boxes", "pyramid"),
    [
        ([0.001, -0.001, 0.0], CONDITION, CONDITION),  # narrow, around nothing
        ([0.03, -0.03, 0.0], UNTESTABLE, UNTESTABLE),  # zero is inside, and so is a lot
        ([0.030, 0.031, 0.032], UNCONFIRMED, UNCONFIRMED),
        ([-0.030, -0.031, -0.032], UNCONFIRMED, CONDITION),  # an FPN that harms adds nothing
    ],
)
def test_that_nothing_happens_needs_a_narrow_interval(ablations, gains, first_boxes, pyramid):
    changed = [ap + gain for ap, gain in zip(BASE, gains, strict=True)]
    names = ("first boxes 0.05", "first boxes 0.2", "FPN on the maps")
    ablations({"base": BASE} | dict.fromkeys(names, changed))
    found = [all_evidence()[claim]().verdict for claim in ("P9", "P16")]
    assert found == [first_boxes, pyramid]


def test_rows_are_compared_seed_by_seed(ablations):
    """What seeds share drops out, and a seed that one side lacks does not count."""
    ablations({"base": BASE, "K = 1": [ap - 0.001 for ap in BASE[:2]], "one map": BASE[:1]})
    assert all_evidence()["P17"]().value == "AP better by 0.001 to 0.001"
    assert all_evidence()["P18"]().verdict == UNTESTABLE


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ([0.030, 0.031, 0.032], CONDITION),
        ([0.001, -0.001, 0.0], UNCONFIRMED),
        ([0.03, -0.03, 0.0], UNTESTABLE),
    ],
)
def test_a_gain_that_seeds_cannot_exclude_is_not_refuted(ablations, gains, verdict):
    ablations({"base": BASE, "K = 1": [ap - d for ap, d in zip(BASE, gains, strict=True)]})
    assert all_evidence()["P17"]().verdict == verdict


def test_an_fpn_adds_less_in_the_papers_table_than_repeats_differ_by():
    base = published("table2", "multi-scale attention, K = 4")["ap"]
    gains = [published("table2", name)["ap"] - base for name in ("with FPN", "with BiFPN")]
    aps = PUBLISHED["reruns"]["aps"] + [published("readme", "Deformable DETR")["ap"]]
    assert max(map(abs, gains)) < max(aps) - min(aps)
