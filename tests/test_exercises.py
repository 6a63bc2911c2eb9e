"""The machinery of the exercises: what `check` tells a reader, and how sources become notebooks."""

import json
import re

import numpy as np
import pytest
import torch

import chapters as tool
from deformable_detr import exercises
from deformable_detr.exercises import check, checks, expect, verdicts

CODE = '''def add(a, b):
    """Sum."""
    # BEGIN SOLUTION
    # one line is a comment

    total = a + b
    return total
    # END SOLUTION


check("0.1", add)'''

SOURCE = f"""# %% [markdown]
# # 0. Nothing
#
# {{{{measured}}}}

# %% tags=["exercise"] other=1
{CODE}

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Add.
#
# </details>
#
# {{{{solution}}}}
"""
MEASURED = {
    "seconds": 1.6,
    "peak_mib": 300,
    "reading_minutes": 4,
    "exercise_minutes": 5,
    "cores": 2,
}


@pytest.fixture
def ladder(monkeypatch):
    """Exercise 0.1, whose checker has three checks."""
    monkeypatch.setattr(exercises, "CHECKERS", {})
    monkeypatch.setattr(exercises.importlib, "import_module", lambda name: None)

    @checks("0.1")
    def check_add(add):
        yield "one and two"
        expect(add(1, 2), 3, hint="a product?")
        yield "tensors"
        expect(add(torch.ones(2), torch.ones(2)), torch.tensor([2.0, 2.0]))
        yield "anything at random"
        values = torch.rand(2)
        expect(add(values, values), 2 * values)


def told(capsys, *answers) -> list[str]:
    check("0.1", *answers)
    return capsys.readouterr().out.splitlines()


def test_check_says_what_passed(ladder, capsys):
    lines = ["passed: one and two", "passed: tensors", "passed: anything at random"]
    assert told(capsys, lambda a, b: a + b) == ["Exercise 0.1", *lines]


def test_check_stops_at_the_first_failure_and_says_why(ladder, capsys):
    failed = "FAILED: one and two (expected 3, got 2: a product?)"
    assert told(capsys, lambda a, b: a * b) == ["Exercise 0.1", failed]
    passed, failed = told(capsys, lambda a, b: 3)[1:]
    assert passed == "passed: one and two"
    assert failed == "FAILED: tensors (expected shape (2,), got shape ())"


def test_check_knows_the_stub_from_an_error(ladder, capsys):
    def unwritten(a, b):
        raise NotImplementedError("1 line")

    def broken(a, b):
        raise NotImplementedError("this dtype")

    assert told(capsys, unwritten) == ["Exercise 0.1: not written yet"]
    reason = "it raised NotImplementedError: this dtype"
    assert told(capsys, broken) == ["Exercise 0.1", f"FAILED: one and two ({reason})"]


def test_checks_are_repeatable_and_leave_the_random_state(ladder):
    seen = []

    def record(a, b):
        seen.append(a)
        return a + b

    before = torch.get_rng_state()
    assert verdicts("0.1", record) == verdicts("0.1", record)
    assert torch.equal(seen[2], seen[5])
    assert torch.equal(torch.get_rng_state(), before)


def test_two_checkers_for_one_exercise_are_refused(ladder):
    with pytest.raises(ValueError, match=r"exercise 0\.1 has two checkers"):
        checks("0.1")(lambda answer: iter(()))


@pytest.mark.parametrize(
    ("given", "expected", "message"),
    [
        (0.5, 0.25, "expected 0.25, got 0.5"),
        (None, 0.25, "expected 0.25, got NoneType"),
        ((2, 3), (3, 2), "expected (3, 2), got (2, 3)"),
        (np.array([1.0, 2.0]), torch.tensor([1.0, 4.0]), "expected [1, 4], got [1, 2]"),
        (torch.zeros(5, 4), torch.ones(5, 4), "a tensor (5, 4) of mean 1, got a tensor (5, 4)"),
    ],
)
def test_expect_says_what_differs(given, expected, message):
    with pytest.raises(AssertionError, match=re.escape(message)):
        expect(given, expected)


def test_expect_compares_within_a_tolerance():
    expect(torch.tensor(1.0, dtype=torch.float64), 1 + 1e-7)
    expect(1.2, 1.0, atol=0.3)
    expect(torch.tensor(torch.nan), torch.nan)


def test_stub_and_solution_come_from_one_source():
    stub = tool.stub(CODE)
    assert stub == (
        'def add(a, b):\n    """Sum."""\n    raise NotImplementedError("2 lines")\n\n\n'
        'check("0.1", add)'
    )
    namespace = {"check": lambda *answers: None}
    exec(tool.solved(CODE), namespace)
    assert namespace["add"](1, 2) == 3
    assert "check(" not in tool.folded(CODE)


def test_notebook_holds_stub_solution_and_measured_figures(tmp_path):
    source = tmp_path / "00_nothing.py"
    source.write_text(SOURCE, encoding="utf-8")
    first, exercise, helps = tool.notebook_from_source(source, MEASURED).cells
    assert first.source.endswith(
        "*Measured: runs in 2 s on two cores, peak memory 300 MiB, about 4 minutes to read, "
        "exercises about 5 more.*"
    )
    assert exercise.source == tool.stub(CODE)
    assert exercise.metadata == {"tags": ["exercise"]}
    assert exercise.id == "nothing-001"
    assert helps.source.endswith(tool.folded(CODE))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("# {{solution}}", "#", "no {{solution}} after it"),
        (' tags=["exercise"]', "", "lacks tags"),
        ("    # END SOLUTION\n", "", "an exercise needs"),
    ],
)
def test_a_source_that_breaks_a_convention_is_refused(tmp_path, old, new, message):
    source = tmp_path / "00_nothing.py"
    source.write_text(SOURCE.replace(old, new), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)):
        tool.notebook_from_source(source, MEASURED)


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("import warnings; warnings.warn('old')", "written to stderr"),
        ("print('/home' + '/someone/data')", "a path of this machine: /home"),
        ("object()", "an address in memory"),
        ("1 / 0", "division by zero"),
    ],
)
def test_a_chapter_with_a_faulty_output_is_not_stored(tmp_path, capsys, code, fault):
    source = tmp_path / "chapters" / "00_nothing.py"
    source.parent.mkdir()
    source.write_text(f"# %%\n{code}\n", encoding="utf-8")
    assert tool.main([str(source)]) == 1
    assert fault in capsys.readouterr().err
    assert not source.with_suffix(".ipynb").exists()
    assert not tool.results_file(source).exists()


def test_a_chapter_is_run_measured_and_stored(tmp_path, capsys):
    source = tmp_path / "chapters" / "00_nothing.py"
    source.parent.mkdir()
    source.write_text("# %% [markdown]\n# {{measured}}\n\n# %%\n1 + 1\n", encoding="utf-8")
    assert tool.main([str(source)]) == 0
    results = json.loads(tool.results_file(source).read_text(encoding="utf-8"))
    assert 0 < results["00_nothing"]["seconds"] < 60
    assert 10 < results["00_nothing"]["peak_mib"] < 1000
    assert tool.main(["--check", str(source)]) == 0
    source.write_text("# %% [markdown]\n# {{measured}}\n\n# %%\n1 + 2\n", encoding="utf-8")
    assert tool.main(["--check", str(source)]) == 1
    assert "nothing-001: source differs" in capsys.readouterr().err
