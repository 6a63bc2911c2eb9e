"""What a training starts from: recipes of any editor, image sizes, weights and what they saw."""

import dataclasses

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from deformable_detr import DeformableDETR
from deformable_detr.cli import main
from deformable_detr.cli.starting import prepared_alike
from deformable_detr.inference.detector import read_card
from deformable_detr.training.recipe import load_recipe
from deformable_detr.training.recipes import FOLDER, NAMES
from deformable_detr.weights.ours import load_model, save_model
from tests.conftest import TINY

CATEGORIES = [{"id": 3, "name": "red"}, {"id": 7, "name": "green"}, {"id": 20, "name": "blue"}]
TRAIN = ["--recipe", "photos", "--epochs", "1", "--batch-size", "2"]


def test_a_recipe_may_begin_with_a_byte_order_mark(tmp_path):
    """As some of Windows' editors write it."""
    path = tmp_path / "own.toml"
    path.write_bytes(b"\xef\xbb\xbf" + (FOLDER / "photos.toml").read_bytes())
    assert load_recipe(path).train == load_recipe("photos").train


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_takes_a_short_side(name):
    recipe = load_recipe(name).at_short_side(96)
    picture = torch.zeros(3, 48, 64, dtype=torch.uint8)
    assert recipe.eval_transform()(picture).shape == (3, 96, 128)
    assert recipe.train_transform()(picture).shape[0] == 3


def test_a_short_side_travels_with_the_weights_of_a_recipe_that_has_none(coco, tmp_path, capsys):
    run = tmp_path / "run"
    options = ["--recipe", "digits", *TRAIN[2:], "--short-side", "64"]
    assert main(["train", str(coco), "--output", str(run), *options]) == 0
    card = read_card(run / "best.safetensors")
    assert (card["transforms"], card["short_side"]) == ("digits-resized", 64)
    assert main(["train", str(coco), "--output", str(run), *options[:-2]]) == 2
    error = capsys.readouterr().err  # and none of a short side of 800, which nothing ever had
    assert "data transforms was 'digits-resized', is 'digits'. Give" in error


@pytest.mark.parametrize(
    ("card", "may_change", "short_side", "said"),
    [
        ({}, True, 240, ""),  # nothing is known of published weights
        ({"transforms": "coco", "short_side": 240}, True, 240, ""),
        ({"transforms": "coco", "short_side": 480}, True, 480, "of 480 pixels, which is kept"),
        ({"transforms": "coco", "short_side": 480}, False, 240, "480 pixels, and goes on at 240"),
        (
            {"transforms": "digits", "short_side": 800},
            True,
            240,
            "'digits', and goes on with 'coco'",
        ),
        ({"transforms": "coco", "short_side": "480"}, True, 240, ""),
        ({"transforms": ["coco"]}, True, 240, ""),
    ],
)
def test_weights_bring_the_size_of_images_they_have_seen(card, may_change, short_side, said):
    recipe, lines = prepared_alike(load_recipe("photos"), card, may_change)
    assert recipe.short_side == short_side
    assert len(lines) == bool(said) and said in "".join(lines)


def test_train_says_and_keeps_the_size_that_weights_have_seen(coco, tmp_path, capsys):
    torch.manual_seed(0)
    weights, run = tmp_path / "weights.safetensors", tmp_path / "run"
    card = {"transforms": "coco", "short_side": 64}
    save_model(DeformableDETR(TINY), weights, CATEGORIES, card)
    arguments = ["train", str(coco), "--output", str(run), "--init", str(weights), *TRAIN]
    assert main(arguments) == 0
    told = capsys.readouterr()
    line = f"{weights}: trained at a short side of 64 pixels, which is kept; the recipe would have "
    assert f"{line}240 (--short-side)" in told.out
    assert (told.out + told.err).count("classes kept: red, green, blue") == 1
    assert read_card(run / "last.safetensors")["short_side"] == 64
    assert main([*arguments, "--epochs", "2"]) == 0
    told = capsys.readouterr()
    assert "continued from step" in told.out and "kept" not in told.out + told.err


def test_nothing_is_said_of_weights_where_nothing_is_trained(coco, tmp_path, capsys):
    weights = tmp_path / "weights.safetensors"
    save_model(DeformableDETR(TINY), weights, [*CATEGORIES[:2], {"id": 4, "name": "b"}])
    options = ["--output", str(tmp_path / "run"), "--init", str(weights), *TRAIN[:-1], "50"]
    assert main(["train", str(coco), *options]) == 2
    told = capsys.readouterr()
    assert told.err.splitlines() == ["error: 6 training images are less than a batch of 50"]
    assert told.out == ""


def test_options_that_change_no_tensor_go_with_any_weights(coco, tmp_path, capsys):
    weights, run = tmp_path / "weights.safetensors", tmp_path / "run"
    save_model(DeformableDETR(TINY), weights, CATEGORIES)
    arguments = ["train", str(coco), "--output", str(run), "--init", str(weights), *TRAIN, "--set"]
    assert main([*arguments, "model.exact_padding=true", "model.dropout=0.25"]) == 0
    config = load_model(run / "last.safetensors")[0].config
    assert config == dataclasses.replace(TINY, exact_padding=True, dropout=0.25)
    assert main([*arguments, "model.exact_padding=true", "model.ffn_dim=64", "--fresh"]) == 2
    assert "decides the model: leave out model.ffn_dim\n" in capsys.readouterr().err


def test_a_recipe_whose_weights_do_not_come_says_what_to_do(coco, tmp_path, capsys, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    arguments = ["train", str(coco), "--output", str(tmp_path / "run"), "--recipe", "small-data"]
    assert main([*arguments, "--batch-size", "2"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.endswith("(--init FOLDER). Without weights and network: --recipe photos")
    assert "\n" not in error


@pytest.mark.parametrize("spoil", ["missing", "text", "nan", "other"])
def test_weights_of_a_backbone_are_read_with_care(coco, tmp_path, capsys, spoil):
    path = tmp_path / "backbone.safetensors"
    state = DeformableDETR(TINY).backbone.state_dict()
    name = next(name for name, x in state.items() if x.is_floating_point())
    if spoil == "text":
        path.write_text("no weights")
    elif spoil != "missing":
        state[name if spoil == "nan" else "else"] = state[name] * torch.nan
        save_file(state, path)
    arguments = ["train", str(coco), "--output", str(tmp_path / "run"), *TRAIN]
    assert main([*arguments, "--backbone-weights", str(path)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    expected = {
        "missing": f"no model at {path}",
        "text": f"{path} is not a readable safetensors file",
        "nan": f"{path}: tensor {name} has a number that is NaN or infinite",
        "other": f"{path}: tensor else has a number that is NaN",
    }
    assert error.startswith(f"error: {expected[spoil]}")
