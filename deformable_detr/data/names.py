"""Names and ids as they may be printed and ordered, wherever they came from.
Chapter your_own_data."""

from collections.abc import Hashable, Iterable

LONGEST = 200  # characters of a name in a message
JOINERS = "\u200c\u200d"  # are not drawn, but Persian and Hindi words need them


def printable(name: object, longest: int = LONGEST) -> str:
    """A name from outside as part of one line: what a terminal would obey is written as an escape,
    such as a newline as \\n, and of long names the middle is left out.

    Every file name, class name and id that a message holds goes through here.
    """
    text = str(name)
    if len(text) > longest:
        half = longest // 2
        text = f"{text[:half]}...{text[len(text) - half :]}"
    return "".join(c if c.isprintable() or c in JOINERS else _escaped(c) for c in text)


def listed(names: Iterable[object], most: int = 10) -> str:
    """The first of some names, printable, with commas."""
    names = list(names)
    more = ", ..." if len(names) > most else ""
    return ", ".join(printable(name, 60) for name in names[:most]) + more


def counted(count: int, noun: str) -> str:
    """Such as "1 class" and "2 classes"."""
    if count == 1:
        return f"1 {noun}"
    if noun.endswith("y"):
        return f"{count} {noun[:-1]}ies"
    return f"{count} {noun}{'es' if noun.endswith(('s', 'x')) else 's'}"


def id_order(key: Hashable) -> tuple:
    """What ids are sorted by: numbers come first, then texts, and nothing else is compared."""
    return (isinstance(key, str), key) if isinstance(key, int | str) else (2, repr(key))


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
