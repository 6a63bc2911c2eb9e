"""The command line as a newcomer meets it."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image

from deformable_detr import DeformableDETR, cli
from deformable_detr.cli import main
from deformable_detr.cli.beforehand import refuse_targets
from deformable_detr.cli.commands import COMMANDS
from deformable_detr.files import require_folder
from deformable_detr.inference.detector import read_card, update_card
from deformable_detr.inference.views import MERGES
from deformable_detr.training.recipes import FOLDER as RECIPES
from deformable_detr.weights.ours import load_model, save_model
from tests.conftest import TINY

CATEGORIES = [{"id": 3, "name": "red"}, {"id": 7, "name": "green"}, {"id": 20, "name": "blue"}]
TRAIN = ["--recipe", "digits", "--epochs", "1", "--batch-size", "2", "--set", "model.num_queries=6"]
SETTINGS = ["--accumulate", "2", "--ema-decay", "0.9", "--patience", "3", "--lr", "2e-3"]


@pytest.fixture
def model_file(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "model.safetensors"
    save_model(DeformableDETR(TINY), path, CATEGORIES)
    return path


@pytest.mark.parametrize("module", COMMANDS, ids=lambda module: module.__name__)
def test_help_has_an_example(module, capsys):
    command = module.__name__.rpartition(".")[2]
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and f"deformable-detr {command} " in text.split("example:")[1]


@pytest.mark.parametrize(
    ("arguments", "usage", "message"),
    [
        (["trian", "x"], "usage: deformable-detr [-h]", "(did you mean train?)"),
        (
            ["train", "x", "--output", "y", "--epoch", "3"],
            "usage: deformable-detr train",
            "--epochs?",
        ),
        (
            ["predict", "x", "--treshold=0.3"],
            "usage: deformable-detr predict",
            "--threshold?)",
        ),
        (["check", "x", "--xyz"], "usage: deformable-detr check", "arguments: --xyz\n"),
    ],
)
def test_a_slip_is_understood(capsys, arguments, usage, message):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith(usage) and message in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--set", "train.epoch=3"],
            "train has no 'epoch' (did you mean epochs?); it has epochs, ",
        ),
        (["--set", "model.two_stages=true"], "has no 'two_stages' (did you mean two_stage?)"),
        (["--set", "trian.epochs=3"], "got 'trian.epochs=3' (did you mean train?)"),
        (["--set", "model.name=deformable-detr"], "(did you mean deformable_detr?); there are "),
        (
            ["--recipe", "digit"],
            "no recipe digit (did you mean digits?): give a file or one of detr, ",
        ),
        (["--set", "train.schedule=cos"], "schedule must be one of step, cosine, got 'cos'"),
    ],
)
def test_a_slip_in_a_setting_is_understood(capsys, options, message):
    assert main(["options", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_train_then_evaluate_then_predict(coco, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", str(coco), "--output", str(run), *TRAIN, *SETTINGS]) == 0
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    recipe = {k.removeprefix("recipe "): v for k, v in checkpoint["identity"].items()}
    assert (recipe["accumulate"], recipe["ema_decay"]) == (2, 0.9) and "average" in checkpoint
    assert (recipe["lr"], recipe["backbone_lr"], recipe["clip_norm"]) == (2e-3, 2e-3, 0.5)
    assert "AP50" in capsys.readouterr().out
    model = str(run / "best.safetensors")
    card = read_card(model)
    assert card["transforms"] == "digits" and 0 <= card["threshold"] <= 1
    metrics, page = tmp_path / "metrics.json", tmp_path / "report.html"
    options = ["--split", "train", "--model", model, "--json", str(metrics), "--report", str(page)]
    assert main(["evaluate", str(coco), *options]) == 0
    printed = capsys.readouterr().out
    content = json.loads(metrics.read_text())
    assert f"AP{content['metrics']['ap']:31.3f}"[5:].strip() in printed
    assert content["threshold"] == pytest.approx(card["threshold"], abs=1e-4)
    assert page.read_text().count("<h2>") >= 4
    results = tmp_path / "found.json"
    options = ["--model", model, "--threshold", "0", "--pictures", str(tmp_path / "found")]
    images = [str(coco / "train" / "100.png"), str(coco / "train" / "101.png")]
    assert main(["predict", *images, *options, "--json", str(results)]) == 0
    first, second, _, both = capsys.readouterr().out.splitlines()  # no line for each of 36 boxes
    assert first.startswith(f"{images[0]}: 18 found: 6 ") and "best score 0." in first
    assert second.startswith(f"{images[1]}: 18 found: 6 ") and second.endswith("101.png")
    assert sorted(both.split(": ")[2].split(", ")) == ["12 blue", "12 green", "12 red"]
    for name in ("100.png", "101.png"):
        with Image.open(tmp_path / "found" / name) as picture:
            assert picture.size >= (64, 48)
    found = json.loads(results.read_text())
    assert len(found) == 36 and {result["image_id"] for result in found} == {100, 101}
    assert {result["category_id"] for result in found} == {3, 7, 20}


def test_evaluate_keeps_a_threshold(coco, model_file, capsys):
    arguments = ["evaluate", str(coco), "--model", str(model_file), "--keep-threshold"]
    update_card(model_file, threshold=0.9)
    assert main(arguments) == 0
    kept = read_card(model_file)["threshold"]
    assert kept != 0.9 and f"now has the threshold {kept:.3f}" in capsys.readouterr().out
    assert main(["evaluate", str(coco), "--model", str(model_file), "--threshold", "0.25"]) == 0
    assert "scores from 0.250 on" in capsys.readouterr().out


@pytest.mark.parametrize("merge", ["fusion", "nms"])
def test_several_views(coco, model_file, tmp_path, capsys, monkeypatch, merge):
    monkeypatch.chdir(tmp_path)
    options = ["--model", str(model_file), "--tta", "--tta-scales", "1", "1.5", "--merge", merge]
    assert main(["evaluate", str(coco), *options]) == 0
    assert "AP50" in capsys.readouterr().out
    results = tmp_path / "found.json"
    options += ["--json", str(results), "--threshold", "0"]
    assert main(["predict", str(coco / "val"), *options]) == 0
    found = json.loads(results.read_text())
    assert {result["image_id"] for result in found} == {100, 101, 102, 103}
    assert not Path("found").exists()


@pytest.mark.parametrize("named", [False, True])
def test_predict_passes_over_what_is_no_picture(coco, model_file, tmp_path, capsys, named):
    """In a folder and among files that are named: the others' results are written."""
    (coco / "val" / "000.png").write_bytes(b"no picture")
    images = sorted(map(str, (coco / "val").iterdir())) if named else [str(coco / "val")]
    results = tmp_path / "found.json"
    options = ["--output", str(tmp_path / "found"), "--json", str(results), "--threshold", "0"]
    assert main(["predict", *images, "--model", str(model_file), *options]) == 1
    assert capsys.readouterr().err.count("passed over: cannot read image") == 1
    assert len(list((tmp_path / "found").iterdir())) == 4
    found = json.loads(results.read_text())
    assert {result["image_id"] for result in found} == {100, 101, 102, 103}


def test_predict_leaves_what_it_found_before_ctrl_c(coco, model_file, tmp_path, monkeypatch):
    results = tmp_path / "found.json"
    results.write_text("before")
    options = ["--model", str(model_file), "--json", str(results), "--threshold", "0"]
    assert main(["predict", str(coco / "val"), *options, "--nms", "7"]) == 2
    assert results.read_text() == "before"  # nothing was done
    seen = []

    def describe(found, pictures):
        seen.append(found)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return ""

    monkeypatch.setattr(cli.predict, "describe", describe)
    assert main(["predict", str(coco / "val"), *options]) == 130
    assert {result["image_id"] for result in json.loads(results.read_text())} == {100, 101, 102}


def test_names_of_bytes_that_are_no_text(coco, model_file, tmp_path):
    """Latin-1 in a file's name, on a terminal of strict UTF-8."""
    image = tmp_path / os.fsdecode(b"caf\xe9.png")
    image.write_bytes((coco / "val" / "100.png").read_bytes())
    command = [sys.executable, "-m", "deformable_detr.cli", "predict", str(image)]
    command += ["--model", str(model_file), "--pictures", str(tmp_path / "found")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8:strict"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    assert "caf\\udce9.png: " in process.stdout


def test_what_cannot_be_written_is_said_at_the_start(coco, model_file, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    inside = tmp_path / "file" / "found.json"
    for command, option in (
        ("predict", "--json"),
        ("evaluate", "--json"),
        ("evaluate", "--report"),
    ):
        data = str(coco / "val" if command == "predict" else coco)
        for target, message in ((tmp_path, "is a folder"), (inside, "no folder that can be")):
            assert main([command, data, "--model", "not read yet", option, str(target)]) == 2
            assert message in capsys.readouterr().err


def test_a_drive_that_is_not_there_is_one_line(monkeypatch):
    """On Windows not even the last parent of a path need be there."""
    for name in ("exists", "is_dir"):
        monkeypatch.setattr(Path, name, lambda path: False)
    with pytest.raises(ValueError, match=r"cannot write .*found.json: .* no folder that can be"):
        refuse_targets(Path("a", "found.json"))
    with pytest.raises(NotADirectoryError, match=r"cannot be: .* is not there, expected a folder"):
        require_folder(Path("a", "b"))


@pytest.mark.parametrize("command", ["train", "tile", "predict", "convert"])
def test_a_file_in_the_place_of_a_folder_is_said_at_the_start(coco, tmp_path, capsys, command):
    file = tmp_path / "file"
    file.write_text("mine")
    for target, message in ((file, "is a file"), (file / "new", f"cannot be: {file} is a file")):
        arguments = {
            "train": ["train", str(coco), "--output", str(target), *TRAIN],
            "tile": ["tile", str(coco), "--side", "40", "--output", str(target)],
            "predict": ["predict", str(coco / "val"), "--output", str(target), "--model", "unread"],
            "convert": ["convert", str(coco), str(target)],
        }
        assert main(arguments[command]) == 2
        assert capsys.readouterr().err == f"error: {target} {message}, expected a folder\n"
    assert file.read_text() == "mine"


@pytest.mark.parametrize("command", ["sheet", "export"])
def test_a_folder_in_the_place_of_a_file_is_said_at_the_start(coco, model_file, capsys, command):
    folder = coco / "train.png"
    folder.mkdir()
    given = str(coco) if command == "sheet" else str(model_file)
    assert main([command, given, "--output", str(folder)]) == 2
    error = f"error: {folder} is a folder, expected the name of a file\n"
    assert capsys.readouterr().err == error


@pytest.mark.parametrize("command", ["check", "sheet", "doctor"])
def test_data_that_is_no_folder_is_one_short_line(tmp_path, capsys, command):
    nowhere, file = tmp_path / "nowhere", tmp_path / "file"
    file.write_text("")
    for data, text in ((nowhere, f"there is no folder {nowhere}"), (file, f"{file} is a file, ex")):
        assert main([command, str(data)]) == 2
        assert capsys.readouterr().err.startswith(f"error: {text}")


def test_help_is_there_at_once():
    """Nothing that takes seconds to import is needed to print one."""
    code = "import sys; from deformable_detr.cli.commands import build_parser; build_parser(); "
    code += "print(sorted({m.partition('.')[0] for m in sys.modules} & {'torch', 'numpy', 'PIL'}))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert printed == "[]\n"


def test_ctrl_c_while_the_library_is_imported(coco, capsys, monkeypatch):
    name = "deformable_detr.look.pictures"

    class Interrupt:
        def find_spec(self, wanted, *_):
            if wanted == name:
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupt(), *sys.meta_path])
    assert main(["sheet", str(coco)]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_what_the_views_show_is_merged_as_the_help_says(coco, model_file, capsys):
    with pytest.raises(SystemExit):
        main(["predict", "--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in MERGES)
    arguments = ["evaluate", str(coco), "--model", str(model_file), "--tta", "--merge", "mean"]
    assert main(arguments) == 2
    assert "merge must be one of fusion, nms, got 'mean'" in capsys.readouterr().err


def test_published_weights_see_the_classes_that_the_data_has(coco, tmp_path, capsys):
    """A model of more classes, in another order and with other ids, as 91 are to COCO's 80."""
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, num_classes=5)
    names = ["N/A", "blue", "cow", "red", "green"]
    path = tmp_path / "five.safetensors"
    save_model(DeformableDETR(config), path, [{"id": i, "name": n} for i, n in enumerate(names)])
    assert main(["evaluate", str(coco), "--model", str(path)]) == 0
    assert "AP of green" in capsys.readouterr().out
    run = tmp_path / "run"
    arguments = ["train", str(coco), "--output", str(run), "--init", str(path), *TRAIN]
    assert main(arguments) == 0
    assert "classes kept: red, green, blue\n" in capsys.readouterr().out  # found by their names
    model, categories = load_model(run / "last.safetensors")
    assert [category["id"] for category in categories] == [3, 7, 20]
    assert model.config == dataclasses.replace(TINY, num_classes=3)
    capsys.readouterr()
    assert main([*arguments, "--set", "model.refine=true"]) == 2
    assert "decides the model: leave out model.refine" in capsys.readouterr().err


def test_zeros_on_the_command_line_count(coco, tmp_path, capsys):
    run = tmp_path / "run"
    zeros = ["--seed", "0", "--patience", "0", "--ema-decay", "0"]
    recipe = tmp_path / "mine.toml"
    text = (RECIPES / "digits.toml").read_text()
    recipe.write_text(text.replace("[train]", "[train]\nseed = 9\npatience = 2\nema_decay = 0.5"))
    options = ["--recipe", str(recipe), *TRAIN[2:]]
    assert main(["train", str(coco), "--output", str(run), *options, *zeros]) == 0
    identity = torch.load(run / "checkpoint.pt", weights_only=True)["identity"]
    assert identity["recipe seed"] == identity["recipe ema_decay"] == 0
    assert main(["train", str(coco), "--output", str(run), *TRAIN, "--epochs", "0"]) == 2
    assert "must be at least 1" in capsys.readouterr().err


def test_a_run_says_how_it_sees_images(coco, tmp_path, capsys):
    """Its weights are evaluated at the size they were trained at, and resumed at no other."""
    run = tmp_path / "run"
    recipe = tmp_path / "mine.toml"
    text = (RECIPES / "digits.toml").read_text()
    recipe.write_text(text.replace('transforms = "digits"', 'transforms = "coco"'))
    arguments = ["train", str(coco), "--output", str(run), "--recipe", str(recipe), *TRAIN[2:]]
    assert main([*arguments, "--short-side", "64"]) == 0
    card = read_card(run / "best.safetensors")
    assert (card["transforms"], card["short_side"]) == ("coco", 64)
    assert main([*arguments, "--short-side", "96"]) == 2
    assert "data short_side was 64, is 96" in capsys.readouterr().err


def test_predict_never_replaces_an_image(coco, model_file, capsys):
    image = coco / "train" / "100.png"
    before = image.read_bytes()
    options = ["--model", str(model_file), "--pictures", str(image.parent)]
    assert main(["predict", str(image), *options]) == 2
    assert "a picture would replace" in capsys.readouterr().err and image.read_bytes() == before


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[...] DefaultCPUAllocator: can't allocate memory: 9\n")]
)
def test_memory_that_runs_out_is_one_line(coco, model_file, monkeypatch, capsys, error):
    monkeypatch.setattr(
        "deformable_detr.inference.predict.postprocess", lambda *_: (_ for _ in ()).throw(error)
    )
    assert main(["predict", str(coco / "val"), "--model", str(model_file)]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: out of memory")


def test_a_backend_that_is_not_there_is_one_line(model_file, coco, monkeypatch, capsys):
    monkeypatch.setenv("DEFORMABLE_DETR_BACKEND", "cuda")
    image = str(coco / "train" / "100.png")
    assert main(["predict", image, "--model", str(model_file)]) == 2
    assert capsys.readouterr().err == (
        "error: DEFORMABLE_DETR_BACKEND 'cuda' needs tensors on cuda, got cpu\n"
    )


def test_doctor(coco, capsys):
    options = ["--recipe", "digits", "--steps", "3", "--set", "model.num_queries=6"]
    assert main(["doctor", str(coco), *options]) == 1
    assert "fatal    6 training images are less than a batch of 8\n" in capsys.readouterr().out
    options.append("train.batch_size=2")
    assert main(["doctor", str(coco), *options]) == 0
    text = capsys.readouterr().out
    assert "ready to train" in text and "12 epochs of 3 steps" in text and "12 evaluations" in text
    path = coco / "annotations" / "train.json"
    content = json.loads(path.read_text())
    content["annotations"][1]["bbox"] = [300, 2, 5, 5]
    path.write_text(json.dumps(content))
    assert main(["doctor", str(coco), *options]) == 1
    told = capsys.readouterr().out
    assert "annotation 1001" in told
    assert told.endswith(f"all faults of the data: deformable-detr check {coco}\n")


@pytest.mark.parametrize("command", ["doctor", "sheet", "tile", "evaluate"])
def test_the_first_fault_says_where_all_are(coco, model_file, tmp_path, capsys, command):
    for split in ("train", "val"):
        path = coco / "annotations" / f"{split}.json"
        content = json.loads(path.read_text())
        content["annotations"][1]["bbox"] = [1, 2, 3]
        path.write_text(json.dumps(content))
    options = {
        "doctor": ["--recipe", "digits"],
        "sheet": ["--output", str(tmp_path / "sheet.png")],
        "tile": ["--output", str(tmp_path / "tiles"), "--side", "40"],
        "evaluate": ["--model", str(model_file)],
    }
    assert main([command, str(coco), *options[command]]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "annotation 1001: bbox must be" in error
    assert error.endswith(f"; all faults: deformable-detr check {coco}")
    assert not (tmp_path / "tiles").exists()


def test_sheet(coco, tmp_path, capsys):
    (coco / "train" / "103.png").write_bytes(b"no picture")
    target = tmp_path / "new" / "sheet.png"
    assert main(["sheet", str(coco), "--output", str(target), "--count", "5", "--seed", "1"]) == 0
    told = capsys.readouterr().out
    assert "5 of 6 images of train" in told
    assert f"1 of them cannot be read; all: deformable-detr check {coco}\n" in told
    with Image.open(target) as picture:
        assert picture.size == (4 * 384, 2 * 404)
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    assert {(0xE6, 0x9F, 0x00), (0x56, 0xB4, 0xE9)} <= colours  # boxes of the first two classes
    assert main(["sheet", str(coco), "--output", str(tmp_path / "sheet.txt")]) == 2
    assert "--output must end in one of .png" in capsys.readouterr().err
    assert main(["sheet", str(coco), "--output", str(target), "--count", "0"]) == 2
    assert "at least one image" in capsys.readouterr().err


def test_info(model_file, capsys):
    update_card(model_file, threshold=0.35)
    options = ["--model", str(model_file), "--size", "48", "64", "--repeats", "1"]
    assert main(["info", *options]) == 0
    text = capsys.readouterr().out
    for expected in ("3: red, green, blue", "0.35", "seconds per image", "num_queries         6"):
        assert expected in text


def test_predict_tells_images_of_one_name_apart(coco, model_file, tmp_path, capsys):
    images = [coco / split / "100.png" for split in ("train", "val")]
    for suffix in (".jpg", ".webp"):
        with Image.open(images[0]) as image:
            images.append(images[0].with_suffix(suffix))
            image.save(images[-1])
    options = ["--model", str(model_file), "--threshold", "0"]
    options += ["--output", str(tmp_path / "found"), "--json", str(tmp_path / "found.json")]
    assert main(["predict", *map(str, images), str(images[0]), *options]) == 0
    ids = {result["image_id"] for result in json.loads((tmp_path / "found.json").read_text())}
    assert ids == {"train/100.png", "val/100.png", "train/100.jpg", "train/100.webp"}
    pictures = sorted(path.name for path in (tmp_path / "found").iterdir())
    assert pictures == [
        "train_100.jpg.png",
        "train_100.png.png",
        "train_100.webp.png",
        "val_100.png.png",
    ]


def test_check_lists_faults_and_train_refuses(coco, tmp_path, capsys):
    assert main(["check", str(coco)]) == 0
    path = coco / "annotations" / "train.json"
    content = json.loads(path.read_text())
    content["annotations"][1]["category_id"] = 99
    content["annotations"][2]["bbox"][2] = -4
    path.write_text(json.dumps(content))
    assert main(["check", str(coco)]) == 1
    text = capsys.readouterr().out
    assert "train: boxes: 2 red, 2 green, 1 blue" in text
    assert "annotation 1001: unknown category 99" in text
    assert "annotation 1002: box of no size" in text and "2 of them fatal" in text
    assert main(["train", str(coco), "--output", str(tmp_path / "run"), *TRAIN]) == 2
    error = capsys.readouterr().err
    assert "annotation 1001" in error and "2 fatal faults" in error
    assert not (tmp_path / "run").exists()


def test_data_without_a_box_is_not_trained_on(coco, model_file, tmp_path, capsys):
    """Nor validated on; but it can be evaluated on, for what is found there."""
    path = coco / "annotations" / "val.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"annotations": []}))
    assert main(["check", str(coco)]) == 1
    text = capsys.readouterr().out
    assert "train: 6 images, 1 of them without boxes; 5 boxes" in text
    assert "val: FATAL: no image has a box" in text
    assert main(["train", str(coco), "--output", str(tmp_path / "run"), *TRAIN]) == 2
    assert "val: FATAL: no image has a box" in capsys.readouterr().err
    assert main(["evaluate", str(coco), "--model", str(model_file)]) == 0
    assert "n/a" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["duplicate id", "box outside", "unknown image"])
def test_evaluate_refuses_what_train_does(coco, model_file, capsys, kind):
    def change(content):
        if kind == "duplicate id":
            content["categories"].append(content["categories"][0])
        elif kind == "box outside":
            content["annotations"][0]["bbox"] = [300, 2, 5, 5]
        else:
            content["annotations"][0]["image_id"] = 5

    path = coco / "annotations" / "val.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    assert main(["evaluate", str(coco), "--model", str(model_file)]) == 2
    error = capsys.readouterr().err
    assert "val: FATAL: " in error and " in the data; all of them: deformable-detr check" in error


def test_errors_are_one_line(coco, model_file, tmp_path, capsys):
    image = tmp_path / "bad.png"
    image.write_bytes(b"no picture")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(model_file.read_bytes()[:5000])
    cases = [
        (["predict", str(tmp_path / "no.png"), "--model", str(model_file)], "no image at"),
        (["predict", str(image), "--model", str(image)], "not a readable file of weights"),
        (["predict", str(image), "--model", str(broken)], "not a readable safetensors file"),
        (["predict", str(image), "--model", str(model_file), "--threshold", "2"], "in [0, 1]"),
        (["evaluate", str(tmp_path), "--model", str(model_file)], "no val annotations"),
        (["check", str(tmp_path)], "no train annotations"),
        (
            ["predict", str(coco / "annotations"), "--model", str(model_file)],
            "no image in the folder",
        ),
        (["predict", str(image), "--model", "nobody"], "no file or folder nobody"),
        (["info", "--model", str(model_file), "--device", "abacus"], "no device abacus"),
        (["info", "--model", str(model_file), "--device", "meta"], "no device meta"),
        (["predict", str(image), "--model", str(model_file), "--tiles", "3"], "tiles must have"),
        (["info", "--model", str(model_file), "--size", "0", "9"], "must be at least 1"),
        (["doctor", str(coco), "--recipe", "cake"], "no recipe cake"),
        (["evaluate", str(coco), "--model", str(model_file), "--tta-scales", "2"], "needs --tta"),
        (["evaluate", str(coco), "--model", str(model_file), "--merge", "nms"], "--merge needs"),
        (["train", str(coco), "--output", "x", *TRAIN, "--short-side", "8"], "at least 32"),
        (
            ["evaluate", str(coco), "--keep-threshold", "--model", "some/hub"],
            "needs a .safetensors",
        ),
        (
            ["evaluate", str(coco), "--model", str(model_file), "--tta", "--tta-scales", "0"],
            "numbers above 0",
        ),
        (
            ["predict", str(image), "--model", str(model_file), "--tta", "--tta-scales", "1e9"],
            "numbers above 0 and up to 8",
        ),
        (
            ["train", str(coco), "--output", "x", *TRAIN, "--backbone-weights", "imagenet"],
            "the small backbone has neither",
        ),
        (
            ["train", str(coco), "--output", str(tmp_path / "x"), "--set", "model.backbone=vgg"],
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


def test_imagenet_weights_that_do_not_come(coco, tmp_path, capsys, monkeypatch):
    def refuse(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torchvision.models, "get_model", refuse)
    arguments = ["train", str(coco), "--output", str(tmp_path / "run")]
    assert main([*arguments, "--set", "model.backbone=resnet18"]) == 2
    error = capsys.readouterr().err.strip()
    assert "ImageNet weights of resnet18 did not come" in error and "\n" not in error


def test_a_full_disk(coco, model_file, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    monkeypatch.setattr(os, "fsync", full)
    target, file = str(tmp_path / "new"), str(tmp_path / "file")
    for arguments in (
        ["predict", str(coco / "val"), "--model", str(model_file), "--pictures", target],
        ["predict", str(coco / "val"), "--model", str(model_file), "--json", file],
        ["evaluate", str(coco), "--model", str(model_file), "--report", file],
        ["evaluate", str(coco), "--model", str(model_file), "--keep-threshold"],
        ["sheet", str(coco), "--output", f"{target}.png"],
        ["train", str(coco), "--output", target, *TRAIN],
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and "No space left on device" in error
    assert "threshold" not in read_card(model_file)  # and it is still whole


def test_out_of_memory_and_ctrl_c(model_file, capsys, monkeypatch):
    for error, code, message in (
        (torch.OutOfMemoryError("CUDA out of memory.\nMore"), 2, "error: out of memory: CUDA out"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr("deformable_detr.evaluation.complexity.complexity", fail)
        assert main(["info", "--model", str(model_file)]) == code
        text = capsys.readouterr().err.strip()
        assert text.startswith(message) and "\n" not in text


def test_a_reader_that_leaves(coco):
    """deformable-detr check DATA | head -0"""
    command = [sys.executable, "-m", "deformable_detr.cli", "check", str(coco)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(timeout=60) == 141
    process.stderr.close()


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
    arguments[-1] = "399"  # the checkpoint is found, and refused as of another recipe
    assert main(arguments) == 2
    assert "of this run with 400 epochs" in capsys.readouterr().err
