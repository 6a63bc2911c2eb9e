"""Names are drawn in their own letters, or it is said that they are not."""

import warnings

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.font_manager import fontManager
from PIL import Image

from deformable_detr.look import fonts
from deformable_detr.look.fonts import caption_font, letters_of
from deformable_detr.look.pictures import draw_boxes

RARE = "漢字"  # which DejaVu Sans has not


@pytest.fixture(autouse=True)
def as_at_first(monkeypatch):
    """No warning was given yet, and of fonts there is none but DejaVu Sans."""
    monkeypatch.setattr(fonts, "_warned", [])
    usual = [font for font in fontManager.ttflist if font.name == "DejaVu Sans"]
    monkeypatch.setattr(fontManager, "ttflist", usual)
    fonts._best_file.cache_clear()
    yield
    fonts._best_file.cache_clear()


@pytest.fixture
def rare_font(tmp_path):
    """A font with RARE, digits and a blank, the only one beside DejaVu Sans for one test."""
    pen = TTGlyphPen(None)
    for place, corner in enumerate([(0, 0), (0, 900), (700, 900), (700, 0)]):
        (pen.lineTo if place else pen.moveTo)(corner)
    pen.closePath()
    letters = RARE + "0123456789. "
    names = {ord(letter): f"g{i}" for i, letter in enumerate(letters)}
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", *names.values()])
    builder.setupCharacterMap(names)
    builder.setupGlyf(dict.fromkeys([".notdef", *names.values()], pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys([".notdef", *names.values()], (800, 0)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Rare", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "rare.ttf")
    fontManager.addfont(tmp_path / "rare.ttf")
    return str(tmp_path / "rare.ttf")


def test_names_are_drawn_in_their_own_letters():
    """Of a letter that a font lacks, it draws the same empty box."""
    font = caption_font(20, "eé\u0416\u03a9")
    drawn = {bytes(font.getmask(letter)) for letter in "eé\u0416\u03a9"}
    empty = bytes(font.getmask("\ufff0"))
    assert len(drawn) == 4 and empty not in drawn


def test_a_font_that_has_the_letters_is_found(rare_font):
    assert caption_font(20, f"{RARE} 0.93").path == rare_font
    assert caption_font(20, "red 0.93").path != rare_font
    assert {ord(letter) for letter in RARE} <= letters_of(rare_font)


def test_that_letters_are_lacking_is_said_once():
    """In whatever name comes first: not for each caption of a picture."""
    image = Image.new("RGB", (200, 200))
    with pytest.warns(UserWarning, match="no font on this machine has all letters of") as warned:
        draw_boxes(image, [[0, 50, 60, 90]] * 3, [0, 1, 2], [f"{RARE} 0.9", RARE[0], RARE[1]])
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_boxes(image, [[0, 50, 60, 90]], [0], [RARE])


def test_what_is_no_letter_is_not_missed():
    """Joiners are not drawn, and what a terminal would obey is written out."""
    image = Image.new("RGB", (200, 200))
    names = ["a\u200db", "a\nb", "a\ud800b", "a\x1b[31mb"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_boxes(image, [[0, 50, 60, 90]] * 4, [0] * 4, names)
