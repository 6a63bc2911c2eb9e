"""How a command ends: Ctrl-C at any time, memory or disk that run out, a second one beside it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from deformable_detr import interrupts
from deformable_detr.cli import main
from deformable_detr.cli.errors import one_line
from deformable_detr.data import tiles, voc
from deformable_detr.data.voc import convert_voc
from deformable_detr.files import write_json
from tests.test_voc import write_voc

ROOT = Path(__file__).parents[1]
TRAIN = ["--recipe", "digits", "--epochs", "2", "--batch-size", "2"]


def program(arguments, before="", **options):
    """`deformable-detr` as a program of its own, after some lines of Python."""
    code = f"{before}\nimport sys\nsys.argv = {['deformable-detr', *map(str, arguments)]!r}\n"
    code += "from deformable_detr.cli import main\nsys.exit(main())"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, **options
    )


STRIKE = """
import os, signal, sys
class Strike:
    def find_spec(self, wanted, *_):
        if wanted == {module!r}:
            {how}
sys.meta_path.insert(0, Strike())
"""
AT_ONCE = "os.kill(os.getpid(), signal.SIGINT)"
IN_A_DESTRUCTOR = "type('D', (), {'__del__': lambda self: os.kill(os.getpid(), signal.SIGINT)})()"
SWALLOWED = """
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except BaseException as error:
                raise ImportError("numpy is broken") from error"""


@pytest.mark.parametrize(
    ("module", "how"),
    [
        ("deformable_detr.cli.commands", AT_ONCE),
        ("deformable_detr.cli.arguments", AT_ONCE),
        ("torch", IN_A_DESTRUCTOR),
        ("torch", SWALLOWED),
    ],
)
def test_ctrl_c_in_the_first_seconds_is_one_word(tmp_path, module, how):
    """Also where what is being imported would take it for another error, or nobody could catch
    it."""
    before = STRIKE.format(module=module, how=how)
    ended = program(["check", tmp_path / "nothing"], before)
    assert (ended.returncode, ended.stderr) == (130, "interrupted\n")


def test_no_temporary_file_stays_after_ctrl_c(tmp_path):
    before = """
import os, signal
from deformable_detr.files import write_atomically
from deformable_detr.cli import commands
def build_parser():
    write_atomically("report.json", lambda path: os.kill(os.getpid(), signal.SIGINT))
commands.build_parser = build_parser
"""
    ended = program([], before, cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (130, "interrupted\n")
    assert not list(tmp_path.iterdir())


def test_ctrl_c_while_predicting_still_writes(tmp_path):
    """What is found until then is worth keeping."""
    before = """
import os, signal
from deformable_detr.cli import predict
describe = predict.describe
def struck(found, *given):
    os.kill(os.getpid(), signal.SIGINT)
    return describe(found, *given)
predict.describe = struck
"""
    image = ROOT / "data" / "samples" / "000001.png"
    ended = program(["predict", image, "--json", tmp_path / "found.json"], before)
    assert (ended.returncode, ended.stderr.splitlines()[-1]) == (130, "interrupted")
    assert (tmp_path / "found.json").read_text().startswith("[")


@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("command", ["tile", "convert"])
def test_ctrl_c_leaves_no_half_of_a_data_set(tmp_path, monkeypatch, capsys, command, made):
    """So that the same command can be given again; struck at the second split."""
    data, new = str(tmp_path / "data"), tmp_path / "new"
    names = {"train": [["dog"]], "val": [["dog"]]}
    write_voc(tmp_path / "data", "beside", names)
    if command == "tile":
        convert_voc(data, tmp_path / "coco")
        data = tmp_path / "coco"
    if made:
        new.mkdir()
    written = []

    def write_and_strike(*given):
        write_json(*given)
        written.append(given)
        if len(written) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr({"tile": tiles, "convert": voc}[command], "write_json", write_and_strike)
    monkeypatch.setattr(interrupts, "_end", lambda *_: pytest.fail("ended at once"))
    arguments = {
        "tile": ["tile", str(data), "--output", str(new), "--side", "40"],
        "convert": ["convert", data, str(new)],
    }[command]
    before = signal.getsignal(signal.SIGINT)
    try:
        interrupts.end_at_once()  # as a program of its own does
        assert main(arguments) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err.endswith("interrupted\n")
    assert not list(new.iterdir()) if made else not new.exists()
    assert main(arguments) == 0


def test_a_full_disk_is_one_line_that_names_the_file(coco, tmp_path):
    """While the log is written, beside which nothing else may print."""
    before = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))
"""
    ended = program(["train", coco, "--output", tmp_path / "run", *TRAIN], before)
    *_, last = ended.stderr.splitlines()
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert last.startswith(f"error: cannot write {tmp_path / 'run'}/"), last
    assert last.endswith(": File too large")


def test_sigterm_ends_with_its_code(coco, tmp_path, capsys, monkeypatch):
    from deformable_detr.training import loop

    train_step = loop.train_step

    def struck(training, batches):
        os.kill(os.getpid(), signal.SIGTERM)
        return train_step(training, batches)

    monkeypatch.setattr(loop, "train_step", struck)
    run = tmp_path / "run"
    assert main(["train", str(coco), "--output", str(run), *TRAIN]) == 128 + signal.SIGTERM
    assert "stopped at step 1 of 6; the same command continues" in capsys.readouterr().err
    assert (run / "checkpoint.pt").exists()


def test_a_broken_tiff_says_nothing_beside_the_error(coco):
    from PIL import Image, features

    if not features.check("libtiff"):
        pytest.skip("this Pillow has no libtiff")
    Image.effect_noise((64, 48), 99).save(coco / "train" / "a.tif", compression="tiff_lzw")
    whole = (coco / "train" / "a.tif").read_bytes()
    (coco / "train" / "a.tif").write_bytes(whole[:400] + b"\xff" * 400 + whole[800:])
    ended = program(["predict", coco / "train" / "a.tif"], cwd=coco)
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("passed over: cannot read image")


WORKER = """Caught ValueError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "worker.py", line 351, in _worker_loop
    data = fetcher.fetch(index)
ValueError: cannot read image 7.png: broken: header
"""
KILLED = "DataLoader worker (pid 7) is killed by signal: Killed. "
BUS = "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that"
CPU = "[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory: 9\nmore"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (MemoryError(), "out of memory; fewer images at once (--batch-size) or smaller ones"),
        (RuntimeError(CPU), "out of memory: [enforce fail at alloc_cpu.cpp:114] DefaultCPUAlloc"),
        (RuntimeError("CUDA error: out of memory\nmore"), "out of memory: CUDA error: out of"),
        (ValueError(WORKER), "cannot read image 7.png: broken: header"),
        (RuntimeError(KILLED), "a process that loads images has ended, as where memory runs out"),
        (RuntimeError(BUS), "a process that loads images has ended, as where memory runs out"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (ValueError("two\nlines"), "two"),
        (ValueError(), "ValueError"),
    ],
)
def test_errors_are_a_sentence(error, text):
    line = one_line(error)
    assert line.startswith(text) and "\n" not in line and line.strip(": ") == line


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyError("a bug"), TypeError()])
def test_errors_of_the_program_keep_their_traceback(error):
    assert one_line(error) == ""
