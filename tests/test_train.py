"""Training: recipes, exact resumption, Ctrl-C, and what stops it."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deformable_detr import DeformableDETR, DeformableDETRConfig
from deformable_detr import train as training
from deformable_detr.checkpoint import load_model
from deformable_detr.datasets import CocoDataset, find_split
from deformable_detr.train import TrainConfig, lr_factor, parameter_groups, train
from deformable_detr.transforms import digits_train_transform
from tests.conftest import TINY, save_annotations

RECIPE = TrainConfig(epochs=4, batch_size=2, lr=1e-3, backbone_lr=1e-3, evaluate_every=2)


def make(coco, seed=0):
    torch.manual_seed(seed)
    train_set = CocoDataset(*find_split(coco, "train"), digits_train_transform())
    return DeformableDETR(TINY), train_set, CocoDataset(*find_split(coco, "val"))


def run(coco, output, recipe=RECIPE, **options):
    model, train_set, val_set = make(coco)
    metrics = train(model, train_set, val_set, output, recipe, progress=False, **options)
    return model, metrics


def stop_at(step):
    """Ctrl-C in the middle of a step."""

    def on_step(now, losses):
        if now == step:
            os.kill(os.getpid(), signal.SIGINT)

    return on_step


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_in_mid_epoch_is_as_if_it_had_never_stopped(coco, tmp_path, workers):
    recipe = dataclasses.replace(RECIPE, num_workers=workers)
    whole, _ = run(coco, tmp_path / "whole")
    with pytest.raises(training.Interrupted, match=r"stopped at step 5 of 12; .*checkpoint.pt"):
        run(coco, tmp_path / "parts", recipe, on_step=stop_at(5))
    parts, metrics = run(coco, tmp_path / "parts", recipe)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, parts.state_dict()[name]), name
    logs = [(tmp_path / folder / "log.jsonl").read_text() for folder in ("whole", "parts")]
    assert logs[0] == logs[1]
    assert metrics.images == 4


def test_a_log_line_cut_short_by_a_crash_does_not_stop_a_resumption(coco, tmp_path):
    with pytest.raises(training.Interrupted):
        run(coco, tmp_path / "run", on_step=stop_at(5))
    with open(tmp_path / "run" / "log.jsonl", "a") as log:
        log.write('{"step": 6, "lo')
    run(coco, tmp_path / "run")
    log = [json.loads(x) for x in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [x["step"] for x in log if "loss" in x] == list(range(1, 13))


SLOW = """
import multiprocessing, os, signal, threading, time
from pathlib import Path
from deformable_detr import DeformableDETR
from deformable_detr.datasets import CocoDataset, find_split
from deformable_detr.train import Interrupted, TrainConfig, train
from tests.conftest import TINY

class Slow(CocoDataset):
    def __getitem__(self, index):
        time.sleep(1)
        return super().__getitem__(index)

def on_step(step, losses):
    if step == 2:  # strikes while the loop waits for the next batch, two seconds away
        threading.Timer(0.5, os.killpg, (0, signal.SIGINT)).start()

if __name__ == "__main__":
    multiprocessing.set_start_method("forkserver")  # the default on Linux from Python 3.14
    os.setpgrp()
    config = TrainConfig(epochs=9, batch_size=2, num_workers=1)
    data = Slow(*find_split("coco", "train"))
    try:
        train(DeformableDETR(TINY), data, None, "run", config, on_step=on_step, progress=False)
    except Interrupted as stop:
        print(stop)
"""


def test_ctrl_c_while_waiting_for_workers(coco, tmp_path):
    """A terminal's Ctrl-C reaches the loader's processes too; they must still deliver."""
    printed = run_script(tmp_path, SLOW)
    assert "stopped at step" in printed and (tmp_path / "run" / "checkpoint.pt").exists()


TWO = """
import os, signal
from deformable_detr import DeformableDETR
from deformable_detr.datasets import CocoDataset, find_split
from deformable_detr.train import Interrupted, TrainConfig, train
from tests.conftest import TINY

def on_step(step, losses):
    if step == 4 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGINT)

config = TrainConfig(epochs=9, batch_size=1)
data = CocoDataset(*find_split("coco", "train"))
try:
    train(DeformableDETR(TINY), data, None, "run", config, on_step=on_step, progress=False)
except Interrupted as stop:
    print(f"process {os.environ['RANK']}: {stop}", flush=True)
"""


def test_ctrl_c_in_one_of_two_processes_stops_both_at_the_same_step(coco, tmp_path):
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    printed = run_script(tmp_path, TWO, before=launch)
    for process in (0, 1):
        assert f"process {process}: stopped at step 4 of 27" in printed
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 4 and state["identity"]["processes"] == 2
    assert len(state["random_states"]) == 2


def run_script(folder, text, before=()):
    """What a program prints, run in a folder with an interpreter of its own."""
    (folder / "script.py").write_text(text)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    command = [sys.executable, *before, "script.py"]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_dropout_and_augmentation_do_something(coco, tmp_path):
    """Else the test above would show little."""
    first, _ = run(coco, tmp_path / "a")
    other, _ = run(coco, tmp_path / "b", dataclasses.replace(RECIPE, seed=1))
    assert not torch.equal(first.level_embed, other.level_embed)


def test_what_a_run_leaves_behind(coco, tmp_path):
    model, _ = run(coco, tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"checkpoint.pt", "log.jsonl", "best.safetensors", "last.safetensors"} <= names
    assert any(name.startswith("events.") for name in names)
    last, categories = load_model(tmp_path / "run" / "last.safetensors")
    assert torch.equal(last.level_embed, model.level_embed)
    assert [c["name"] for c in categories] == ["red", "green", "blue"]
    log = [json.loads(x) for x in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [x["step"] for x in log if "loss" in x] == list(range(1, 13))
    assert [x["step"] for x in log if "val" in x] == [6, 12]


def test_it_learns(coco, tmp_path):
    recipe = dataclasses.replace(RECIPE, epochs=20, clip_norm=1.0, schedule="cosine")
    losses = []
    run(coco, tmp_path / "run", recipe, on_step=lambda step, x: losses.append(x["loss"]))
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])


def test_another_run_is_not_continued(coco, tmp_path):
    run(coco, tmp_path / "run", dataclasses.replace(RECIPE, epochs=1))
    with pytest.raises(ValueError, match=r"another run: recipe epochs was 1, is 4$"):
        run(coco, tmp_path / "run")
    run(coco, tmp_path / "run", resume=False)


def test_a_broken_checkpoint_is_said_so(coco, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"checkpoint.pt is no checkpoint of ours"):
        run(coco, tmp_path / "run")


def test_a_data_set_without_any_box_trains(coco, tmp_path):
    content = json.loads((coco / "annotations" / "train.json").read_text())
    save_annotations(coco, content | {"annotations": []})
    _, metrics = run(coco, tmp_path / "run", dataclasses.replace(RECIPE, epochs=1))
    assert metrics is not None


def test_a_loss_that_is_not_finite_stops_and_names_the_images(coco, tmp_path):
    model, train_set, val_set = make(coco)
    with torch.no_grad():
        model.class_heads[1].weight.fill_(torch.nan)
    with pytest.raises(
        training.NonFiniteLossError, match=r"not finite at step 1, images \[10\d, 10\d\]"
    ):
        train(model, train_set, val_set, tmp_path / "run", RECIPE, progress=False)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"batch_size": 7}, "6 training images are less than a batch of 7"),
        ({"schedule": "poly"}, "schedule must be"),
        ({"epochs": 0}, "at least 1"),
    ],
)
def test_recipes_are_refused(coco, tmp_path, recipe, message):
    with pytest.raises(ValueError, match=message):
        run(coco, tmp_path / "run", dataclasses.replace(RECIPE, **recipe))


def test_classes_must_be_those_of_the_data(coco, tmp_path):
    _, train_set, val_set = make(coco)
    model = DeformableDETR(dataclasses.replace(TINY, num_classes=4))
    with pytest.raises(ValueError, match="4 classes, the data has 3"):
        train(model, train_set, val_set, tmp_path / "run", RECIPE, progress=False)


def test_the_papers_parameter_groups():
    with torch.device("meta"):
        model = DeformableDETR(DeformableDETRConfig())
    rest, backbone, sampling = parameter_groups(model, training.PAPER)
    count = [sum(p.numel() for p in group["params"]) for group in (rest, backbone, sampling)]
    assert count == [39_847_265 - 23_232_512 - 790_018, 23_232_512, 790_018]
    assert [g["lr"] for g in (rest, backbone, sampling)] == pytest.approx([2e-4, 2e-5, 2e-5])


def test_schedules():
    paper = training.PAPER
    factors = [lr_factor(step, 500, 10, paper) for step in (0, 399, 400, 499)]
    assert factors == [1, 1, 0.1, 0.1]
    cosine = dataclasses.replace(paper, schedule="cosine", warmup_steps=4)
    assert lr_factor(0, 1000, 10, cosine) == pytest.approx(0.25)
    assert lr_factor(500, 1000, 10, cosine) == pytest.approx(0.505)
    assert lr_factor(1000, 1000, 10, cosine) == pytest.approx(0.01)
