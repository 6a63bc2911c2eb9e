"""Each member's recipe for the digits: a training of one step, by the ordinary command."""

import json

import pytest

from deformable_detr.cli import main
from deformable_detr.models import MODELS
from deformable_detr.training.recipe import load_recipe
from deformable_detr.training.recipes import NAMES
from deformable_detr.weights.ours import load_model
from tests.conftest import write_coco

RECIPES = {
    recipe.model["name"]: name
    for name in NAMES
    if name.startswith("digits-") and "name" in (recipe := load_recipe(name)).model
}


def test_every_member_has_a_recipe():
    assert RECIPES.keys() == MODELS.keys() - {"deformable_detr"}


@pytest.mark.parametrize("member", sorted(MODELS.keys() - {"deformable_detr"}))
def test_a_recipe_trains_and_its_model_detects(member, tmp_path):
    root, out = tmp_path / "data", tmp_path / "run"
    write_coco(root, images=8, side=64)
    write_coco(root, "val", images=2, side=64)
    arguments = ["train", str(root), "--output", str(out), "--recipe", RECIPES[member]]
    assert main([*arguments, "--epochs", "1", "--evaluate-every", "1"]) == 0
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert any("loss" in line for line in log) and any("val" in line for line in log)
    weights, picture = out / "last.safetensors", next((root / "val").glob("*.png"))
    model, _ = load_model(weights)
    assert type(model) is MODELS[member][1] and model.config.embed_dim == 64
    arguments = ["predict", str(picture), "--model", str(weights), "--threshold", "0"]
    assert main([*arguments, "--json", str(tmp_path / "found.json")]) == 0
    assert json.loads((tmp_path / "found.json").read_text())
