"""A font that has the letters of a caption, if there is one on the machine.
Chapter your_own_data."""

import warnings
from functools import cache

from matplotlib.font_manager import findfont, fontManager
from matplotlib.ft2font import FT2Font
from PIL import ImageFont

from deformable_detr.data.names import JOINERS


def caption_font(size: int, text: str = "") -> ImageFont.FreeTypeFont:
    """Of so many pixels, for this text.

    DejaVu Sans, which matplotlib brings, has accents, Greek, Cyrillic, Arabic and more. Where it
    lacks letters, as all of Chinese, Japanese, Korean and Hindi, the font of this machine is taken
    that has most; a warning says once where none has all.
    """
    letters = frozenset(ord(x) for x in text if x.isprintable() and x not in " " + JOINERS)
    file = findfont("DejaVu Sans")
    if not letters <= letters_of(file):
        file = _best_file(letters)
        if not letters <= letters_of(file):
            _warn_once(text)
    return _font(file, size)


@cache
def letters_of(file: str) -> frozenset[int]:
    """The code points that a font has a picture of; none of a file that is no font."""
    try:
        return frozenset(FT2Font(file).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


@cache
def _best_file(letters: frozenset[int]) -> str:
    files = {font.fname for font in fontManager.ttflist}
    usual = findfont("DejaVu Sans")  # where several have as many
    return max([usual, *sorted(files)], key=lambda file: len(letters & letters_of(file)))


@cache
def _font(file: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size)


_warned: list[str] = []


def _warn_once(text: str) -> None:
    if not _warned:
        _warned.append(text)
        warnings.warn(
            f"no font on this machine has all letters of {text!r}: others are drawn as boxes. Noto "
            "Sans CJK and Noto Sans Devanagari have those of Chinese, Japanese, Korean and Hindi",
            stacklevel=3,
        )
