"""Chapters from source to executed notebook: `python book/chapters.py chapters/01_sampling.py`.

A chapter is written once, in jupytext's percent format. From it this tool makes the notebook that
readers open: the solutions leave the exercises' cells (a stub that raises stands there instead) and
come back folded away below them; the chapter's measured run time, memory and reading time go into
its first cell; what `rendering` fills in is filled in. The notebook is then run, and stored with
its outputs.
"""

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path

import jupytext
import nbclient
import nbformat
import rendering
from nbformat import NotebookNode
from tqdm import tqdm

from deformable_detr.files import write_atomically
from deformable_detr.provenance import provenance

SOLUTION = re.compile(
    r"^(?P<indent>[ ]+)# BEGIN SOLUTION\n(?P<lines>.*?)^[ ]+# END SOLUTION$", re.M | re.S
)
MARKERS = re.compile(r"^[ ]*# (?:BEGIN|END) SOLUTION\n", re.M)
EXERCISE_MINUTES = re.compile(r"^\*difficulty .* · (\d+) minutes ·", re.M)
DETAILS = re.compile(r"<details>.*?</details>", re.S)
MACHINE_PATH = re.compile(
    r"(?<![\w.:/~])/(?:home|root|Users|tmp|var|usr|opt|etc|mnt|private|work)/\S*|\b[A-Z]:\\\w\S*"
)
COLOUR = re.compile(r"\x1b\[[\d;]*m")
WARNING = re.compile(r"\b\w*Warning: ")
ADDRESS = re.compile(r"\bat 0x[0-9a-f]{6,}")
METADATA = ("tags", "mystnb")
IGNORED = "# NBVAL_IGNORE_OUTPUT\n"  # in a source; a tag in the notebook, which readers do not see
PACKAGES = ("torchvision", "numpy", "matplotlib")
WORDS_PER_MINUTE, CODE_LINES_PER_MINUTE = 200, 15
CHAPTER_SECONDS, BOOK_SECONDS, CHAPTER_MIB = 120, 900, 1536
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
PEAK_MEMORY = """
import pathlib, re, resource, sys
status = pathlib.Path("/proc/self/status")
if status.exists():
    print(int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1]) // 1024)
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024**2)
"""


def results_file(source: Path) -> Path:
    """Where the measured figures of a chapter are kept, one JSON file for all chapters."""
    return source.resolve().parent.parent / "data" / "results" / "chapters.json"


def read_results(source: Path) -> dict[str, dict]:
    """The measured figures of every chapter so far, by the name of its file."""
    path = results_file(source)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a reader finds the old one or the new one, never a part."""
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def read_source(path: Path) -> NotebookNode:
    """A chapter's source as it stands, as a notebook: solutions and placeholders included."""
    return jupytext.read(path, fmt="py:percent")


def solution_lines(text: str) -> int:
    """The number of lines of a solution that are neither blank nor a comment."""
    lines = (line.strip() for line in text.splitlines())
    return sum(1 for line in lines if line and not line.startswith("#"))


def stub(code: str) -> str:
    """An exercise's cell as readers get it: every solution replaced by a line that raises."""

    def raising(match: re.Match[str]) -> str:
        count = solution_lines(match["lines"])
        plural = "" if count == 1 else "s"
        return f'{match["indent"]}raise NotImplementedError("{count} line{plural}")'

    stubbed, found = SOLUTION.subn(raising, code)
    if not found or MARKERS.search(stubbed):
        raise ValueError("an exercise needs '# BEGIN SOLUTION' and '# END SOLUTION' in a function")
    return stubbed


def solved(code: str) -> str:
    """An exercise's cell with its solution in place and without the markers."""
    return MARKERS.sub("", code)


def folded(code: str) -> str:
    """The solution as folded Markdown: the whole answer, without the call that checks it."""
    answer = re.split(r"^check\(", solved(code), flags=re.M)[0].rstrip()
    return f"<details><summary>Solution</summary>\n\n```python\n{answer}\n```\n\n</details>"


def measured_line(measured: dict) -> str:
    """One line of Markdown that says what a chapter costs its reader."""
    cores = measured["cores"]
    count = NUMBERS[cores] if cores < len(NUMBERS) else cores
    return (
        f"*Measured: runs in {max(1, round(measured['seconds']))} s on {count} "
        f"core{'' if cores == 1 else 's'}, peak memory {measured['peak_mib']} MiB, "
        f"about {measured['reading_minutes']} minutes to read, "
        f"exercises about {measured['exercise_minutes']} more.*"
    )


def reading_minutes(notebook: NotebookNode) -> int:
    """Minutes to read a notebook without exercises: its prose and code, without what is folded."""
    words = lines = 0
    exercise = False
    for cell in notebook.cells:
        if cell.cell_type == "code":
            unread = exercise or "hide-input" in cell.metadata.get("tags", [])
            lines += 0 if unread else sum(1 for line in cell.source.splitlines() if line.strip())
            continue
        exercise = exercise and DETAILS.search(cell.source) is None
        text = DETAILS.sub("", cell.source)
        words += len(text.split("## Exercise")[0].split())
        exercise = exercise or "## Exercise" in text
    return max(1, round(words / WORDS_PER_MINUTE + lines / CODE_LINES_PER_MINUTE))


def exercise_minutes(notebook: NotebookNode) -> int:
    """Minutes that the exercises of a notebook say they take, together."""
    return sum(int(m) for cell in notebook.cells for m in EXERCISE_MINUTES.findall(cell.source))


def is_exercise(cell: NotebookNode) -> bool:
    """Whether a cell is one that the reader completes."""
    return "exercise" in cell.metadata.get("tags", [])


def notebook_from_source(path: Path, measured: dict | None = None) -> NotebookNode:
    """The notebook of a chapter, without outputs.

    Args:
        path: the chapter's source, `chapters/NN_name.py`.
        measured: the chapter's measured figures; those stored by the last build if not given.

    Raises:
        ValueError: the source breaks a convention, or the chapter was never measured.
    """
    path = Path(path)
    if measured is None and (measured := read_results(path).get(path.stem)) is None:
        raise ValueError(f"{path.name} has no measured figures: run python book/chapters.py {path}")
    cells, unsolved, before, name = [], None, "", path.stem.split("_", 1)[-1]
    for index, cell in enumerate(read_source(path).cells):
        text = cell.source
        if is_exercise(cell):
            if unsolved is not None:
                raise ValueError(f"{path.name}: an exercise has no {{{{solution}}}} after it")
            unsolved, text = text, stub(text)
        elif cell.cell_type == "code" and "# BEGIN SOLUTION" in text:
            raise ValueError(f'{path.name}: a cell with a solution lacks tags=["exercise"]')
        elif cell.cell_type == "markdown" and "{{solution}}" in text:
            if unsolved is None:
                raise ValueError(f"{path.name}: {{{{solution}}}} without an exercise before it")
            text, unsolved = text.replace("{{solution}}", folded(unsolved)), None
        metadata = {key: cell.metadata[key] for key in METADATA if key in cell.metadata}
        if cell.cell_type == "code":
            make = nbformat.v4.new_code_cell
            if text.startswith(IGNORED):
                text = text.removeprefix(IGNORED)
                metadata["tags"] = [*metadata.get("tags", []), "nbval-ignore-output"]
            metadata = rendering.folded(metadata, before)
        else:
            make = nbformat.v4.new_markdown_cell
            text = text.replace("{{measured}}", measured_line(measured))
            text = rendering.rendered(text, path.stem)
        before = text if cell.cell_type == "markdown" else ""
        cells.append(make(text, metadata=metadata, id=f"{name}-{index:03d}"))
    if unsolved is not None:
        raise ValueError(f"{path.name}: the last exercise has no {{{{solution}}}} after it")
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


def output_text(output: NotebookNode) -> str:
    """All text of one output, as a reader would see it; pictures are left out."""
    if output.output_type == "stream":
        return output.text
    if output.output_type == "error":
        return f"{output.ename}: {output.evalue}"
    return "\n".join(str(data) for kind, data in output.data.items() if kind.startswith("text/"))


def faults(notebook: NotebookNode) -> list[str]:
    """What must not stand in a stored notebook: errors, warnings, stderr, a machine's paths."""
    found = []
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        texts = [cell.source, *map(output_text, outputs)]
        for output in outputs:
            text = output_text(output)
            if output.output_type == "error":
                found.append(f"{cell.id}: error: {text}")
            elif output.get("name") == "stderr":
                found.append(f"{cell.id}: written to stderr: {text.strip()}")
            elif WARNING.search(text):
                found.append(f"{cell.id}: a warning: {text.strip()}")
            elif ADDRESS.search(text):
                found.append(f"{cell.id}: an address in memory, new in each run: {text.strip()}")
        own = (str(Path.home()), str(Path.cwd()), sys.prefix)
        for text in texts:
            paths = [match[0] for match in MACHINE_PATH.finditer(text)]
            paths += [path for path in own if len(path) > 1 and path in text]
            found += [f"{cell.id}: a path of this machine: {path}" for path in paths]
    return found


def usable_cores() -> int:
    """How many cores a chapter's arithmetic may use: those of this process, or fewer if told so."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return min(cores, int(os.environ.get("OMP_NUM_THREADS", cores)))


def execute(notebook: NotebookNode, folder: Path, name: str) -> tuple[float, int]:
    """Run a notebook in place in a new kernel with the working directory `folder`.

    Returns:
        Wall time in seconds, from the start of the kernel, and the kernel's peak memory in MiB.
    """
    notebook.cells.append(nbformat.v4.new_code_cell(PEAK_MEMORY))
    with tqdm(total=len(notebook.cells), desc=name, unit="cell", leave=False, disable=None) as bar:
        client = nbclient.NotebookClient(
            notebook,
            timeout=600,
            kernel_name="python3",
            resources={"metadata": {"path": str(folder)}},
            extra_arguments=["--log-level=ERROR"],
            record_timing=False,
            coalesce_streams=True,
            on_cell_start=lambda cell, cell_index: bar.update(cell_index - bar.n),
        )
        start = time.perf_counter()
        client.execute(env=os.environ | {"BOOK_STILL": "1"})
        seconds = time.perf_counter() - start
    return seconds, int(output_text(notebook.cells.pop().outputs[0]))


def build(source: Path) -> str:
    """Make, run, measure and store one chapter; return a line that says how it went.

    Raises:
        ValueError: the source or an output breaks a convention; nothing is stored then.
        nbclient.exceptions.CellExecutionError: a cell raised; nothing is stored then.
    """
    cores = usable_cores()
    measured = {"seconds": 0.0, "peak_mib": 0, "reading_minutes": 0, "cores": cores}
    measured["exercise_minutes"] = 0
    ran = notebook_from_source(source, measured)
    measured["seconds"], measured["peak_mib"] = execute(ran, source.resolve().parent, source.stem)
    if found := faults(ran):
        raise ValueError("\n".join(found))
    measured["seconds"] = round(measured["seconds"], 1)
    measured["reading_minutes"] = reading_minutes(ran)
    measured["exercise_minutes"] = exercise_minutes(ran)
    about = provenance(f"python book/chapters.py chapters/{source.name}", PACKAGES)
    about["versions"] = {"python": about.pop("python")} | about["versions"]
    measured = about | measured  # cores: those that the chapter could use

    stored = notebook_from_source(source, measured)
    for cell, run in zip(stored.cells, ran.cells, strict=True):
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = run.outputs, run.execution_count
    results = dict(sorted((read_results(source) | {source.stem: measured}).items()))
    write_text(results_file(source), json.dumps(results, indent=2) + "\n")
    write_text(source.with_suffix(".ipynb"), nbformat.writes(stored) + "\n")
    return f"{source.stem}: {measured['seconds']} s, {measured['peak_mib']} MiB"


def retell(source: Path) -> str:
    """Store a chapter's changed prose beside the outputs that it has; return a line that says so.

    Raises:
        ValueError: code has changed as well, so that the chapter must run, or it never ran.
    """
    path = source.with_suffix(".ipynb")
    if not path.exists():
        raise ValueError(f"{path.name} does not exist: run the chapter first")
    old, measured = nbformat.read(path, as_version=4), read_results(source)
    told = notebook_from_source(source)
    code = [[c for c in notebook.cells if c.cell_type == "code"] for notebook in (old, told)]
    if [cell.source for cell in code[0]] != [cell.source for cell in code[1]]:
        raise ValueError(f"the code of {source.name} has changed: run it")
    for before, now in zip(*code, strict=True):
        now.outputs, now.execution_count = before.outputs, before.execution_count
    measured[source.stem]["reading_minutes"] = reading_minutes(told)
    measured[source.stem]["exercise_minutes"] = exercise_minutes(told)
    write_text(results_file(source), json.dumps(measured, indent=2) + "\n")
    told.cells[0] = notebook_from_source(source).cells[0]  # with the new minutes
    write_text(path, nbformat.writes(told) + "\n")
    return f"{source.stem}: prose stored, outputs kept"


def differences(source: Path) -> list[str]:
    """Where the stored notebook of a chapter differs from what its source says now."""
    stored_path = source.with_suffix(".ipynb")
    if not stored_path.exists():
        return [f"{stored_path.name} does not exist"]
    stored = nbformat.read(stored_path, as_version=4)
    expected = notebook_from_source(source)
    found = []
    if len(stored.cells) != len(expected.cells):
        found.append(f"{len(stored.cells)} cells stored, {len(expected.cells)} in the source")
    for old, new in zip(stored.cells, expected.cells, strict=False):
        parts = ("id", "cell_type", "source", "metadata")
        found += [f"{new.id}: {part} differs" for part in parts if old.get(part) != new.get(part)]
    if stored.metadata != expected.metadata:
        found.append("the notebook's metadata differ")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Build the chapters named on the command line, or say whether they are up to date."""
    parser = argparse.ArgumentParser(prog="book/chapters.py", description=main.__doc__)
    parser.add_argument("sources", nargs="+", type=Path, metavar="chapters/NN_name.py")
    parser.add_argument(
        "--check",
        action="store_true",
        help="run and write nothing; say where a stored notebook differs from its source",
    )
    parser.add_argument(
        "--prose", action="store_true", help="run nothing; store changed prose beside old outputs"
    )
    options = parser.parse_args(arguments)
    failed = 0
    for source in options.sources:
        try:
            if options.check:
                if found := differences(source):
                    raise ValueError("\n".join(found))
                print(f"{source.stem}: up to date", flush=True)
            else:
                make = retell if options.prose else build
                print(make(source), flush=True)
        except (ValueError, nbclient.exceptions.CellExecutionError) as error:
            failed += 1
            reason = COLOUR.sub("", str(error))
            print(f"{source.stem}: FAILED, nothing stored\n{reason}", file=sys.stderr, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
