"""Names and numbers as messages have them."""

import re
from pathlib import Path

import pytest

from deformable_detr.data.names import counted

LIBRARY = Path(__file__).resolve().parents[1] / "deformable_detr"


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [
        (1, "class", "1 class"),
        (0, "class", "0 classes"),
        (2, "box", "2 boxes"),
        (2, "category", "2 categories"),
        (1, "category", "1 category"),
        (3, "fatal fault", "3 fatal faults"),
    ],
)
def test_one_of_a_kind_is_no_plural(count, noun, text):
    assert counted(count, noun) == text


def test_no_message_counts_one_faults():
    """What is counted by the length of a list may be one."""
    nouns = "boxes|categories|classes|detections|faults|files|images|pictures|tensors|tiles"
    plural = re.compile(rf"(?<!of )\{{(?:len\([^{{}}]*\)|count)\}} (?:{nouns})\b")
    found = [
        f"{path.relative_to(LIBRARY)}: {match[0]}"
        for path in LIBRARY.rglob("*.py")
        for match in plural.finditer(path.read_text(encoding="utf-8"))
    ]
    # of which there are two or more, where these are said
    assert set(found) == {
        "data/checks.py: {count} categories",
        "data/crowding.py: {len(above)} images",
    }
