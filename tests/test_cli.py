"""The command line as a newcomer meets it."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

from deformable_detr import DeformableDETR
from deformable_detr.checkpoint import save_model
from deformable_detr.cli import main
from tests.conftest import TINY

CATEGORIES = [{"id": 3, "name": "red"}, {"id": 7, "name": "green"}, {"id": 20, "name": "blue"}]
TRAIN = ["--recipe", "digits", "--epochs", "1", "--batch-size", "2", "--queries", "6"]


@pytest.fixture
def model_file(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "model.safetensors"
    save_model(DeformableDETR(TINY), path, CATEGORIES)
    return path


@pytest.mark.parametrize("command", ["train", "evaluate", "predict", "check"])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and f"deformable-detr {command} " in text.split("example:")[1]


def test_train_then_evaluate_then_predict(coco, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", str(coco), "--output", str(run), *TRAIN]) == 0
    assert "AP50" in capsys.readouterr().out
    model = str(run / "best.safetensors")
    report = tmp_path / "metrics.json"
    options = ["--split", "train", "--model", model, "--json", str(report)]
    assert main(["evaluate", str(coco), *options]) == 0
    printed = capsys.readouterr().out
    assert f"AP   {json.loads(report.read_text())['ap']:27.3f}"[5:].strip() in printed
    images = sorted(str(path) for path in (coco / "train").iterdir())[:2]
    options = ["--model", model, "--threshold", "0", "--output", str(tmp_path / "found")]
    assert main(["predict", *images, *options]) == 0
    assert "18 found" in capsys.readouterr().out
    for name in ("100.png", "101.png"):
        with Image.open(tmp_path / "found" / name) as picture:
            assert picture.size >= (64, 48)


def test_predict_does_not_save_one_picture_over_another(coco, model_file, tmp_path, capsys):
    images = [str(coco / split / "100.png") for split in ("train", "val")]
    options = ["--model", str(model_file), "--output", str(tmp_path / "found")]
    assert main(["predict", *images, *options]) == 2
    assert "2 images would be saved as 100.png" in capsys.readouterr().err
    assert not (tmp_path / "found").exists()


def test_check_lists_faults_and_train_refuses(coco, tmp_path, capsys):
    assert main(["check", str(coco)]) == 0
    path = coco / "annotations" / "train.json"
    content = json.loads(path.read_text())
    content["annotations"][1]["category_id"] = 99
    content["annotations"][2]["bbox"][2] = -4
    path.write_text(json.dumps(content))
    assert main(["check", str(coco)]) == 1
    text = capsys.readouterr().out
    assert "annotation 1001: unknown category 99" in text
    assert "annotation 1002: box of no size" in text and "2 of them fatal" in text
    assert main(["train", str(coco), "--output", str(tmp_path / "run"), *TRAIN]) == 2
    error = capsys.readouterr().err
    assert "annotation 1001" in error and "2 fatal faults" in error
    assert not (tmp_path / "run").exists()


def test_errors_are_one_line(coco, model_file, tmp_path, capsys):
    image = tmp_path / "bad.png"
    image.write_bytes(b"no picture")
    cases = [
        (["predict", str(image), "--model", str(model_file)], "cannot read image"),
        (["predict", str(tmp_path / "no.png"), "--model", str(model_file)], "no image at"),
        (["predict", str(image), "--model", str(image)], "not a readable safetensors file"),
        (["predict", str(image), "--model", str(model_file), "--threshold", "2"], "in [0, 1]"),
        (["evaluate", str(tmp_path), "--model", str(model_file)], "no val annotations"),
        (["check", str(tmp_path)], "no train annotations"),
        (
            ["train", str(coco), "--output", str(tmp_path / "run"), "--backbone", "vgg"],
            "backbone must be",
        ),
        (
            [
                *("train", str(coco), "--output", str(tmp_path / "run"), *TRAIN),
                *("--backbone-weights", str(model_file)),
            ],
            "does not fit the backbone",
        ),
    ]
    for arguments, message in cases:
        assert main([*arguments]) == 2, arguments
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ") and message in error and "\n" not in error


def test_ctrl_c_leaves_a_checkpoint_that_resumes(coco, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = ["train", str(coco), "--output", str(run), *TRAIN, "--epochs", "400"]
    command = [sys.executable, "-m", "deformable_detr.cli", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    log = run / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= 3):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command continues" in error
    assert "Traceback" not in error
    step = torch.load(run / "checkpoint.pt", weights_only=True)["step"]
    assert 3 <= step < 1200
    arguments[-1] = "401"  # the checkpoint is found, and refused as of another recipe
    assert main(arguments) == 2
    assert "recipe epochs was 400, is 401" in capsys.readouterr().err
