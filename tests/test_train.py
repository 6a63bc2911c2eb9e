"""Training: recipes, exact resumption, Ctrl-C, and what stops it."""

import dataclasses
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from deformable_detr import DeformableDETR, DeformableDETRConfig
from deformable_detr.data.coco import CocoDataset, collate, find_split
from deformable_detr.data.transforms import digits_train_transform
from deformable_detr.evaluation.coco import evaluate, predict_dataset
from deformable_detr.interrupts import Interrupted
from deformable_detr.losses.criterion import SetCriterion
from deformable_detr.models import MODELS, build_model
from deformable_detr.structures import Batch
from deformable_detr.training import setup
from deformable_detr.training.config import TrainConfig
from deformable_detr.training.faults import NonFiniteLossError
from deformable_detr.training.loop import PAPER, make_steps, train
from deformable_detr.training.optimiser import (
    averaged,
    freeze,
    load_state_by_name,
    lr_factor,
    parameter_groups,
    state_by_name,
)
from deformable_detr.training.recipe import load_recipe
from deformable_detr.training.recipes import NAMES
from deformable_detr.training.setup import Training
from deformable_detr.weights.ours import load_model, upgrade_name
from tests.conftest import TINY, TINY_DETR, save_annotations, write_coco
from tests.golden import machine

GOLDEN = Path(__file__).parent / "golden"
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
    with pytest.raises(Interrupted, match=r"stopped at step 5 of 12; .*checkpoint.pt"):
        run(coco, tmp_path / "parts", recipe, on_step=stop_at(5))
    parts, metrics = run(coco, tmp_path / "parts", recipe)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, parts.state_dict()[name]), name
    logs = [(tmp_path / folder / "log.jsonl").read_text() for folder in ("whole", "parts")]
    assert logs[0] == logs[1]
    assert metrics.images == 4


def of_model(coco, name):
    """A model of each kind, with those of TINY's options that it has."""
    kind = MODELS[name][0]
    options = {field.name for field in dataclasses.fields(kind)}
    config = kind(**{key: x for key, x in dataclasses.asdict(TINY).items() if key in options})
    torch.manual_seed(0)
    return build_model(config), *make(coco)[1:]


@pytest.mark.parametrize("name", MODELS)
def test_every_model_trains_resumes_and_is_named_by_its_run(coco, tmp_path, name):
    recipe = dataclasses.replace(RECIPE, epochs=2, ema_decay=0.9)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(*of_model(coco, name), whole, recipe, progress=False)
    with pytest.raises(Interrupted):
        train(*of_model(coco, name), parts, recipe, on_step=stop_at(4), progress=False)
    state = torch.load(parts / "checkpoint.pt", weights_only=True)
    assert state["identity"]["model"] == name
    learning = {n for n, p in of_model(coco, name)[0].named_parameters() if p.requires_grad}
    assert state["optimizer"].keys() == learning  # so each has had a gradient, as DDP demands
    for other in MODELS.keys() - {name}:
        message = rf"another run: model was '{name}', is '{other}'\. Give"
        with pytest.raises(ValueError, match=message):
            train(*of_model(coco, other), parts, recipe, progress=False)
    train(*of_model(coco, name), parts, recipe, progress=False)
    saved = [load_model(folder / "last.safetensors")[0] for folder in (whole, parts)]
    assert_same_weights(*saved)


def test_a_checkpoint_of_an_unknown_model_is_said_so(coco, tmp_path):
    run(coco, tmp_path, dataclasses.replace(RECIPE, epochs=1))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    state["identity"]["model"] = "yolo"
    torch.save(state, tmp_path / "checkpoint.pt")
    message = r"checkpoint of ours \(it is of a model 'yolo', known are deformable_detr, detr"
    with pytest.raises(ValueError, match=message):
        run(coco, tmp_path, dataclasses.replace(RECIPE, epochs=1))


def test_a_log_line_cut_short_by_a_crash_does_not_stop_a_resumption(coco, tmp_path):
    with pytest.raises(Interrupted):
        run(coco, tmp_path / "run", on_step=stop_at(5))
    with open(tmp_path / "run" / "log.jsonl", "a") as log:
        log.write('{"step": 6, "lo')
    run(coco, tmp_path / "run")
    log = [json.loads(x) for x in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [x["step"] for x in log if "loss" in x] == list(range(1, 13))


SLOW = """
import multiprocessing, os, sys, time
from pathlib import Path
from deformable_detr import DeformableDETR
from deformable_detr.data.coco import CocoDataset, find_split
from deformable_detr.training.config import TrainConfig
from deformable_detr.interrupts import Interrupted
from deformable_detr.training.loop import train
from tests.conftest import TINY

class Slow(CocoDataset):
    def __getitem__(self, index):
        time.sleep(0.3)
        return super().__getitem__(index)

def on_step(step, losses):
    if step == 2:  # strikes while the loop waits for the next batch, 0.6 seconds away
        group = os.getpgrp()
        if os.fork() == 0:  # from outside, as a terminal or a scheduler does
            os.setsid()
            time.sleep(0.2)
            os.killpg(group, int(sys.argv[1]))
            os._exit(0)

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[2])
    os.setpgrp()
    config = TrainConfig(epochs=9, batch_size=2, num_workers=1)
    data = Slow(*find_split("coco", "train"))
    try:
        train(DeformableDETR(TINY), data, None, "run", config, on_step=on_step, progress=False)
    except Interrupted as stop:
        print(stop)
"""


@pytest.mark.parametrize(
    ("number", "start"),
    [(signal.SIGINT, "forkserver"), (signal.SIGTERM, "fork")],  # the former from Python 3.14 on
)
def test_a_signal_while_waiting_for_workers(coco, tmp_path, number, start):
    """A terminal's Ctrl-C reaches the loader's processes too, as does the SIGTERM of a scheduler;
    they must still deliver."""
    printed = run_script(tmp_path, SLOW, after=(str(int(number)), start))
    assert "stopped at step" in printed and (tmp_path / "run" / "checkpoint.pt").exists()


KILLED = """
import os, signal
from tests.test_train import CAREFUL, make, train

def on_step(step, losses):
    if step == 5:
        os.kill(os.getpid(), signal.SIGKILL)

train(*make("coco"), "killed", CAREFUL, on_step=on_step, progress=False)
"""
CAREFUL = dataclasses.replace(  # everything that a checkpoint has to hold
    RECIPE, batch_size=1, accumulate=2, ema_decay=0.9, checkpoint_minutes=0, patience=3
)


def test_a_killed_run_goes_on_from_its_checkpoint_as_if_nothing_had_happened(coco, tmp_path):
    """Killed in the middle of an epoch, after step 5 and with step 4 in the checkpoint."""
    run_script(tmp_path, KILLED, code=-signal.SIGKILL)
    state = torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 4
    whole, _ = run(coco, tmp_path / "whole", CAREFUL)
    killed, _ = run(coco, tmp_path / "killed", CAREFUL)
    assert_same_weights(whole, killed)
    for name in ("best.safetensors", "last.safetensors"):
        saved = [load_model(tmp_path / folder / name)[0] for folder in ("whole", "killed")]
        assert_same_weights(*saved)
    logs = [(tmp_path / folder / "log.jsonl").read_text() for folder in ("whole", "killed")]
    assert logs[0] == logs[1]


def assert_same_weights(one, other):
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_a_checkpoint_from_before_the_newer_options_is_continued(coco, tmp_path):
    whole, _ = run(coco, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(coco, tmp_path / "parts", on_step=stop_at(5))
    path = tmp_path / "parts" / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    for name in ("accumulate", "frozen", "ema_decay", "top_k", "mixed_precision"):
        del state["identity"][f"recipe {name}"]
    del state["stale"], state["scaler"], state["epochs_ended"], state["identity"]["model"]
    torch.save(state, path)
    parts, _ = run(coco, tmp_path / "parts")
    assert_same_weights(whole, parts)


def test_a_run_of_version_0_1_is_resumed(tmp_path, monkeypatch):
    """Its checkpoint has the optimiser's state by numbers, and other names and another order of
    parameters. Exact on the processor and the torch that went on with it then; elsewhere sums are
    added in another order, and Adam turns small gradients into steps of full length."""
    before = json.loads((GOLDEN / "run.json").read_text())
    (tmp_path / "checkpoint.pt").write_bytes((GOLDEN / "checkpoint.pt").read_bytes())
    samples = GOLDEN.parents[1] / "data" / "samples"
    data = CocoDataset(samples, samples / "annotations.json", digits_train_transform())
    model = DeformableDETR(DeformableDETRConfig(**before["model"]))
    recipe = TrainConfig(**before["train"] | {"frozen": tuple(before["train"]["frozen"])})

    # the gradient's norm is the one sum over all parameters: here, too, in their order then
    parameters, total_norm = dict(model.named_parameters()), nn.utils.get_total_norm
    order = [upgrade_name(name, model.config) for name in before["state"]]
    order = [parameters[name] for name in order if name in parameters]
    norm = lambda _: total_norm([p.grad for p in order if p.grad is not None])  # noqa: E731
    monkeypatch.setattr(nn.utils, "get_total_norm", norm)

    losses, threads = [], torch.get_num_threads()
    options = {"progress": False, "card": {"transforms": "digits"}}
    options["on_step"] = lambda step, terms: losses.append(terms["loss"])
    torch.set_num_threads(1)
    train(model, data, None, tmp_path, recipe, **options)
    torch.set_num_threads(threads)
    assert losses == pytest.approx(before["losses"], rel=1e-3)
    trained = load_model(tmp_path / "last.safetensors")[0].state_dict()
    wanted = {upgrade_name(name, model.config): x for name, x in before["state"].items()}
    assert trained.keys() == wanted.keys()
    for name, tensor in trained.items():
        expected = pytest.approx(wanted[name]["norm"], rel=1e-3, abs=1e-3)
        assert tensor.double().norm().item() == expected, name
    if machine() == before["machine"]:
        assert losses == before["losses"]
        for name, tensor in trained.items():
            digest = hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
            assert digest == wanted[name]["sha256"], name


def test_an_optimiser_finds_its_state_again_in_another_order():
    """By name, in groups of other rates, and where a parameter has had no gradient yet."""

    class Model(nn.Module):
        def __init__(self, *names):
            super().__init__()
            for name in names:
                setattr(self, name, nn.Linear(2, 2, bias=False))

    def optimizer_of(model):
        return torch.optim.AdamW(parameter_groups(model, PAPER))

    one = Model("backbone", "first", "second", "sampling_offsets", "idle")
    other = Model("idle", "second", "sampling_offsets", "first", "backbone")
    here, there = optimizer_of(one), optimizer_of(other)
    sum(p.square().sum() for name, p in one.named_parameters() if "idle" not in name).backward()
    here.step()
    state = state_by_name(here, one)
    assert state.keys() == {name for name, _ in one.named_parameters()} - {"idle.weight"}
    load_state_by_name(there, other, state)
    again = state_by_name(there, other)
    assert again.keys() == state.keys()
    for name, values in state.items():
        assert all(torch.equal(again[name][key], x) for key, x in values.items()), name
    few = Model("second")
    with pytest.raises(ValueError, match=r"the optimiser has no parameter backbone\.weight"):
        load_state_by_name(optimizer_of(few), few, state)


def steady_model(config=TINY):
    """Without dropout and batch norm, so that an image's loss does not depend on its batch; in
    float64, for Adam's first steps are as long where a gradient is nothing but rounding."""
    torch.manual_seed(0)
    model = build_model(dataclasses.replace(config, dropout=0.0))
    for module in [*model.backbone.modules()]:
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    return model.double()


def one_without_boxes(coco):
    """Four images, of which the first has no box and the others two. With fewer, two processes
    would differ from one: the official loss is never divided by less than one box for each."""
    data = CocoDataset(*find_split(coco, "train"))
    data.image_ids = data.image_ids[:4]
    annotations = data.coco.imgToAnns
    for image_id in data.image_ids:
        annotations[image_id] = 2 * annotations[image_id][:1]
    annotations[data.image_ids[0]] = []
    return data


TWO = """
import os, signal
from pathlib import Path
from tests.test_train import EQUAL, one_without_boxes, steady_model, train
from deformable_detr.cli import beforehand
from deformable_detr.data.places import training_splits
from deformable_detr.interrupts import Interrupted
from deformable_detr.training.processes import make_accelerator

def on_step(step, losses):
    if step == 4 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGINT)

data = one_without_boxes("coco")
train(steady_model(), data, None, "equal", EQUAL, progress=False)
try:
    train(steady_model(), data, None, "run", EQUAL, on_step=on_step, progress=False)
except Interrupted as stop:
    print(f"process {os.environ['RANK']}: {stop}", flush=True)
try:  # a folder that only one of two machines sees
    train(steady_model(), data, None, ("run", "other")[int(os.environ["RANK"])], EQUAL)
except ValueError as error:
    print(f"process {os.environ['RANK']}: {error}", flush=True)
if os.environ["RANK"] == "1":
    beforehand.check_data = None  # the other process looks, and both refuse
try:
    beforehand.refuse_faults(Path("faulty"), training_splits("faulty"), make_accelerator())
except ValueError as error:
    print(f"process {os.environ['RANK']}: {error}", flush=True)
"""
LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
EQUAL = TrainConfig(epochs=3, batch_size=1, lr=1e-3, backbone_lr=1e-3)


def losses_of(folder):
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return torch.tensor([list(x.values()) for x in log if "loss" in x], dtype=torch.float64)


def test_two_processes_step_as_one_with_the_double_batch_and_stop_together(coco, tmp_path):
    """Losses and gradient norms of all steps, also where one process has no box; then Ctrl-C in
    one of the two."""
    content = write_coco(tmp_path / "faulty")
    content["annotations"][1]["category_id"] = 99
    save_annotations(tmp_path / "faulty", content)
    printed = run_script(tmp_path, TWO, before=LAUNCH)
    double = dataclasses.replace(EQUAL, batch_size=2)
    data = one_without_boxes(coco)
    train(steady_model(), data, None, tmp_path / "one", double, progress=False)
    one, two = losses_of(tmp_path / "one"), losses_of(tmp_path / "equal")
    assert one.shape == (6, 10)
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    for process in (0, 1):
        assert f"process {process}: stopped at step 4 of 6" in printed
        assert f"process {process}: processes would continue from steps [4, 0]" in printed
        assert f"process {process}: 1 fatal fault in the data" in printed
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 4 and state["identity"]["processes"] == 2
    assert len(state["random_states"]) == 2
    assert len(list((tmp_path / "equal").glob("events.*"))) == 1


RESUMED = """
import os, signal
from deformable_detr.interrupts import Interrupted
from tests.test_train import PAIR, make, train

def stop(step, losses):
    if step == 4 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGINT)

for folder, on_step in (("whole", None), ("parts", stop), ("parts", None)):
    try:
        train(*make("coco"), folder, PAIR, on_step=on_step, progress=False)
    except Interrupted as stopped:
        print(stopped, flush=True)
"""
PAIR = dataclasses.replace(RECIPE, epochs=2, batch_size=1)


def test_two_processes_resume_as_if_they_had_never_stopped(coco, tmp_path):
    """Each with its own random numbers, on which dropout depends."""
    printed = run_script(tmp_path, RESUMED, before=LAUNCH)
    assert printed.count("stopped at step 4 of 6") == 2
    states = torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)["random_states"]
    assert not torch.equal(*states)
    logs = [(tmp_path / folder / "log.jsonl").read_text() for folder in ("whole", "parts")]
    assert logs[0] == logs[1]
    saved = [load_model(tmp_path / name / "last.safetensors")[0] for name in ("whole", "parts")]
    assert_same_weights(*saved)


@pytest.mark.parametrize("config", [TINY, TINY_DETR], ids=["focal", "softmax"])
def test_accumulated_batches_step_as_a_large_one(coco, tmp_path, config):
    """Also where one of them has no box at all: the loss is divided by the boxes of the step, or
    by the weights of its queries."""
    for name, batch_size, accumulate in (("large", 6, 1), ("parts", 1, 6), ("pairs", 2, 3)):
        recipe = dataclasses.replace(EQUAL, batch_size=batch_size, accumulate=accumulate)
        train(steady_model(config), make(coco)[1], None, tmp_path / name, recipe, progress=False)
    large = losses_of(tmp_path / "large")
    assert len(large) == 3
    for name in ("parts", "pairs"):
        torch.testing.assert_close(losses_of(tmp_path / name), large, rtol=1e-4, atol=1e-6)


def run_script(folder, text, before=(), after=(), code=0):
    """What a program prints, run in a folder with an interpreter of its own; it ends with code."""
    (folder / "script.py").write_text(text)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    command = [sys.executable, *before, "script.py", *after]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, done.stderr
    return done.stdout


def test_dropout_and_augmentation_do_something(coco, tmp_path):
    """Else the test above would show little. All runs have the same seed."""

    def trained(name, dropout=TINY.dropout, augment=True):
        _, train_set, plain_set = make(coco)
        if not augment:
            train_set.transform = plain_set.transform
        model = DeformableDETR(dataclasses.replace(TINY, dropout=dropout))
        recipe = dataclasses.replace(RECIPE, epochs=1)
        train(model, train_set, None, tmp_path / name, recipe, progress=False)
        return model.neck.level_embed

    both = trained("both")
    assert torch.equal(both, trained("again"))
    assert not torch.equal(both, trained("no dropout", dropout=0.0))
    assert not torch.equal(both, trained("no augmentation", augment=False))


def test_what_a_run_leaves_behind(coco, tmp_path):
    model, _ = run(coco, tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"checkpoint.pt", "log.jsonl", "best.safetensors", "last.safetensors"} <= names
    assert any(name.startswith("events.") for name in names)
    last, categories = load_model(tmp_path / "run" / "last.safetensors")
    assert torch.equal(last.neck.level_embed, model.neck.level_embed)
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
    run(coco, tmp_path / "run", dataclasses.replace(RECIPE, epochs=2))
    fewer = dataclasses.replace(RECIPE, epochs=1)
    with pytest.raises(ValueError, match=r"is of this run with 2 epochs, .* not for fewer, got 1"):
        run(coco, tmp_path / "run", fewer)
    with pytest.raises(ValueError, match=r"another run: recipe epochs was 2, is 1; recipe lr was"):
        run(coco, tmp_path / "run", dataclasses.replace(fewer, lr=0.5))
    run(coco, tmp_path / "run", resume=False)
    for path in (coco / "annotations").iterdir():
        path.write_text(path.read_text().replace('"red"', '"rot"'))
    with pytest.raises(ValueError, match=r"another run: categories was \[\[3, 'red'\].* 'rot'\]"):
        run(coco, tmp_path / "run")


def test_a_broken_checkpoint_is_said_so(coco, tmp_path):
    (tmp_path / "run").mkdir()
    for content in (b"nothing", b""):
        (tmp_path / "run" / "checkpoint.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"checkpoint.pt is no checkpoint of ours \(.+\): del"):
            run(coco, tmp_path / "run")
    torch.save({"identity": {}, "model": {}, "more": torch.ones(999)}, tmp_path / "half.pt")
    whole = (tmp_path / "half.pt").read_bytes()
    (tmp_path / "run" / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"of ours \(it is damaged or cut off, .+\): delete it"):
        run(coco, tmp_path / "run")


def test_a_checkpoint_that_claims_more_than_it_holds_is_refused(coco, tmp_path):
    """As weights are: one number under a stride of 0 would unfold to gigabytes."""
    (tmp_path / "run").mkdir()
    bomb = {"identity": {}, "model": {"weight": torch.ones(1).expand(1 << 30)}}
    torch.save(bomb, tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"no checkpoint of ours \(.*bytes cannot be in"):
        run(coco, tmp_path / "run")


def test_starting_anew_leaves_nothing_of_the_run_before(coco, tmp_path):
    run(coco, tmp_path / "run", dataclasses.replace(RECIPE, epochs=1))
    before = {path for path in (tmp_path / "run").glob("events.*")}
    model, train_set, _ = make(coco)
    with pytest.raises(Interrupted):
        train(
            model,
            train_set,
            None,
            tmp_path / "run",
            RECIPE,
            resume=False,
            progress=False,
            on_step=stop_at(2),
        )
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert "best.safetensors" not in names and "last.safetensors" not in names
    assert not before & set((tmp_path / "run").iterdir())
    log = [json.loads(x) for x in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [x["step"] for x in log] == [1, 2]


@pytest.mark.parametrize("failing", [1, 2])  # the last one, too
def test_an_evaluation_that_fails_is_made_up_for(coco, tmp_path, monkeypatch, failing):
    run(coco, tmp_path / "whole")
    calls = iter(range(1, 9))

    def fail(*given, **options):
        if next(calls) == failing:
            raise MemoryError
        return predict_dataset(*given, **options)

    monkeypatch.setattr(setup, "predict_dataset", fail)
    with pytest.raises(MemoryError):
        run(coco, tmp_path / "parts")
    assert torch.load(tmp_path / "parts" / "checkpoint.pt")["step"] == 6 * failing
    run(coco, tmp_path / "parts")
    for name in ("log.jsonl", "last.safetensors", "best.safetensors"):
        whole, parts = ((tmp_path / folder / name) for folder in ("whole", "parts"))
        if name == "log.jsonl":
            assert whole.read_text() == parts.read_text()
        else:
            expected, given = load_file(whole), load_file(parts)
            assert expected.keys() == given.keys()
            assert all(torch.equal(expected[key], given[key]) for key in expected)


HALF = dataclasses.replace(RECIPE, mixed_precision="fp16", ema_decay=0.9, clip_norm=0.1)


def test_half_precision_leaves_a_step_out_where_the_scale_is_too_large(coco, tmp_path):
    """The first gradient overflows: nothing moves, neither weights nor their average."""
    model, train_set, _ = make(coco)
    before = {name: x.clone() for name, x in model.named_parameters()}
    gradients = iter([torch.inf])
    model.neck.level_embed.register_hook(lambda g: g * next(gradients, 1))
    training = Training(model, train_set, None, tmp_path / "run", HALF, progress=False)
    moved = []

    def on_step(step, losses):
        learned = dict(model.named_parameters())
        moved.append(any(not torch.equal(before[name], learned[name]) for name in before))
        assert training.average.n_averaged == step - 1

    make_steps(training, on_step)
    assert moved[:2] == [False, True]
    log = [json.loads(x) for x in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert log[0]["gradient_norm"] is None
    # unscaled: of the size that it has in float32, not tens of thousands of times that
    run(coco, tmp_path / "float", RECIPE)
    whole = json.loads((tmp_path / "float" / "log.jsonl").read_text().splitlines()[1])
    assert 0.1 < log[1]["gradient_norm"] / whole["gradient_norm"] < 10


def test_half_precision_resumes_with_its_scale(coco, tmp_path):
    whole, _ = run(coco, tmp_path / "whole", HALF)
    with pytest.raises(Interrupted):
        run(coco, tmp_path / "parts", HALF, on_step=stop_at(5))
    state = torch.load(tmp_path / "parts" / "checkpoint.pt")
    parts, _ = run(coco, tmp_path / "parts", HALF)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, parts.state_dict()[name]), name

    state["scaler"]["scale"] = 2.0**10
    torch.save(state, tmp_path / "parts" / "checkpoint.pt")
    training = Training(*make(coco), tmp_path / "parts", HALF, progress=False)
    training.resume()
    assert training.scaler.get_scale() == 2**10


def test_half_precision_gives_up_where_no_scale_helps(coco, tmp_path):
    model, train_set, _ = make(coco)
    model.neck.level_embed.register_hook(lambda gradient: gradient * torch.nan)
    recipe = dataclasses.replace(HALF, epochs=9)
    with pytest.raises(NonFiniteLossError, match="the gradient is not finite at step 18"):
        train(model, train_set, None, tmp_path / "run", recipe, progress=False)


def test_a_data_set_without_any_box_trains(coco, tmp_path):
    content = json.loads((coco / "annotations" / "train.json").read_text())
    save_annotations(coco, content | {"annotations": []})
    _, metrics = run(coco, tmp_path / "run", dataclasses.replace(RECIPE, epochs=1))
    assert metrics is not None


def divide_by_zero(model):
    model.encoder.layers[0].ffn.register_forward_hook(lambda module, inputs, output: output / 0)


def spoil(parameter):
    with torch.no_grad():
        parameter.fill_(torch.nan)


NOT_FINITE = {
    r"the model's output is .*: first in class_heads.1 \(ClassHead\), whose weight is": (
        lambda model: spoil(model.class_heads[1].weight)
    ),
    r"the model's output is .*: first in backbone.blocks.2.body.1 \(BatchNorm2d\), whose bias": (
        lambda model: spoil(model.backbone.blocks[2].body[1].bias)
    ),
    r"the model's output is .*: first in encoder.layers.0.ffn \(FeedForward\); no checkpoint": (
        divide_by_zero
    ),
    "the gradient is .*: in neck.level_embed and 0 more": (
        lambda model: model.neck.level_embed.register_hook(lambda gradient: gradient / 0)
    ),
}


@pytest.mark.parametrize("message", NOT_FINITE)
def test_what_is_not_finite_stops_at_once_and_is_named_with_the_images(coco, tmp_path, message):
    model, train_set, val_set = make(coco)
    NOT_FINITE[message](model)
    with pytest.raises(NonFiniteLossError, match=message) as error:
        train(model, train_set, val_set, tmp_path / "run", RECIPE, progress=False)
    assert re.search(r"not finite at step 1, images \[10\d, 10\d\]: ", str(error.value))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"batch_size": 7}, "6 training images are less than a batch of 7"),
        ({"schedule": "poly"}, "schedule must be"),
        ({"epochs": 0}, "at least 1"),
        ({"accumulate": 4}, "6 training images are less than a batch of 8"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\)"),
        ({"patience": -1}, "patience must be at least 0, got -1"),
        ({"warmup_steps": -10}, "warmup_steps must be at least 0"),
        ({"clip_norm": 0.0}, "clip_norm must be positive, got 0.0"),
        ({"giou_weight": -1.0}, "giou_weight must be at least 0, got -1.0"),
        ({"lr": math.nan}, "lr must be positive, got nan"),
        ({"backbone_lr": math.inf}, "backbone_lr must be at least 0, got inf"),
        ({"mixed_precision": "half"}, "mixed_precision must be one of"),
        ({"frozen": ("conv1",)}, r"no \['conv1'\] to freeze; it has \['stem', 'blocks'\]"),
    ],
)
def test_recipes_are_refused(coco, tmp_path, recipe, message):
    with pytest.raises(ValueError, match=message):
        run(coco, tmp_path / "run", dataclasses.replace(RECIPE, **recipe))


def test_the_weight_of_giou_is_the_recipes(coco, tmp_path):
    terms = {}
    for weight in (2.0, 5.0):
        recipe = dataclasses.replace(RECIPE, epochs=1, giou_weight=weight)
        run(coco, tmp_path / str(weight), recipe)
        terms[weight] = json.loads(
            (tmp_path / str(weight) / "log.jsonl").read_text().split("\n")[0]
        )
    for name in ("loss_class", "loss_box", "loss_giou"):
        factor = 2.5 if name == "loss_giou" else 1.0
        assert terms[5.0][name] == pytest.approx(factor * terms[2.0][name], rel=1e-5)


def test_val_must_have_the_categories_of_train(coco, tmp_path):
    path = coco / "annotations" / "val.json"
    path.write_text(path.read_text().replace('"red"', '"rot"'))
    with pytest.raises(ValueError, match="'red', is in one of train and val only"):
        run(coco, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_classes_must_be_those_of_the_data(coco, tmp_path):
    _, train_set, val_set = make(coco)
    model = DeformableDETR(dataclasses.replace(TINY, num_classes=4))
    with pytest.raises(ValueError, match="4 classes, the data has 3"):
        train(model, train_set, val_set, tmp_path / "run", RECIPE, progress=False)


def test_the_papers_parameter_groups():
    with torch.device("meta"):
        model = DeformableDETR(DeformableDETRConfig())
    rest, backbone, sampling = parameter_groups(model, PAPER)
    count = [sum(p.numel() for p in group["params"]) for group in (rest, backbone, sampling)]
    assert count == [39_847_265 - 23_232_512 - 790_018, 23_232_512, 790_018]
    assert [g["lr"] for g in (rest, backbone, sampling)] == pytest.approx([2e-4, 2e-5, 2e-5])


def test_schedules():
    paper = PAPER
    factors = [lr_factor(step, 500, 10, paper) for step in (0, 399, 400, 499)]
    assert factors == [1, 1, 0.1, 0.1]
    cosine = dataclasses.replace(paper, schedule="cosine", warmup_steps=4)
    assert lr_factor(0, 1000, 10, cosine) == pytest.approx(0.25)
    assert lr_factor(500, 1000, 10, cosine) == pytest.approx(0.505)
    assert lr_factor(1000, 1000, 10, cosine) == pytest.approx(0.01)


@pytest.mark.parametrize("part", ["backbone", "encoder", "decoder"])
def test_gradient_checkpointing_has_the_same_gradients_and_keeps_less(coco, part):
    """Dropout included; kept: the bytes that a part's graph holds until the backward pass."""
    config = dataclasses.replace(
        TINY, backbone="resnet18", encoder_layers=4, decoder_layers=4, two_stage=True
    )
    batch = collate([make(coco)[1][i] for i in range(2)])
    gradients, kept = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = DeformableDETR(config).train()
        model.set_gradient_checkpointing(checkpointing)
        held, hooks = {}, torch.autograd.graph.saved_tensors_hooks

        def keep(tensor, held=held):
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        watched = hooks(keep, lambda tensor: tensor)
        getattr(model, part).register_forward_pre_hook(lambda *_, w=watched: w.__enter__())
        getattr(model, part).register_forward_hook(lambda *_, w=watched: w.__exit__())
        torch.manual_seed(1)
        sum(SetCriterion()(model(batch), batch.targets).values()).backward()
        kept.append(sum(held.values()))
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)
    assert kept[1] < 0.3 * kept[0], kept


def test_bfloat16_keeps_coordinates_weights_and_losses_in_float32(coco, tmp_path):
    model, train_set, _ = make(coco)
    batch = collate([train_set[i] for i in range(2)])
    model.eval()
    exact = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(batch)
    for layer, wanted in zip((output, *output.auxiliary), (exact, *exact.auxiliary), strict=True):
        assert layer.logits.dtype == torch.bfloat16 and layer.boxes.dtype == torch.float32
        torch.testing.assert_close(layer.boxes, wanted.boxes, rtol=0, atol=5e-3)
    losses = {}
    for precision in ("no", "bf16"):
        recipe = dataclasses.replace(RECIPE, epochs=1, mixed_precision=precision)
        run(coco, tmp_path / precision, recipe)
        losses[precision] = losses_of(tmp_path / precision)[:, 1]
    assert not torch.equal(losses["no"], losses["bf16"])
    torch.testing.assert_close(losses["no"], losses["bf16"], rtol=0.03, atol=0)


@pytest.mark.parametrize("two_stage", [False, True])
def test_bfloat16_keeps_references_and_valid_ratios_in_float32(two_stage):
    torch.manual_seed(0)
    model = DeformableDETR(dataclasses.replace(TINY, refine=two_stage, two_stage=two_stage)).eval()
    batch = Batch.from_images([torch.randn(3, 90, 75), torch.randn(3, 64, 121)])
    exact, ratios = model(batch), model.tokens(batch).valid_ratios
    with torch.autocast("cpu", torch.bfloat16):
        output = model(batch)
        torch.testing.assert_close(model.tokens(batch).valid_ratios, ratios, rtol=0, atol=0)
    first = [each.auxiliary[0].references for each in (output, exact)]
    assert first[0].dtype == torch.float32
    if not two_stage:  # learned: they do not depend on what the layers compute
        torch.testing.assert_close(*first, rtol=0, atol=0)


def test_evaluation_takes_as_many_detections_as_the_recipe_says(coco, tmp_path, monkeypatch):
    seen = []

    def predict(*given, **options):
        seen.append(options)
        return predict_dataset(*given, **options)

    monkeypatch.setattr(setup, "predict_dataset", predict)
    run(coco, tmp_path, dataclasses.replace(RECIPE, epochs=1, top_k=7))
    assert [options["top_k"] for options in seen] == [7]
    model, _, val_set = make(coco)
    counts = {k: len(predict_dataset(model, val_set, top_k=k, progress=False)) for k in (7, 9)}
    assert counts == {7: 7 * len(val_set), 9: 9 * len(val_set)}


def test_the_average_of_weights():
    """After n updates it keeps (1 + n) / (10 + n) of itself, until that is the decay."""
    model = nn.BatchNorm1d(1)
    average = averaged(model, 0.5)
    by_hand = None
    for update in range(30):
        with torch.no_grad():
            model.weight.fill_(float(update**2))
            model.running_mean.fill_(float(update))
            model.num_batches_tracked.fill_(update)
        average.update_parameters(model)
        keep = min(0.5, (1 + update) / (10 + update))
        new = torch.tensor([update**2, update], dtype=torch.float32)
        by_hand = new if by_hand is None else keep * by_hand + (1 - keep) * new
    got = torch.cat([average.module.weight, average.module.running_mean]).detach()
    torch.testing.assert_close(got, by_hand)
    assert average.module.num_batches_tracked == 29


def test_averaged_weights_are_what_is_evaluated_and_saved(coco, tmp_path):
    recipe = dataclasses.replace(RECIPE, epochs=2, ema_decay=0.9)
    model, metrics = run(coco, tmp_path / "run", recipe)
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    for name in ("last", "best"):
        saved, _ = load_model(tmp_path / "run" / f"{name}.safetensors")
        assert torch.equal(saved.neck.level_embed, state["average"]["module.neck.level_embed"])
    assert torch.equal(model.neck.level_embed, state["model"]["neck.level_embed"])
    assert not torch.equal(model.neck.level_embed, saved.neck.level_embed)
    assert str(evaluate(saved, make(coco)[2], progress=False)) == str(metrics)


def test_patience_ends_a_run_that_no_longer_gets_better(coco, tmp_path, monkeypatch):
    recipe = dataclasses.replace(RECIPE, epochs=9, evaluate_every=1, patience=2)
    _, metrics = run(coco, tmp_path / "before", dataclasses.replace(recipe, epochs=1))
    aps = iter([0.1, 0.3, 0.3, 0.4, float("nan"), 0.4, 0.5])

    def scripted(*args, **options):
        return dataclasses.replace(metrics, ap=next(aps))

    monkeypatch.setattr(setup, "score", scripted)
    best = tmp_path / "run" / "best.safetensors"
    seen = {}

    def on_step(step, losses):
        if step % 3 == 1 and best.exists():
            seen[step] = best.stat().st_ino

    model, _ = run(coco, tmp_path / "run", recipe, on_step=on_step)
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert (state["step"], state["best_ap"], state["stale"]) == (18, 0.4, 2)
    assert seen[7] == seen[10] != seen[13] == seen[16] == best.stat().st_ino
    again, _ = run(coco, tmp_path / "run", recipe)  # stays at its end
    assert_same_weights(model, again)


def test_parts_of_a_resnet_learn_as_the_recipe_says():
    config = dataclasses.replace(TINY, backbone="resnet18")
    with torch.device("meta"):
        backbone = DeformableDETR(config).backbone

    def learning():
        return {name.split(".")[1] for name, p in backbone.named_parameters() if p.requires_grad}

    assert learning() == {"layer2", "layer3", "layer4"}  # as in the paper
    freeze(backbone, ("conv1",))
    assert learning() == {"layer1", "layer2", "layer3", "layer4"}
    with pytest.raises(ValueError, match=r"no \['layer5'\] to freeze; it has \['conv1', 'bn1'"):
        freeze(backbone, ("layer5",))


def test_the_papers_recipe_is_the_default():
    recipe = load_recipe("paper")
    assert recipe.train == TrainConfig() == PAPER
    assert recipe.model_config(91) == DeformableDETRConfig()


@pytest.mark.parametrize("name", NAMES)
def test_recipes_make_a_model_transforms_and_a_configuration(name):
    recipe = load_recipe(name)
    assert recipe.model_config(3, num_queries=7).num_queries == 7
    assert recipe.train_transform() and recipe.eval_transform() and recipe.about


def test_own_recipes_are_files(tmp_path):
    path = tmp_path / "own.toml"
    train_table = '[train]\nlr = 1\nfrozen = ["conv1"]\n'
    path.write_text(f'about = "mine"\n{train_table}[model]\nrefine = true\n')
    recipe = load_recipe(path)
    assert (recipe.name, recipe.train.lr, recipe.train.frozen) == ("own", 1.0, ("conv1",))
    assert recipe.model_config(3).refine


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("about", "own.toml is no recipe: "),
        ("", "needs a line 'about'"),
        ('about = "x"\nlr = 1', "a recipe has no 'lr'; it has about"),
        ('about = "x"\n[train]\nrate = 1', r"\[train\] has no 'rate'; it has epochs"),
        ('about = "x"\n[train]\nepochs = 1.5', "epochs must be a whole number, got 1.5"),
        ('about = "x"\n[train]\nschedule = "poly"', "schedule must be"),
        ('about = "x"\n[model]\ntwo_stage = true', "two_stage needs refine"),
        ('about = "x"\ntransforms = "none"', "transforms must be one of"),
    ],
)
def test_other_files_are_no_recipes(tmp_path, text, message):
    path = tmp_path / "own.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_recipe(path)
    assert "own.toml" in str(error.value) and "\n" not in str(error.value)


def test_a_recipe_that_is_not_there():
    with pytest.raises(
        FileNotFoundError, match=r"no recipe papper \(did you mean paper\?\): give a file or one of"
    ):
        load_recipe("papper")
