"""The README says what the stored results say, and what it names exists."""

import json
import re

import readme

CARD = readme.ROOT / "data" / "checkpoints" / "digits.json"


def test_tables_are_up_to_date():
    text = readme.README.read_text()
    assert readme.updated(text) == text, "run python book/readme.py"


def test_every_link_inside_the_repository_leads_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", readme.README.read_text())
    inside = [link for link in links if "://" not in link]
    assert len(inside) > 8
    assert not [link for link in inside if not (readme.ROOT / link).exists()]


def test_the_shipped_detector_is_good_and_small():
    card = json.loads(CARD.read_text())
    assert card["test"]["images"] == 1000
    assert card["data"] == json.loads((readme.ROOT / "data" / "digits.sha256.json").read_text())
    assert card["test"]["ap"] > 0.88 and card["test"]["ap50"] > 0.95
    assert card["test"]["ap_small"] > 0.8
    assert (CARD.with_suffix(".safetensors")).stat().st_size < 5e6
