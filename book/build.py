"""The HTML book, from the executed notebooks: `python book/build.py book/_build`.

The pages of book/ and the notebooks of chapters/ are gathered in OUTPUT/source, and Sphinx turns
them into OUTPUT/html. No chapter is run, and every warning is an error.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import nbformat
import rendering
from sphinx.cmd.build import main as sphinx

BOOK = Path(__file__).resolve().parent
CHAPTERS = BOOK.parent / "chapters"
RESULTS = BOOK.parent / "data" / "results" / "chapters.json"


def title(notebook: Path) -> str:
    """The text of a chapter's first heading."""
    first = nbformat.read(notebook, as_version=4).cells[0].source
    return first.splitlines()[0].removeprefix("# ")


def run_times(results: dict[str, dict]) -> str:
    """The measured figures of every chapter as a Markdown table, with their sum."""
    rows = ["| chapter | run time | peak memory | reading | exercises |", "|:--|--:|--:|--:|--:|"]
    for name, measured in results.items():
        link = f"[{title(CHAPTERS / f'{name}.ipynb')}](chapters/{name}.ipynb)"
        rows.append(
            f"| {link} | {measured['seconds']:.0f} s | {measured['peak_mib']} MiB "
            f"| {measured['reading_minutes']} min | {measured['exercise_minutes']} min |"
        )
    seconds = sum(measured["seconds"] for measured in results.values())
    read, solve = (
        sum(measured[f"{kind}_minutes"] for measured in results.values())
        for kind in ("reading", "exercise")
    )
    rows.append(f"| **all** | **{seconds:.0f} s** | | **{read} min** | **{solve} min** |")
    return "\n".join(rows)


def machines(results: dict[str, dict]) -> str:
    """The processors and package versions that the figures were measured with, one per line."""
    lines = set()
    for measured in results.values():
        packages = ", ".join(f"{name} {number}" for name, number in measured["versions"].items())
        cores = f"{measured['cores']} core{'' if measured['cores'] == 1 else 's'}"
        lines.add(f"- {cores} of {measured['cpu']}; {packages}")
    return "\n".join(sorted(lines))


def tables_of_contents() -> str:
    """The chapters, a list for each part, as Sphinx wants them."""
    return "\n\n".join(
        "\n".join(
            ["```{toctree}", f":caption: {part['title']}", ":maxdepth: 1", ""]
            + [f"chapters/{rendering.files()[name]}" for name in part["chapters"]]
            + ["```"]
        )
        for part in rendering.parts()
    )


def gather(source: Path) -> None:
    """Fill the folder `source` with everything that Sphinx reads."""
    shutil.rmtree(source, ignore_errors=True)
    (source / "chapters").mkdir(parents=True)
    for page in [*BOOK.glob("*.md"), *BOOK.glob("*.bib")]:
        shutil.copy(page, source)
    for picture in RESULTS.parent.glob("*.png"):
        shutil.copy(picture, source)
    for page in source.glob("*.md"):
        text = page.read_text(encoding="utf-8").replace("](../data/results/", "](")
        page.write_text(rendering.chapter_links(text, "chapters/"), encoding="utf-8")
    for notebook in CHAPTERS.glob("*.ipynb"):
        shutil.copy(notebook, source / "chapters")
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    fill(source / "runtime.md", run_times=run_times(results), machines=machines(results))
    fill(source / "index.md", chapters=tables_of_contents())


def fill(page: Path, **texts: str) -> None:
    """Replace each {{name}} in a page by the text of that name."""
    text = page.read_text(encoding="utf-8")
    for name, value in texts.items():
        text = text.replace("{{" + name + "}}", value)
    page.write_text(text, encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Build the HTML book into OUTPUT/html; any warning is an error."""
    parser = argparse.ArgumentParser(prog="book/build.py", description=main.__doc__)
    parser.add_argument("output", type=Path, metavar="OUTPUT")
    output = parser.parse_args(arguments).output
    gather(output / "source")
    # -E: the pages are copied anew each time, so nothing of an earlier build can be reused
    options = ["-b", "html", "-q", "-E", "-W", "--keep-going", "-c", str(BOOK)]
    return sphinx(
        [*options, "-d", str(output / "doctrees"), str(output / "source"), str(output / "html")]
    )


if __name__ == "__main__":
    sys.exit(main())
