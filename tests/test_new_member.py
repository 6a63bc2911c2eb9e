"""The researchers' page: its member, its checks, its recipe and its commands, run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from deformable_detr.models import MODELS
from tests.conftest import write_coco

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "book" / "new_member.md").read_text(encoding="utf-8")
BLOCKS = {
    kind: re.findall(rf"```{kind}\n(.*?)```", PAGE, re.S) for kind in ("python", "toml", "sh")
}
MEMBER, CHECKS, LOADING = BLOCKS["python"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a reader has saved the page's two files, beside a set of images."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "distinct.py").write_text(MEMBER)
    (folder / "distinct.toml").write_text(BLOCKS["toml"][0])
    write_coco(folder / "DATA", images=8, side=64)
    write_coco(folder / "DATA", "val", images=2, side=64)
    return folder


def run(folder, *arguments):
    """The ordinary interpreter, in the reader's folder."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_it_has_40_lines():
    """Without imports, blank lines and what makes it a command."""
    body = MEMBER[MEMBER.index("@dataclass") : MEMBER.index("if __name__")]
    assert len([line for line in body.splitlines() if line.strip()]) <= 40


def check(source, monkeypatch):
    """The page's checks of a member with this source; what it registers is taken back."""
    module = ModuleType("distinct")
    monkeypatch.setitem(sys.modules, "distinct", module)
    monkeypatch.setitem(MODELS, "distinct", None)
    exec(source, vars(module))
    exec(CHECKS, {})


def test_its_checks_pass(monkeypatch):
    check(MEMBER, monkeypatch)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("self.window, stride=1, padding=self.window // 2", "1, stride=1"),
        ("scores - 1e4", "scores + 1e4"),
    ],
)
def test_its_checks_can_fail(old, new, monkeypatch):
    """With a window that is not looked at, or a penalty that puts the best last."""
    assert old in MEMBER
    with pytest.raises(AssertionError):
        check(MEMBER.replace(old, new), monkeypatch)


def test_its_command_trains_what_it_loads(folder):
    python, *arguments = BLOCKS["sh"][0].split()
    assert python == "python"
    done = run(folder, *arguments, "--epochs", "1")
    assert done.returncode == 0, done.stderr
    done = run(folder, "-c", LOADING)
    assert done.returncode == 0, done.stderr


def test_its_bad_input_is_one_line(folder):
    """The page's other command, with a window that is none."""
    arguments = BLOCKS["sh"][1].replace("window=1", "window=2").split()[1:]
    done = run(folder, *arguments, "--epochs", "1")
    assert done.returncode and "Traceback" not in done.stderr
    assert "window must be odd, got 2" in done.stderr


def test_what_the_page_names_is_there():
    for name in re.findall(r"`((?:models|losses|tests|experiments)/\w+\.py)`", PAGE):
        inside = name if name.startswith(("tests", "experiments")) else f"deformable_detr/{name}"
        assert (ROOT / inside).exists(), name
