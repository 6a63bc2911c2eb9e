"""What a training starts from: recipes of any editor, image sizes, weights and what they saw."""

import pytest
import torch

from deformable_detr import DeformableDETR
from deformable_detr.cli import main
from deformable_detr.cli.starting import prepared_alike
from deformable_detr.inference.detector import read_card
from deformable_detr.training.recipe import load_recipe
from deformable_detr.training.recipes import FOLDER, NAMES
from deformable_detr.weights.ours import save_model
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


def test_a_short_side_travels_with_the_weights_of_a_recipe_that_has_none(coco, tmp_path):
    run = tmp_path / "run"
    options = ["--recipe", "digits", *TRAIN[2:], "--short-side", "64"]
    assert main(["train", str(coco), "--output", str(run), *options]) == 0
    card = read_card(run / "best.safetensors")
    assert (card["transforms"], card["short_side"]) == ("digits-resized", 64)


@pytest.mark.parametrize(
    ("card", "may_change", "short_side", "said"),
    [
        ({}, True, 240, ""),  # nothing is known of published weights
        ({"transforms": "coco", "short_side": 240}, True, 240, ""),
        ({"transforms": "coco", "short_side": 480}, True, 480, "480 pixels, as they are here too"),
        ({"transforms": "coco", "short_side": 480}, False, 240, "of 480 pixels, not of 240"),
        ({"transforms": "digits", "short_side": 800}, True, 240, "prepared as 'digits', and here"),
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
    assert f"{weights}: they have seen images of a short side of 64" in capsys.readouterr().err
    assert read_card(run / "last.safetensors")["short_side"] == 64
