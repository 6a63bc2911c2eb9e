"""What every chapter keeps: in step with its source, exercises that can be trusted, figures that
are described, and a cost that stays within the book's limits.

That the chapters run and print what is stored is nbval's to check (`make test`).
"""

import contextlib
import importlib
import io
import itertools
import re
import symtable
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import pytest
import rendering
import torch
from nbformat import NotebookNode

import chapters as tool
from deformable_detr.exercises import CHECKERS, verdicts

CHAPTERS = Path(__file__).resolve().parent.parent / "chapters"
SOURCES = sorted(CHAPTERS.glob("[0-9][0-9]_*.py"))
CHECK_CALL = re.compile(r'^check\("(\w+\.\d+)"', re.M)
DIFFICULTY = re.compile(r"^\*difficulty [●○]{3} · \d+ minutes · (\d+) lines?\*$", re.M)
FIGURE = re.compile(r"\*Figure (\d+)\.(\d+)\. \S")
SUMMARY = "<details><summary>"
UNUSUAL = f"{SUMMARY}I pass the first check but fail the second"

each_chapter = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def stored(source: Path) -> NotebookNode:
    return nbformat.read(source.with_suffix(".ipynb"), as_version=4)


def chapter_number(source: Path) -> int:
    return int(source.stem[:2])


def chapter_name(source: Path) -> str:
    return source.stem[3:]


def code_of(source: Path) -> list[NotebookNode]:
    """The code cells of a chapter's source, solutions and their markers included."""
    return [cell for cell in tool.read_source(source).cells if cell.cell_type == "code"]


def exercise_number(code: str) -> str:
    (number,) = CHECK_CALL.findall(code)
    return number


def exercises() -> list:
    found = []
    for source in SOURCES:
        for index, cell in enumerate(code_of(source)):
            if tool.is_exercise(cell):
                number = exercise_number(cell.source)
                found.append(pytest.param(source, index, id=f"{source.stem}-{number}"))
    return found


def names(code: str) -> tuple[set[str], set[str]]:
    """The global names that a cell binds, and those that it reads."""
    top = symtable.symtable(code, "cell", "exec")
    symbols = top.get_symbols()
    bound = {s.get_name() for s in symbols if s.is_assigned() or s.is_imported()}
    read = {s.get_name() for s in symbols if s.is_referenced()}
    tables = top.get_children()
    while tables:
        table = tables.pop()
        tables += table.get_children()
        read |= {s.get_name() for s in table.get_symbols() if s.is_global() and s.is_referenced()}
    return bound, read


def cells_needed(code: list[str], index: int) -> list[str]:
    """The cells before `index` that bind what the cell at `index` reads, directly or not."""
    _, wanted = names(code[index])
    needed = []
    for text in reversed(code[:index]):
        bound, read = names(text)
        if bound & wanted:
            needed.insert(0, text)
            wanted |= read
    return needed


def run(cells: list[str]) -> str:
    """Run cells in one new namespace and return what they print."""
    printed = io.StringIO()
    namespace: dict = {"__name__": "__main__"}
    with contextlib.redirect_stdout(printed):
        for text in cells:
            exec(compile(text, "<cell>", "exec"), namespace)
    return printed.getvalue()


@pytest.fixture
def in_chapters(monkeypatch):
    """The surroundings of a chapter: its folder, figures that need no screen, and gradients, which
    a chapter may turn off for itself."""
    monkeypatch.chdir(CHAPTERS)
    matplotlib.use("Agg")
    with plt.rc_context(), torch.enable_grad():
        yield
    plt.close("all")


def test_every_notebook_has_a_source():
    assert SOURCES, "no chapter found"
    notebooks = sorted(path.stem for path in CHAPTERS.glob("*.ipynb"))
    assert notebooks == [source.stem for source in SOURCES]
    assert sorted(tool.read_results(SOURCES[0])) == notebooks


@each_chapter
def test_notebook_is_in_step_with_its_source(source):
    assert tool.differences(source) == [], f"run python book/chapters.py chapters/{source.name}"


@each_chapter
def test_opens_and_closes_as_every_chapter(source):
    cells = stored(source).cells
    first = cells[0].source
    assert first.startswith(f"# {chapter_number(source)}. ")
    assert "You will be able to" in first
    assert "You should know" in first
    assert "Measured: runs in" in first
    goals = re.findall(r"^[-*] ", first.split("You will be able to")[1], re.M)
    assert 3 <= len(goals) <= 5
    last = "\n".join(cell.source for cell in cells[-3:] if cell.cell_type == "markdown")
    assert "Differs from the paper" in last
    assert "Further reading" in last


@each_chapter
def test_numbers_links_and_citations_are_the_tools(source):
    text = "\n".join(c.source for c in tool.read_source(source).cells if c.cell_type == "markdown")
    assert "{{map}}" in text and "{cite}`" in text
    number = chapter_number(source)
    own = rf"(?:^#+ |[Ff]igures? |[Ss]ections? |[Ee]xercises? ){number}\.\d"
    assert not re.findall(own, text, re.M), "write {{n}}.1"
    assert not re.findall(r"\b[Cc]hapters? \d", text), "write {{chapter sampling}}"
    assert re.findall(r"\{\{n\}\}\. ", text.splitlines()[0])


def test_files_are_the_table_of_contents():
    assert [source.stem for source in SOURCES] == list(rendering.files().values())


@each_chapter
def test_predictions_are_folded(source):
    cells = stored(source).cells
    for before, cell in itertools.pairwise(cells):
        if cell.cell_type == "code" and "Before you run" in before.source.split("\n\n")[-1]:
            assert "hide-output" in cell.metadata.tags and cell.metadata.jupyter.outputs_hidden


@each_chapter
def test_outputs_are_clean(source):
    assert tool.faults(stored(source)) == []


@each_chapter
def test_code_cells_are_run_and_short(source):
    code = [cell for cell in stored(source).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        assert len(cell.source.splitlines()) <= 40, f"{cell.id} is longer than 40 lines"


@each_chapter
def test_figures_are_described(source):
    cells = stored(source).cells
    figures = itertools.count(1)
    for cell, following in itertools.pairwise(cells):
        outputs = cell.get("outputs", [])
        if not any("image/png" in output.get("data", {}) for output in outputs):
            continue
        alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        assert len(alt) >= 30, f"{cell.id} has no alt text worth the name"
        caption = FIGURE.match(following.source)
        assert caption, f"{cell.id} has no caption below it"
        assert caption.groups() == (str(chapter_number(source)), str(next(figures)))
    assert next(figures) > 1, "a chapter without a figure"


@each_chapter
def test_time_and_memory_are_within_limits(source):
    measured = tool.read_results(source)[source.stem]
    assert measured["seconds"] <= tool.CHAPTER_SECONDS
    assert measured["peak_mib"] <= tool.CHAPTER_MIB


def test_the_book_is_within_its_limit():
    results = tool.read_results(SOURCES[0])
    assert sum(measured["seconds"] for measured in results.values()) <= tool.BOOK_SECONDS
    page = (CHAPTERS.parent / "book" / "runtime.md").read_text(encoding="utf-8")
    assert f"more than {tool.CHAPTER_SECONDS} seconds" in page
    assert f"more than {tool.BOOK_SECONDS}," in page


@each_chapter
def test_exercises_and_checkers_belong_together(source):
    name = chapter_name(source)
    checkers = importlib.import_module(f"deformable_detr.exercises.{name}")
    asked = [exercise_number(cell.source) for cell in code_of(source) if tool.is_exercise(cell)]
    assert asked == [f"{name}.{k}" for k in range(1, len(asked) + 1)]
    assert len(asked) >= 3
    assert sorted(asked) == sorted(key for key in CHECKERS if key.split(".")[0] == name)
    assert sorted(asked) == sorted(checkers.WRONG)
    assert all(checkers.WRONG.values()), "every exercise needs a wrong answer that fails"


@each_chapter
def test_exercises_come_with_help(source):
    cells = tool.read_source(source).cells
    for index, cell in enumerate(cells):
        if not tool.is_exercise(cell):
            continue
        number = exercise_number(cell.source)
        task, helps = cells[index - 1].source, cells[index + 1].source
        shown = "{{n}}." + number.split(".")[1]
        assert re.search(rf"^## Exercise {re.escape(shown)}\s+\S", task, re.M)
        claimed = DIFFICULTY.search(task)
        assert claimed, f"exercise {number} lacks its difficulty, minutes and lines"
        lines = sum(
            tool.solution_lines(match["lines"]) for match in tool.SOLUTION.finditer(cell.source)
        )
        assert int(claimed[1]) == lines, f"the solution of exercise {number} has {lines} lines"
        for help_text in (f"{SUMMARY}Hint 1", f"{SUMMARY}Hint 2", UNUSUAL, "{{solution}}"):
            assert help_text in helps, f"exercise {number} lacks {help_text}"


@pytest.mark.parametrize(("source", "index"), exercises())
def test_stub_fails_and_solution_passes(source, index, in_chapters):
    code = [cell.source for cell in code_of(source)]
    exercise = code[index]
    number = exercise_number(exercise)
    before = cells_needed(code, index)
    assert f"Exercise {number}: not written yet" in run([*before, tool.stub(exercise)])
    printed = run([*before, tool.solved(exercise)])
    assert "passed: " in printed
    assert "FAILED" not in printed


@pytest.mark.parametrize(("source", "index"), exercises())
def test_wrong_answers_fail(source, index, in_chapters):
    number = exercise_number(code_of(source)[index].source)
    checkers = importlib.import_module(f"deformable_detr.exercises.{chapter_name(source)}")
    for misconception, answer in checkers.WRONG[number]:
        answers = answer if isinstance(answer, tuple) else (answer,)
        found = verdicts(number, *answers)
        assert not found[-1].passed, f"exercise {number} accepts: {misconception}"
        assert "it raised" not in found[-1].message, f"{misconception}: {found[-1]}"
