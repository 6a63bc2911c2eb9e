"""A run's folder and its day: who has it, what ends it, what it says, how it is continued."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from deformable_detr import interrupts
from deformable_detr.evaluation.coco import score
from deformable_detr.files import write_atomically
from deformable_detr.inference.detector import load_detector, read_card
from deformable_detr.inference.predict import predict
from deformable_detr.interrupts import CatchInterrupt, Interrupted
from deformable_detr.training import remarks, setup
from deformable_detr.training.board import Board
from deformable_detr.training.config import TrainConfig
from deformable_detr.training.curves import draw_ap, draw_curves, read_log
from deformable_detr.training.doctor import doctor
from deformable_detr.training.lock import locked
from deformable_detr.training.loop import train
from deformable_detr.training.pace import Pace, Plan
from deformable_detr.training.processes import as_launched, make_accelerator
from deformable_detr.training.setup import Training
from tests.test_train import RECIPE, assert_same_weights, make, run, stop_at

CONSTANT = dataclasses.replace(RECIPE, epochs=2)  # the rates do not depend on the epochs


def log_of(folder):
    return (folder / "log.jsonl").read_text()


# One training in a folder


HOLDER = """
import os, sys, time
from pathlib import Path
from deformable_detr.training.lock import locked

with locked(Path(sys.argv[1]) / ".lock"):
    if os.fork() == 0:  # as a worker that lives on when its process is killed
        print("held", flush=True)
    time.sleep(600)
"""


def test_one_training_in_a_folder_until_its_process_ends(coco, tmp_path):
    """Also --fresh must not take the files from under a running one. SIGKILL frees the folder,
    although the dead process' worker still lives."""
    folder = tmp_path / "run"
    run(coco, folder, CONSTANT)
    before = {path: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}
    command = [sys.executable, "-c", HOLDER, str(folder)]
    holder = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True, cwd=Path.cwd()
    )
    try:
        assert holder.stdout.readline() == "held\n"
        for resume in (True, False):
            with pytest.raises(ValueError, match=rf"run is in use .*process {holder.pid} on "):
                run(coco, folder, CONSTANT, resume=resume)
        after = {path: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}
        assert after == before
        holder.kill()
        holder.wait()
        run(coco, folder, CONSTANT, resume=False)
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.stdout.close()


def test_one_process_cannot_have_a_folder_twice(tmp_path):
    again = pytest.raises(ValueError, match="another training of this process")
    with locked(tmp_path / ".lock"), again, locked(tmp_path / ".lock"):
        pass
    with locked(tmp_path / ".lock"):
        pass


def test_what_killed_processes_left_is_removed_at_the_next_start(coco, tmp_path):
    """And nothing else, such as a user's hidden files."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("checkpoint.pt", "best.safetensors"):
        with pytest.raises(SystemExit):  # the name that such a file has
            write_atomically(folder / name, keep_as(folder / f"{name}.kept"))
        kept = folder / f"{name}.kept"
        kept.rename(folder / kept.read_text())
    (folder / ".notes").touch()
    assert len(list(folder.iterdir())) == 3
    run(coco, folder, CONSTANT)
    assert {path.name for path in folder.glob(".*")} == {".lock", ".notes"}


def keep_as(kept):
    def write(temporary):
        kept.write_text(Path(temporary).name)
        raise SystemExit

    return write


# What ends it


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_that_end_a_program_save_first(coco, tmp_path, name):
    """Ctrl-C, a scheduler that wants the machine back, a connection that is lost."""
    number = getattr(signal, name)

    def on_step(step, losses):
        if step == 4:
            os.kill(os.getpid(), number)

    recipe = dataclasses.replace(CONSTANT, evaluate_every=1)
    with pytest.raises(Interrupted, match="stopped at step 4 of 6") as stop:
        run(coco, tmp_path / "run", recipe, on_step=on_step)
    assert stop.value.number == number and signal.getsignal(number) != interrupts.CatchInterrupt
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 4
    for name in ("best", "last"):  # they were chosen and written at the first epoch's end
        path = tmp_path / "run" / f"{name}.safetensors"
        assert load_detector(path).threshold == read_card(path)["threshold"]


def test_a_signal_passed_on_twice_is_one_and_a_later_one_ends_at_once(monkeypatch, capfd):
    """A terminal sends Ctrl-C to all processes, and a launcher passes it on once more."""
    with CatchInterrupt() as interrupt:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
        assert interrupt.happened == signal.SIGINT
        assert capfd.readouterr().err.count("ends when this step is saved") == 1
        monkeypatch.setattr(interrupts, "ECHO", 0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_that_is_ignored_stays_so():
    """nohup has SIGHUP ignored, so that a training outlives its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with CatchInterrupt() as interrupt:
            signal.raise_signal(signal.SIGHUP)
            assert not interrupt.happened
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_worker_that_is_killed_while_a_checkpoint_is_written_is_said_so(tmp_path):
    """torch raises this wherever the main process just is."""
    text = "DataLoader worker (pid 7) is killed by signal: Killed. "

    def write(temporary):
        raise RuntimeError(text)

    with pytest.raises(RuntimeError, match=re.escape(text)):
        write_atomically(tmp_path / "checkpoint.pt", write)


# The log


def test_a_record_is_never_doubled(coco, tmp_path, monkeypatch):
    """Killed when an evaluation is in the log, and its epoch not yet in the checkpoint."""
    run(coco, tmp_path / "whole")
    save_weights = Training.save_weights

    def fail(training, name):
        if name == "best":
            raise MemoryError
        save_weights(training, name)

    monkeypatch.setattr(Training, "save_weights", fail)
    with pytest.raises(MemoryError):
        run(coco, tmp_path / "parts")
    assert [step["step"] for step in read_log(tmp_path / "parts" / "log.jsonl")[1]] == [6]
    monkeypatch.undo()
    run(coco, tmp_path / "parts")
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")


def test_tensorboard_reads_a_run_that_was_resumed(tmp_path, caplog):
    for first, steps, loss in ((1, range(1, 8), 1.0), (5, range(5, 10), 2.0)):
        board = Board(tmp_path, first)
        for step in steps:
            board.add(step, {"train/loss": loss, "train/lr": float("nan")})
        board.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    seen = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert seen == [(step, 1.0 if step < 5 else 2.0) for step in range(1, 10)]


@pytest.mark.parametrize("file", ["log.jsonl", "events"])
def test_a_full_disk_names_the_file(coco, tmp_path, monkeypatch, file):
    training = Training(*make(coco)[:2], None, tmp_path / "run", CONSTANT, progress=False)

    def full(_):
        raise OSError(28, "No space left on device")

    with training.run.logging(0, 0):
        if file == "events":
            training.run.board.records = SimpleNamespace(write=full)
        else:
            training.run.log_file = Path("/dev/full")
        with pytest.raises(OSError, match=r"cannot write .*: No space left on device") as error:
            training.run.log(1, {"loss": 1.0})
    assert str(training.run.board.path if file == "events" else "/dev/full") in str(error.value)


# What it says


def said(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line]


def watched(coco, output, recipe, on_step=None):
    return train(*make(coco), output, recipe, on_step=on_step)


def scripted(monkeypatch, aps):
    aps = iter(aps)
    monkeypatch.setattr(setup, "score", lambda *a: dataclasses.replace(score(*a), ap=next(aps)))


def test_every_evaluation_is_told_and_the_best_epoch_named(coco, tmp_path, monkeypatch, capsys):
    scripted(monkeypatch, [0.1, 0.3, 0.2])
    folder = tmp_path / "run"
    watched(coco, folder, dataclasses.replace(RECIPE, epochs=3, evaluate_every=1, ema_decay=0.9))
    lines = said(capsys)
    assert [line.partition(", AP50")[0] + line.partition(";")[2] for line in lines[-5:-2]] == [
        "epoch 1 of 3: AP 0.100 the best so far",
        "epoch 2 of 3: AP 0.300 the best so far",
        "epoch 3 of 3: AP 0.200 the best is 0.300, of epoch 2",
    ]
    last = f"{folder}/last.safetensors: averaged weights of epoch 3, AP 0.200, threshold "
    assert lines[-2].startswith(last)
    assert lines[-1] == f"{folder}/best.safetensors: averaged weights of epoch 2, AP 0.300"
    watched(coco, folder, dataclasses.replace(RECIPE, epochs=3, evaluate_every=1, ema_decay=0.9))
    assert "all 3 epochs done: --epochs N continues to a larger number" in said(capsys)


def test_nobody_who_does_not_want_to_hear_is_told(coco, tmp_path, capsys):
    run(coco, tmp_path / "run", dataclasses.replace(RECIPE, warmup_steps=99))
    assert capsys.readouterr().out == "" and not (tmp_path / "run" / "curves.png").exists()


def test_a_training_that_learns_nothing_says_so_once(coco, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(remarks, "SOON", 6)
    scripted(monkeypatch, [0.0, 0.01, 0.01, 0.01])
    watched(coco, tmp_path / "run", dataclasses.replace(RECIPE, evaluate_every=1))
    (hint,) = (line for line in said(capsys) if "nothing is learned" in line)
    assert "AP 0.010 after 6 steps" in hint
    scripted(monkeypatch, [0.2, 0.01])
    watched(coco, tmp_path / "other", dataclasses.replace(RECIPE, epochs=2, evaluate_every=1))
    assert not any("nothing is learned" in line for line in said(capsys))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"warmup_steps": 4}, "the warm-up has 4 steps .* an epoch only 3: it takes 1.3 ep"),
        ({"warmup_steps": 7}, "the warm-up has 7 steps .* the training only 6: it never"),
        ({"warmup_steps": 3}, None),
        ({"drop_epoch": 2}, r"the rates never drop: that is due after epoch 2 .* are 2$"),
        ({"drop_epoch": 1}, None),
    ],
)
def test_what_a_recipe_will_not_do_is_said_at_the_start(coco, tmp_path, changes, expected):
    recipe = dataclasses.replace(CONSTANT, **{"drop_epoch": 1} | changes)
    training = Training(*make(coco), tmp_path, recipe)
    found = list(remarks.at_the_start(training))
    assert len(found) == (expected is not None)
    assert not found or re.search(expected, found[0])


def test_more_objects_than_queries_are_said_at_the_start(coco, tmp_path):
    model, train_set, val_set = make(coco)
    val_set.coco.dataset["annotations"] *= model.config.num_queries + 1
    recipe = dataclasses.replace(CONSTANT, drop_epoch=1)
    training = Training(model, train_set, val_set, tmp_path, recipe)
    (text,) = remarks.at_the_start(training)
    assert text.startswith("val: ") and "more than the 6 queries of the model" in text


def test_a_figure_is_the_same_on_the_terminal_and_in_the_picture(
    coco, tmp_path, monkeypatch, capsys
):
    """0.00951 is 0.010; 0.0095, as which it was written down, was drawn as 0.009."""
    scripted(monkeypatch, [0.00951] * 2)
    watched(coco, tmp_path / "run", dataclasses.replace(CONSTANT, epochs=1, evaluate_every=1))
    assert "AP 0.010" in "".join(said(capsys))
    (record,) = read_log(tmp_path / "run" / "log.jsonl")[1]
    axes = Figure().subplots()
    draw_ap(axes, [record], 3)
    assert "best AP 0.010, epoch 1" in axes.get_legend_handles_labels()[1]


# Continuing for more epochs


def test_more_epochs_continue_as_if_they_had_been_asked_for_at_once(coco, tmp_path):
    whole, _ = run(coco, tmp_path / "whole")
    run(coco, tmp_path / "parts", CONSTANT)
    parts, metrics = run(coco, tmp_path / "parts")
    assert_same_weights(whole, parts)
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts") and metrics.images == 4
    state = torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)
    assert state["identity"]["recipe epochs"] == 4 and state["best_epoch"] in (2, 4)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"drop_epoch": 1}, "the rates dropped to a tenth for good after epoch 1"),
        ({"drop_epoch": 3}, "the rates will drop to a tenth after epoch 3"),
        ({"schedule": "cosine"}, "rates rise from 1% of the recipe's to 50%, and fall to 1% at"),
    ],
)
def test_what_becomes_of_the_schedule_is_said(coco, tmp_path, capsys, changes, expected):
    recipe = dataclasses.replace(CONSTANT, warmup_steps=4, **changes)
    run(coco, tmp_path / "run", recipe)
    rates = []
    watched(
        coco,
        tmp_path / "run",
        dataclasses.replace(recipe, epochs=4),
        on_step=lambda step, losses: rates.append(step),
    )
    lines = said(capsys)
    assert not any("warm-up" in line for line in lines)  # which was said at the beginning
    assert rates == list(range(7, 13)) and lines[0] == "continued from step 6 of 12"
    assert lines[1].startswith("continued to 4 epochs, after 2: ") and expected in lines[1]


# The picture and the time left


def test_a_run_is_drawn(coco, tmp_path):
    with pytest.raises(Interrupted):
        watched(coco, tmp_path / "run", RECIPE, on_step=stop_at(5))
    with Image.open(tmp_path / "run" / "curves.png") as picture:
        losses_only = picture.size
    watched(coco, tmp_path / "run", RECIPE)
    with Image.open(tmp_path / "run" / "curves.png") as picture:
        assert picture.size[1] > 1.5 * losses_only[1]  # AP has come below


def test_a_log_of_any_kind_can_be_drawn(tmp_path):
    log, picture = tmp_path / "log.jsonl", tmp_path / "curves.png"
    draw_curves(log, 3, picture)
    assert not picture.exists()  # nothing to draw yet
    records = [
        {"step": 1, "loss": None, "gradient_norm": None},
        {"step": 2, "loss": 3.0, "loss_box": 1.0},
        {"step": 2, "val": {"ap": None, "ap50": 0.5}},
    ]
    log.write_text("\n".join(map(json.dumps, records)) + '\n{"step": 3, "lo')
    draw_curves(log, 3, picture)
    assert picture.read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("every", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("epochs", [1, 4, 6])
def test_evaluations_that_are_left_are_those_that_will_come(every, epochs):
    config = TrainConfig(epochs=epochs, evaluate_every=every)
    plan = Plan(config, steps_per_epoch=3, val_images=8)
    for step in range(plan.steps):
        due = [e for e in range(step // 3 + 1, epochs + 1) if e % every == 0 or e == epochs]
        assert plan.evaluations(step) == len(due), step
    assert plan.evaluations(plan.steps) == 0 == Plan(config, 3).evaluations()


def test_the_time_left_has_the_evaluations_in_it(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    pace = Pace(Plan(TrainConfig(epochs=4, batch_size=2), steps_per_epoch=10, val_images=30))
    pace.start()
    for seconds in (60, 2, 2, 2):  # the first step is slow
        now[0] += seconds
        pace.stepped()
    assert pace.seconds_left(4) == pytest.approx(36 * 2 + 4 * 30 * 2 / 2 / 3)  # a third: forward
    with pace.evaluating():
        now[0] += 100
    now[0] += 2
    pace.stepped()
    assert pace.seconds_left(5) == pytest.approx(35 * 2 + 4 * 100)


# accelerate launch


def test_what_accelerate_launch_is_told_is_obeyed(coco, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    train(*make(coco)[:2], None, tmp_path, dataclasses.replace(CONSTANT, epochs=1), progress=False)
    identity = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["identity"]
    assert (identity["recipe mixed_precision"], identity["recipe accumulate"]) == ("bf16", 2)
    assert [record["step"] for record in read_log(tmp_path / "log.jsonl")[0]] == [1]
    assert as_launched(TrainConfig(mixed_precision="bf16")).mixed_precision == "bf16"


def test_what_accelerate_launch_was_not_told_changes_nothing(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # as it passes on by default
    config = TrainConfig(mixed_precision="fp16", accumulate=3)
    assert as_launched(config) == config


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("MIXED_PRECISION", "fp8", "asks for mixed_precision fp8; there are"),
        ("MIXED_PRECISION", "bf16", "asks for mixed_precision bf16, the recipe for fp16"),
        ("GRADIENT_ACCUMULATION_STEPS", "4", "asks for accumulate 4, the recipe for 2"),
        ("USE_DEEPSPEED", "true", "asks for DeepSpeed, which this training cannot do"),
        ("USE_FSDP", "true", "asks for FSDP, which this training cannot do"),
    ],
)
def test_what_accelerate_launch_cannot_have_is_refused(monkeypatch, variable, value, message):
    monkeypatch.setenv(f"ACCELERATE_{variable}", value)
    with pytest.raises(ValueError, match=f"accelerate launch {message}"):
        make_accelerator()
        as_launched(TrainConfig(mixed_precision="fp16", accumulate=2))


# Another default


def test_with_a_default_of_float64_everything_runs_in_it(coco, tmp_path):
    """Images are read in float32 whatever the default; the model takes them in its own."""
    torch.set_default_dtype(torch.float64)
    try:
        recipe = dataclasses.replace(CONSTANT, ema_decay=0.9, evaluate_every=1)
        _, metrics = run(coco, tmp_path, recipe)
        detector = load_detector(tmp_path / "last.safetensors")
        assert detector.model.neck.level_embed.dtype == torch.float64 and metrics.images == 4
        found = predict(detector, coco / "val", threshold=0.0)
        assert [len(each) for each in found] == [18] * 4
        diagnosis = doctor(*make(coco)[:2], steps=2, progress=False, seconds=1e9)
        assert diagnosis.healthy and len(diagnosis.losses) == 2
    finally:
        torch.set_default_dtype(torch.float32)
