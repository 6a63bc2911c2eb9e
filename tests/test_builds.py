"""Built kernels that a disk, a compiler or a signal has harmed, and compilers with more words."""

import multiprocessing
import os
import shlex
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch

from deformable_detr.ops import BackendError, cpu
from deformable_detr.ops import build as building
from deformable_detr.ops.build import build, compiler, machine
from deformable_detr.ops.cache import BUILDING, HOUR, TEMPORARY, cache_folder, temporary_folder
from tests.test_kernels import MACROS, cache, no_home  # noqa: F401

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))
OLD = time.time() - 25 * HOUR
WRITES = 'for last; do :; done; echo "a library" > "$last"'


@pytest.fixture
def pretend(cache, tmp_path, monkeypatch):  # noqa: F811
    """Puts a script in the compiler's place: its name, and what it does for --version and else."""

    def use(building=WRITES, version="echo pretended 1.0", name="pretended"):
        script = tmp_path / name
        script.write_text(f'#!/bin/sh\ncase "$*" in *--version*) {version};; *) {building};; esac')
        script.chmod(0o700)
        monkeypatch.setenv("CXX", shlex.quote(str(script)))
        compiler.cache_clear()
        machine.cache_clear()
        return script

    return use


# Libraries


@pytest.mark.parametrize(
    "harm",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: bytes(len(content)),
        lambda content: content[:4] + b"?" + content[5:],
    ],
    ids=["empty", "cut", "zeros", "one byte"],
)
def test_a_library_that_is_not_whole_is_built_again(pretend, harm):
    pretend()
    library = build(MACROS)
    whole = library.read_bytes()
    library.write_bytes(harm(whole))
    assert build(MACROS).read_bytes() == whole


def test_the_bytes_are_on_the_disk_before_the_name(pretend, monkeypatch):
    pretend()
    done, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: done.append("bytes") or sync(file))
    monkeypatch.setattr(os, "replace", lambda *names: done.append("name") or replace(*names))
    build(MACROS)
    assert done == ["bytes", "name"]


def test_a_compiler_that_writes_nothing_and_one_that_writes_nonsense(pretend, cache):  # noqa: F811
    pretend("true")
    with pytest.raises(BackendError, match="could not build the kernel:\nit said nothing, and ret"):
        build(MACROS)
    pretend()
    with pytest.raises(BackendError, match=r"does not load .*; remove .*\.so to build") as caught:
        cpu.load(torch.float32, 1, 1)
    assert "\n" not in str(caught.value)


# Compilers


@pytest.mark.parametrize("warm", [False, True], ids=["no kernel", "a kernel is there"])
@pytest.mark.parametrize("when", ["version", "building"])
def test_a_compiler_that_hangs_is_ended_with_all_that_it_started(
    pretend, tmp_path, monkeypatch, when, warm
):
    if warm:
        pretend()
        build(MACROS)
    late = tmp_path / "late"
    # the child holds the output open, as the compiler proper does behind g++
    pretend(**{when: f"(sleep 3; touch {shlex.quote(str(late))}; sleep 60) & wait"})
    monkeypatch.setattr(building, "ANSWER", 0.3)
    monkeypatch.setattr(building, "BUILD", 0.3)
    start = time.monotonic()
    if warm and when == "building":
        build(MACROS)  # it is there, so nothing is built
        return
    with pytest.raises(BackendError, match=r"pretended did not answer within 0\.3 s$"):
        build(MACROS)
    assert time.monotonic() - start < 3  # not the minute of the child
    if not warm:
        time.sleep(max(0, 4 - (time.monotonic() - start)))
        assert not late.exists()


def test_what_a_compiler_says_need_not_be_text(pretend):
    pretend("printf 'kaputt: \\377\\n' >&2; exit 1", version="printf 'g\\374nstig 1.0'")
    with pytest.raises(BackendError, match="could not build the kernel:\nkaputt: \ufffd"):
        build(MACROS)
    assert machine()[0] == "g\ufffdnstig 1.0"


def test_a_compiler_that_cannot_start_is_named(pretend):
    pretend().write_bytes(b"\x7fELF no program")
    with pytest.raises(BackendError, match=r"pretended does not start: .*Exec format error"):
        build(MACROS)


def test_cxx_may_hold_a_launcher_and_arguments(pretend, tmp_path, monkeypatch):
    real = compiler()
    launcher = tmp_path / "launcher"
    launcher.write_text('#!/bin/sh\necho "$@" >> "$0.log"\nexec "$@"')
    launcher.chmod(0o700)
    monkeypatch.setenv("CXX", shlex.join([str(launcher), *real, "-DMINE=1"]))
    compiler.cache_clear()
    assert compiler() == (str(launcher), *real, "-DMINE=1")
    monkeypatch.setattr(building, "FLAGS", ("-std=c++17", "-O0", "-pthread"))
    tensors = [torch.tensor(x) for x in ([[[[3.0]]]], [[[[[[0.5, 0.5]]]]]], [[[[[2.0]]]]])]
    assert cpu.forward(tensors[0], [(1, 1)], *tensors[1:]).item() == 6
    asked = Path(f"{launcher}.log").read_text()
    assert "-DMINE=1 --version" in asked and "-DMINE=1 -std=c++17" in asked


def test_cxx_may_be_a_path_with_spaces_or_blank(pretend, monkeypatch):
    script = pretend(name="my compiler")
    assert compiler() == (str(script),)
    monkeypatch.setenv("CXX", str(script))  # not quoted, as Windows and IDEs set it
    compiler.cache_clear()
    assert compiler() == (str(script),)
    monkeypatch.setenv("CXX", " ")
    compiler.cache_clear()
    assert Path(compiler()[0]).name in ("c++", "g++", "clang++")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("no-such-launcher g++", "no C.. compiler: no-such-launcher g.. not on the path"),
        ('"g++', "CXX is no command: '\"g..': No closing quotation"),
    ],
    ids=["not there", "an open quote"],
)
def test_cxx_that_is_no_command_is_named(cache, monkeypatch, asked, message):  # noqa: F811
    monkeypatch.setenv("CXX", asked)
    with pytest.raises(BackendError, match=message):
        compiler()


# What processes that were killed left behind


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of fork beside threads
def test_a_build_that_was_killed_is_cleared_away(pretend, cache):  # noqa: F811
    pretend("sleep 5")
    process = multiprocessing.get_context("fork").Process(target=build, args=(MACROS,))
    process.start()
    end = time.monotonic() + 60
    while not (cache.is_dir() and list(cache.iterdir())) and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (left,) = cache.iterdir()
    pretend()
    cache_folder.cache_clear()
    library = build(MACROS)
    assert sorted(cache.iterdir()) == sorted([left, library])  # it might still be at work
    os.utime(left, (OLD, OLD))
    cache_folder.cache_clear()
    assert build(MACROS) == library and list(cache.iterdir()) == [library]


def test_only_old_folders_of_the_kernels_are_cleared_away(tmp_path, no_home, monkeypatch):  # noqa: F811
    places = tmp_path / "tmp"
    places.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(places))
    target = tmp_path / "target"
    target.mkdir()
    for name in (f"{TEMPORARY}old", f"{TEMPORARY}new", f"{BUILDING}old", "deformable_detr-main"):
        (places / name).mkdir()
        if "new" not in name:
            os.utime(places / name, (OLD, OLD))
    (places / f"{TEMPORARY}link").symlink_to(target)
    os.utime(places / f"{TEMPORARY}link", (OLD, OLD), follow_symlinks=False)
    made = temporary_folder()
    expected = {f"{TEMPORARY}new", f"{BUILDING}old", "deformable_detr-main", f"{TEMPORARY}link"}
    assert {place.name for place in places.iterdir()} == expected | {made.name}
    assert made.parent == places and target.is_dir()
