"""Studies: what is missing is run, what died is marked, and nothing is dropped."""

import csv
import dataclasses
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deformable_detr.data.coco import CocoDataset, find_split
from deformable_detr.evaluation.complexity import count
from deformable_detr.structures import Batch, Target
from deformable_detr.training.batches import SeededDataset
from deformable_detr.training.lock import locked
from tests import trials
from tests.conftest import write_coco

FOLDER = Path(__file__).parents[1] / "experiments"
# studies that train detectors
DETECTORS = (
    *("ablations", "convergence", "detr", "rates", "denoising", "dino", "lengths"),
    *("member_rates", "members", "sparse", "tuned_members"),
)
NAMES = [path.stem for path in FOLDER.glob("*.py") if "\nSTUDY = " in path.read_text("utf-8")]


@pytest.fixture
def study(monkeypatch, tmp_path):
    """The runner, which writes its tables into the test's folder."""
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = set(sys.modules)
    module = importlib.import_module("study")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()
    yield module
    for name in {path.stem for path in FOLDER.glob("*.py")} - before:
        sys.modules.pop(name, None)


@pytest.fixture
def make(study, tmp_path):
    """A study of the trials named, with two seeds unless others are given."""

    def make(*configurations, seeds=(0, 1), name="quick"):
        return study.Study(
            name=name,
            question="does it run?",
            configurations={each: each for each in configurations},
            seeds=seeds,
            trial=trials.trial,
            usual=60,
            describe=trials.describe,
            runs=tmp_path / "runs",
        )

    return make


@pytest.fixture
def here(study, monkeypatch):
    """Trials run in this process, one after another, where none of them is to die of a signal."""

    class Done:
        sentinel = None

        def __init__(self, code):
            self.exitcode = code

        def is_alive(self):
            return False

    def start(place):
        try:
            study.attempt(place)
        except SystemExit as end:
            return Done(end.code)
        return Done(0)

    monkeypatch.setattr(study, "start", start)
    monkeypatch.setattr(study, "wait", lambda sentinels: None)


def table(tmp_path, name="quick"):
    with open(tmp_path / "results" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def card(tmp_path, name="quick"):
    return json.loads((tmp_path / "results" / f"{name}.json").read_text())


def test_two_configurations_from_end_to_end_in_processes(study, make, tmp_path, capsys):
    """One of them is killed, then resumed: the study says so, and ends whole."""
    quick = make("runs", "is killed once", seeds=(0,))
    assert not study.run_studies([quick], jobs=2)
    said = capsys.readouterr()
    assert said.out.startswith("2 of 2 trials to run, about 2 minutes of a core, 1 with 2 side")
    assert "is killed once, seed 0: killed by signal 9" in said.err
    rows = table(tmp_path)
    assert [row["status"] for row in rows] == ["done", "done", "killed by signal 9"]
    assert not card(tmp_path)["finished"]

    assert study.run_studies([quick], jobs=2)
    assert capsys.readouterr().out.startswith("1 of 2 trials to run")
    rows = table(tmp_path)
    begun = {row["configuration"]: row["value"] for row in rows if row["metric"] == "begun"}
    assert begun == {"runs": "1", "is killed once": "2"}
    assert card(tmp_path)["finished"] and card(tmp_path)["missing"] == []


def test_the_table_is_tidy(study, make, here, tmp_path):
    """A row has one value; configuration, seed, split, at and metric say which."""
    study.run_studies([make("a", "b")], jobs=1)
    rows = table(tmp_path)
    assert tuple(rows[0]) == study.COLUMNS
    keys = [tuple(row[column] for column in study.COLUMNS if column != "value") for row in rows]
    assert len(set(keys)) == len(keys) == 8
    assert all(float(row["value"]) >= 0.5 for row in rows)
    before = (tmp_path / "results" / "quick.csv").read_bytes()
    study.run_studies([make("a", "b")], jobs=1)
    assert (tmp_path / "results" / "quick.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("configuration", "status", "again"),
    [
        ("is not finite", "not finite", 1),
        ("fills the disk", "disk full", 2),
        ("has a fault", "failed", 2),
    ],
)
def test_a_trial_that_died_is_marked_and_stays_in_the_table(
    study, make, here, tmp_path, capsys, configuration, status, again
):
    """It is tried again at the next command, unless it would die in the same way."""
    quick = make("fine", configuration, seeds=(0,))
    for _ in range(2):
        assert not study.run_studies([quick], jobs=1)
    assert f"quick: {configuration}, seed 0: {status}" in capsys.readouterr().err
    assert {row["configuration"]: row["status"] for row in table(tmp_path)} == {
        "fine": "done",
        configuration: status,
    }
    assert card(tmp_path)["missing"] == [f"{configuration}, seed 0: {status}"]
    place = study.Place(quick, configuration, 0)
    assert json.loads((place.folder / "begun.json").read_text()) == again


def test_what_was_not_begun_has_a_row_too(study, make, tmp_path):
    study.write_tables([make("a", "b", seeds=(0,))])
    assert [row["status"] for row in table(tmp_path)] == ["missing", "missing"]
    assert card(tmp_path)["missing_cpu_minutes"] == 2


def test_a_finished_table_is_not_written_over_where_its_runs_are_not(study, make, here, tmp_path):
    quick = make("a")
    study.run_studies([quick], jobs=1)
    before = table(tmp_path), card(tmp_path)
    shutil.rmtree(tmp_path / "runs")
    study.write_tables([quick])
    assert (table(tmp_path), card(tmp_path)) == before
    study.write_tables([make("a", "b")])  # another study
    assert {row["status"] for row in table(tmp_path)} == {"missing"}


def test_a_trial_in_use_is_left_to_its_process(study, make, here, tmp_path, capsys):
    quick = make("a", seeds=(0,))
    place = study.Place(quick, "a", 0)
    place.folder.mkdir(parents=True)
    with locked(place.folder / ".trial"):
        assert not study.run_studies([quick], jobs=1)
        assert "quick: a, seed 0: in use" in capsys.readouterr().err
        assert not (place.folder / "begun.json").exists()
        assert table(tmp_path)[0]["status"] == "unfinished"
    assert study.run_studies([quick], jobs=1)


def test_a_trial_that_two_studies_need_runs_once(study, make, here, tmp_path, capsys):
    studies = make("a", "b", name="one"), make("b", "c", name="two")
    study.run_studies(list(studies), jobs=1)
    assert "6 of 8 trials to run" in capsys.readouterr().out
    assert {row["value"] for row in table(tmp_path, "two") if row["metric"] == "begun"} == {"1"}


def test_seeds_come_before_configurations(study, make, here, capsys):
    """So that a study that is stopped has something of everything."""
    study.run_studies([make("a", name="one"), make("b", name="two")], jobs=1)
    lines = capsys.readouterr().out.splitlines()[1:]
    assert lines == ["one: a, seed 0", "two: b, seed 0", "one: a, seed 1", "two: b, seed 1"]


def test_what_repeats_allow_to_say_stands_beside_the_table(study, make, here, tmp_path):
    """Of the last value of each trial, against the first configuration; one repeat says nothing."""
    quick = dataclasses.replace(make("a", "b", seeds=(0, 1, 2)), headline=("test", "ap"))
    study.run_studies([quick], jobs=1)
    compared = card(tmp_path)["compared"]
    assert compared["a"] == {"mean": 0.6, "low": 0.3516, "high": 0.8484, "repeats": 3}
    assert compared["b"]["against the first"].startswith("no difference larger than 0.2")
    study.run_studies([dataclasses.replace(quick, seeds=(0,))], jobs=1)
    assert card(tmp_path)["compared"] == {}


def test_what_took_long_before_is_expected_to_again(study, make, here):
    quick = make("a", "b")
    study.run_studies([dataclasses.replace(quick, seeds=(0,))], jobs=1)
    done = study.Place(quick, "a", 0).folder / "done.json"
    done.write_text(json.dumps({"cpu_seconds": 600, "rows": []}))
    waiting = [study.Place(quick, "a", 1)]
    assert "about 10 minutes of a core, 5 with 2" in study.forecast(2, waiting, 2)


@pytest.mark.skipif(os.name == "nt", reason="SIGTERM ends a process of Windows at once")
def test_a_command_that_is_ended_takes_its_trials_with_it(tmp_path):
    """And says that it can go on."""
    code = f"""
import signal, sys
sys.path[:0] = [{str(FOLDER)!r}, {str(FOLDER.parent)!r}]
import study
from pathlib import Path
from tests import trials
if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    study.RESULTS = Path({str(tmp_path)!r})
    one = study.Study("quick", "?", {{"takes long": "takes long"}}, (0,), trials.trial, 60,
                      describe=trials.describe, runs=study.RESULTS / "runs")
    study.run_studies([one], 1)
"""
    script = tmp_path / "command.py"
    script.write_text(code)
    process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE, text=True)
    for _ in range(1200):
        if list(tmp_path.glob("runs/*/begun.json")):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command continues" in said
    (folder,) = tmp_path.glob("runs/*")
    with locked(folder / ".trial"):  # nobody has it any more
        assert "unfinished" in (tmp_path / "quick.csv").read_text()


@pytest.mark.parametrize(
    ("name", "of_all"), [("thresholds", 1), ("trees", 1 / 3), ("tree_errors", 1)]
)
def test_other_weights_make_other_trials(study, monkeypatch, tmp_path, name, of_all):
    """Where a study starts from the shipped detector, and that is another one, it is run anew."""
    module = importlib.import_module(name)
    before = [place.folder for place in module.STUDY.trials()]
    other = tmp_path / "digits.safetensors"
    other.write_bytes(b"others")
    monkeypatch.setattr(sys.modules[module.STUDY.describe.__module__], "DETECTOR", other)
    after = [place.folder for place in module.STUDY.trials()]
    changed = [old != new for old, new in zip(before, after, strict=True)]
    assert sum(changed) == pytest.approx(of_all * len(changed))


@pytest.mark.parametrize("name", NAMES)
def test_every_study_is_known_and_has_different_trials(study, name):
    each = importlib.import_module(name).STUDY
    assert each.name == name and name in study.STUDIES
    places = list(each.trials())
    assert len({place.folder for place in places}) == len(places), "two are the same"
    assert each.seconds.keys() <= each.configurations.keys()
    assert set(DETECTORS) < set(NAMES)


@pytest.mark.parametrize("name", DETECTORS)
def test_every_detector_of_a_study_can_be_built(study, name):
    """All settings exist, and each change can be made to its model."""
    for configuration in importlib.import_module(name).STUDY.configurations.values():
        configuration.build(0)
        assert configuration.steps % configuration.evaluations == 0


@pytest.mark.parametrize("kind", ["dense, encoder", "windowed, encoder", "deformable, encoder"])
def test_formulas_are_what_the_instrument_counts(study, kind):
    """A.1, to the last multiply-add."""
    cost = importlib.import_module("cost")
    rows = cost.measure(cost.STUDY.configurations[kind], 0, Path())
    for tokens in {row["at"] for row in rows}:
        values = {row["metric"]: row["value"] for row in rows if row["at"] == tokens}
        assert values["multiply_adds"] == values["formula"] > 0
        assert values["bytes_moved"] > values["peak_bytes"] > 0


def test_which_points_are_kept(study):
    Keep = importlib.import_module("thresholds").Keep
    weights = torch.tensor([[[0.5, 0.1], [0.3, 0.1]], [[0.25, 0.25], [0.25, 0.25]]])  # Q, L, K
    assert torch.equal(Keep()(weights), weights)
    two = Keep(heaviest=2)(weights)
    assert torch.allclose(two[0], torch.tensor([[0.625, 0.0], [0.375, 0.0]]))
    assert (two[1] > 0).sum() == 2 and two[1].sum() == 1
    above = Keep(at_least=0.3)(weights)
    assert torch.allclose(above[0], two[0])
    assert above[1].max() == 1, "where all are below, the heaviest stays"
    finest = importlib.import_module("thresholds").Leave(1)(weights)
    assert torch.allclose(finest[0], torch.tensor([[5 / 6, 1 / 6], [0.0, 0.0]]))


@pytest.fixture
def small(study, monkeypatch, tmp_path):
    """A training of four steps, on coloured squares."""
    detectors = importlib.import_module("detectors")
    for split, images in (("train", 6), ("val", 3), ("test", 3)):
        write_coco(tmp_path / "data", split, images)
    monkeypatch.setattr(detectors, "DATA", tmp_path / "data")
    settings = ("num_levels=1", "embed_dim=32", "num_heads=2", "num_queries=5", "ffn_dim=32")
    settings = [f"model.{each}" for each in (*settings, "encoder_layers=1", "decoder_layers=1")]
    settings = (*settings, "train.batch_size=2")
    return detectors, detectors.Detector(settings=settings, steps=4, evaluations=2)


def without_times(rows):
    return [row for row in rows if "seconds" not in row["metric"]]


def test_a_training_goes_on_where_it_was_killed(small, monkeypatch, tmp_path):
    """Its rows are those of one that was not."""
    detectors, detector = small
    whole = detectors.train_detector(detector, 0, tmp_path / "whole")
    measure, calls = detectors.measure, []

    def killed_at_the_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(detectors, "measure", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        detectors.train_detector(detector, 0, tmp_path / "killed")
    assert len((tmp_path / "killed" / "curve.jsonl").read_text().splitlines()) == 1
    rows = detectors.train_detector(detector, 0, tmp_path / "killed")
    assert without_times(rows) == without_times(whole)
    assert len(calls) == 4  # val twice, of which one was cut off and came again, and test


def test_what_a_training_measures(study, small, tmp_path, here):
    """In a study of it, whose lock is not the trainer's."""
    detectors, detector = small
    one = study.Study(
        name="one",
        question="what is measured?",
        configurations={"small": detector},
        seeds=(0,),
        trial=detectors.train_detector,
        usual=1,
        describe=detectors.describe,
        runs=tmp_path,
    )
    assert study.run_studies([one], jobs=1)
    (place,) = one.trials()
    rows = place.result()["rows"]
    found = {(row["split"], row["at"], row["metric"]): row["value"] for row in rows}
    for key in (("val", 2, "ap"), ("val", 4, "object_ap50"), ("test", 4, "ap_small")):
        assert key in found
    assert found["val", 4, "decoder_effective_keys"] <= 4  # four points
    assert 0 <= found["val", 4, "instability"] <= 1
    assert found["model", 4, "cpu_seconds_in_all"] >= found["train", 4, "cpu_seconds"] > 0
    assert not (place.folder / "checkpoint.pt").exists()


def test_seeds_draw_other_images_and_epochs_too(small):
    detectors, _ = small
    draws = detectors.Draws(*detectors.find_split(detectors.DATA, "train"))
    draws.length = 3
    assert len(draws) == 3

    def ids(seed, epoch):
        dataset = SeededDataset(draws, seed)
        return [dataset[epoch, i][1].image_id for i in range(30)]

    assert ids(0, 0) == ids(0, 0)
    assert ids(0, 0) != ids(1, 0) and ids(0, 0) != ids(0, 1)
    assert set(ids(0, 0)) == set(draws.image_ids)  # of the whole split


def test_share_of_matches_that_changed(study):
    detectors = importlib.import_module("detectors")
    assert detectors.changed([[0, 1], [2]], [[0, 3], [2]]) == pytest.approx(1 / 3, abs=1e-4)


def test_dense_attention_spreads_over_all_tokens(study):
    """An untrained DETR looks at nearly all of the keys; deformable attention, at its samples."""
    detectors = importlib.import_module("detectors")
    dense = detectors.Detector("digits-detr").build(0)
    sampling = detectors.Detector(settings=("model.num_levels=2",)).build(0)
    batch = Batch.from_images([torch.rand(3, 128, 128)])
    assert 50 < detectors.effective_keys(dense, batch)["decoder_effective_keys"] <= 64
    assert detectors.effective_keys(sampling, batch)["decoder_effective_keys"] == 8


# Segmentation


def test_segmenters_learn_from_the_same_images(study, monkeypatch, tmp_path):
    """On pictures whose upper half is class 0 and lower half class 1, by their brightness."""
    segmentation = importlib.import_module("segmentation")
    for name in ("train", "val", "test"):
        for folder in (tmp_path / name, tmp_path / "masks" / name):
            folder.mkdir(parents=True)
        for i in range(4):
            classes = np.repeat([[0], [1]], 16, axis=0).repeat(32, axis=1).astype(np.uint8)
            pixels = (classes * 200 + 10 * i)[..., None].repeat(3, axis=2).astype(np.uint8)
            Image.fromarray(classes).save(tmp_path / "masks" / name / f"{i}.png")
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    monkeypatch.setattr(segmentation, "DATA", tmp_path)
    dat, resnet = (
        segmentation.Segmenter(name, "UPerNet", 30, 4) for name in ("small DAT", "small ResNet")
    )
    one, other = (segmentation.batches(each, 3) for each in (dat, resnet))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(one, other, strict=True))
    assert len(one) == 30
    rows = segmentation.train(resnet, 0, tmp_path)
    values = {(row["split"], row["metric"]): row["value"] for row in rows}
    assert values["test", "miou"] > 0.8
    losses = [row["value"] for row in rows if row["metric"] == "loss"]
    assert len(losses) == 2 and losses[1] < losses[0]
    shutil.rmtree(tmp_path / "masks")
    with pytest.raises(FileNotFoundError, match=r"run `python data/make_digits.py --masks`"):
        segmentation.split("val")


def test_backbones_of_segmentation_cost_about_the_same(study):
    segmentation = importlib.import_module("segmentation")
    costs = [
        count(segmentation.OfBatch(make().eval()), (segmentation.SIDE, segmentation.SIDE))[0]
        for make in segmentation.BACKBONES.values()
    ]
    assert max(costs) < 1.1 * min(costs)


# The family


@pytest.fixture
def tables(study):
    """Writes a study's table, of (configuration, seed, split, metric, value)."""

    def write(name, rows):
        lines = [",".join(study.COLUMNS)]
        lines += [f'"{c}",{seed},done,{split},300,{m},{v}' for c, seed, split, m, v in rows]
        (study.RESULTS / f"{name}.csv").write_text("\n".join(lines) + "\n")

    return write


def reload(name, study, monkeypatch):
    module = importlib.import_module(name)
    monkeypatch.setattr(module, "RESULTS", study.RESULTS)
    return module


def test_a_trained_member_is_trained_once(study):
    """The studies that ask more of the members take over what theirs has."""
    names = ("members", "lengths", "convergence", "member_rates", "sparse")
    folders = {}
    for name in names:
        trials = importlib.import_module(name).STUDY.trials()
        folders[name] = {place.folder: place.name for place in trials if place.seed == 0}
    shared = {
        name: {folders[name][folder] for folder in folders[name].keys() & folders[other].keys()}
        for name, other in (
            ("lengths", "members"),
            ("member_rates", "members"),
            ("sparse", "members"),
        )
    }
    assert shared["lengths"] == {"300 steps"} and shared["sparse"] == {"rho 0.3"}
    assert len(shared["member_rates"]) == 9
    assert all(name.endswith(", 0.001") for name in shared["member_rates"])
    both = folders["lengths"].keys() & folders["convergence"].keys()
    assert {folders["lengths"][folder] for folder in both} == {"450 steps"}


def test_the_chosen_rate_is_the_best_on_val(study, tables, monkeypatch):
    """Of all three, and no other."""
    rates = reload("member_rates", study, monkeypatch)
    values = {5e-4: 0.2, 1e-3: 0.1, 2e-3: 0.3}
    rows = [(f"DINO, {r:g}", 0, "val", "object_ap", v) for r, v in values.items()]
    rows += [(f"DINO, {r:g}", 0, "test", "object_ap", 1 - v) for r, v in values.items()]
    tables("member_rates", rows)
    assert rates.chosen("DINO") == 2e-3 and rates.chosen("Group DETR") is None
    tuned = importlib.import_module("tuned_members").STUDY
    assert list(tuned.configurations) == ["DINO"]
    assert tuned.configurations["DINO"].resolved(0).train.lr == 2e-3
    tables("member_rates", rows[1:])
    assert rates.chosen("DINO") is None
    member = rates.MEMBERS.configurations["DINO"]
    assert rates.with_rate(member, 1e-3) == member
    train = rates.with_rate(member, 2e-3).resolved(0).train
    assert (train.lr, train.backbone_lr) == (2e-3, 2e-3)


def test_near_copies_alone_are_those_of_dino(study):
    """The same noise of the same draws, in as many groups, and a known match for each."""
    dino = importlib.import_module("dino")
    both = dino.STUDY.configurations["DINO"].build(0)
    near = dino.STUDY.configurations["DINO, near copies alone"].build(0)
    boxes, draws = torch.rand(2, 5, 2, 3, 4), 2 * torch.rand(2, 5, 2, 3, 4) - 1
    expected = both.noise(boxes, draws)
    torch.testing.assert_close(near.noise(boxes[:, :, :1], draws[:, :, :1]), expected[:, :, :1])
    target = Target(0, torch.tensor([1, 2]), torch.tensor([[0.3, 0.4, 0.2, 0.1]] * 2), (128, 96))
    batch = Batch.from_images([torch.rand(3, 128, 96)])
    for model, size in ((both, 40), (near, 20)):
        memory = model.train().encoder(model.tokens(batch))
        known = model.queries(memory, [target])[0].denoising
        places, objects = known.matches[0]
        assert known.size == size and objects.tolist() == [0, 1] * 10
        assert len(set(places.tolist())) == 20 and places.max() < size


def test_errors_are_counted_where_as_many_boxes_are_shown_as_there_are_objects(study, tmp_path):
    dino = importlib.import_module("dino")
    write_coco(tmp_path, "test", 4)
    dataset = CocoDataset(*find_split(tmp_path, "test"))
    annotations = dataset.coco.dataset["annotations"]
    found = [
        {key: a[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9 - 0.01 * i}
        for i, a in enumerate([annotations[0], *annotations])
    ]
    counts = dino.kinds(found, dataset)
    assert counts["correct"] == len(annotations) - 1
    assert counts["duplicate"] == counts["missed"] == 1
    assert sum(counts.values()) == len(annotations) + 1


def test_costs_of_a_step_and_of_an_inference(study, monkeypatch, tmp_path):
    """Noised objects cost in training alone."""
    costs = importlib.import_module("member_costs")
    write_coco(tmp_path, "train", 4)
    monkeypatch.setattr(
        costs, "load_split", lambda split, t: CocoDataset(*find_split(tmp_path, split), t)
    )
    monkeypatch.setattr(costs, "BATCHES", 2)
    found = {}
    for name in ("DN-DETR", "DN-DETR, no groups"):
        detector = costs.STUDY.configurations[name]
        settings = (*detector.settings, "train.batch_size=2")
        rows = costs.measure(dataclasses.replace(detector, settings=settings), 0, tmp_path)
        found[name] = {(row["split"], row["metric"]): row["value"] for row in rows}
        assert all(value > 0 for value in found[name].values())
    ours, without = found.values()
    assert ours["inference", "multiply_adds"] == without["inference", "multiply_adds"]
    for metric in ("multiply_adds", "peak_bytes"):
        assert ours["step", metric] > without["step", metric]


def test_the_base_at_as_many_multiply_adds(study, tables, monkeypatch):
    """A member whose step costs a quarter more meets a base of a quarter more steps."""
    equal = reload("equal_cost", study, monkeypatch)
    base, *names = equal.MEMBERS.configurations
    costs = [(name, 0, "step", "multiply_adds", 100) for name in (base, *names)]
    costs[4] = ("Group DETR", 0, "step", "multiply_adds", 125)
    costs[5] = ("Sparse DETR", 0, "step", "multiply_adds", 87.5)
    tables("member_costs", costs)
    steps = equal.equal_steps(equal.read("member_costs", "step", "multiply_adds"))
    assert (steps["DINO"], steps["Group DETR"], steps["Sparse DETR"]) == (300, 375, 262.5)
    rows = []
    for metric in equal.METRICS:
        rows += [
            (f"{length} steps", seed, "test", metric, length / 1000 + seed / 100)
            for length in equal.EVALUATIONS
            for seed in (0, 1)
        ]
    tables("lengths", rows)
    tables("members", [("Group DETR", seed, "test", "ap", 0.5 + seed / 100) for seed in (0, 1)])
    found = dict(equal.compare(steps))
    assert found["Group DETR"]["ap"]["base"]["mean"] == pytest.approx(0.38)
    assert found["Group DETR"]["ap"]["member"]["mean"] == pytest.approx(0.505)
    assert found["Group DETR"]["ap"]["verdict"].startswith("better by")
    assert found["DINO"] == {"steps of the base": 300}
    lengths = equal.read("lengths", "test", "ap")
    assert equal.reached(lengths, 262.5) == pytest.approx([0.2625, 0.2725])
    with pytest.raises(ValueError, match="225 to 450 steps, not for 500"):
        equal.reached(lengths, 500)
    del lengths["375 steps"]["1"]
    assert len(equal.reached(lengths, 375)) == 1
