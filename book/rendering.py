"""What a chapter's source leaves to the tool: its number, links to other chapters, citations, the
map at its head, and which outputs are folded.

In Markdown, `{{n}}` is the chapter's number, `{{chapter sampling}}` a link to another chapter under
its title, `{{map}}` a line that says where in the book one is, and {cite}`key` a link to a paper.
"""

import functools
import re
import tomllib
from pathlib import Path

import pybtex.database

BOOK = Path(__file__).resolve().parent
CONTENTS, BIBLIOGRAPHY = BOOK / "contents.toml", BOOK / "references.bib"
CHAPTER_LINK = re.compile(r"\{\{chapter (\w+)\}\}")
CITATION = re.compile(r"\{cite\}`([^`]+)`")
ROMAN = ("I", "II", "III", "IV", "V", "VI")


@functools.cache
def parts() -> list[dict]:
    """The parts of the book in order: title and names of chapters."""
    return tomllib.loads(CONTENTS.read_text(encoding="utf-8"))["part"]


@functools.cache
def files() -> dict[str, str]:
    """The file of each chapter without its ending, by name: {"sampling": "01_sampling", ...}."""
    names = [name for part in parts() for name in part["chapters"]]
    return {name: f"{number:02d}_{name}" for number, name in enumerate(names, 1)}


@functools.cache
def title(name: str, folder: Path = BOOK.parent / "chapters") -> str:
    """A chapter's title, from the first heading of its source."""
    text = (folder / f"{files()[name]}.py").read_text(encoding="utf-8")
    return re.search(r"^# # (?:\{\{n\}\}\. )?(.+)$", text, re.M)[1]


def link(name: str, folder: str = "") -> str:
    """A link to a chapter under its title; it works in JupyterLab and in the HTML book."""
    if name not in files():
        raise ValueError(f"no chapter is called {name}; there are {', '.join(files())}")
    return f"[{title(name)}]({folder}{files()[name]}.ipynb)"


def chapter_links(text: str, folder: str = "") -> str:
    """A text with every {{chapter name}} made a link."""
    return CHAPTER_LINK.sub(lambda match: link(match[1], folder), text)


def book_map(name: str) -> str:
    """The parts of the book in one line each, and where in them the chapter `name` stands."""
    lines = []
    for numeral, part in zip(ROMAN, parts(), strict=False):
        if name in part["chapters"]:
            here = (f"**{title(n)}**" if n == name else link(n) for n in part["chapters"])
            lines.append(f"*{numeral} {part['title']}:* " + " · ".join(here))
        else:
            first = files()[part["chapters"][0]]
            lines.append(f"[{numeral} {part['title']}]({first}.ipynb)")
    return "> " + "  \n> ".join(lines)


@functools.cache
def papers() -> dict[str, pybtex.database.Entry]:
    """The entries of the bibliography by key."""
    return pybtex.database.parse_file(BIBLIOGRAPHY, bib_format="bibtex").entries


def cited(key: str) -> str:
    """A citation as a reader says it, "Zhu et al. (2021)", with a link where the paper has one."""
    if key not in papers():
        raise ValueError(f"references.bib has no entry {key}")
    entry = papers()[key]
    people = entry.persons.get("author") or entry.persons.get("editor")
    names = [" ".join(person.prelast_names + person.last_names) for person in people]
    names = [name.replace("{", "").replace("}", "").replace("\\L", "Ł") for name in names]
    shown = " and ".join(names) if len(names) < 3 else f"{names[0]} et al."
    text = f"{shown} ({entry.fields['year']})"
    address = entry.fields.get("url")
    if "doi" in entry.fields:
        address = address or f"https://doi.org/{entry.fields['doi']}"
    return f"[{text}]({address})" if address else text


def citations(keys: str) -> str:
    """Several citations, their keys separated by commas."""
    return ", ".join(cited(key.strip()) for key in keys.split(","))


def rendered(text: str, stem: str) -> str:
    """A Markdown cell of the chapter `stem` ("01_sampling") with all placeholders filled."""
    number, name = stem.split("_", 1)
    text = text.replace("{{n}}", str(int(number)))
    if "{{map}}" in text:
        text = text.replace("{{map}}", book_map(name))
    text = chapter_links(text)
    return CITATION.sub(lambda match: citations(match[1]), text)


def folded(metadata: dict, prose_before: str) -> dict:
    """A code cell's metadata: outputs hidden where the prose above asks for a prediction, and input
    hidden where the source says so, in the HTML book (tags) and in JupyterLab."""
    tags, jupyter = list(metadata.get("tags", [])), {}
    if "Before you run" in prose_before.strip().split("\n\n")[-1] and "hide-output" not in tags:
        tags.append("hide-output")
    if "hide-output" in tags:
        jupyter["outputs_hidden"] = True
    if "hide-input" in tags:
        jupyter["source_hidden"] = True
    return metadata | ({"tags": tags} if tags else {}) | ({"jupyter": jupyter} if jupyter else {})
