"""Is a member of the family the better detector, where it is trained as long as the shipped one?

    python experiments/as_long.py

Efficient DETR, which is ahead of the base after 300 steps with rates of their own; for as many
epochs as the two seeds of experiments/digits.py in their first round, at the same rate.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from detectors import DATA, FIGURES
from digits import BACKBONE, ROUNDS, load_split
from safetensors.torch import load_file
from study import Study, row
from study import main as run

from deformable_detr.data.transforms import digits_eval_transform, digits_train_transform
from deformable_detr.evaluation.coco import evaluate
from deformable_detr.models import build_model
from deformable_detr.training.loop import train
from deformable_detr.training.recipe import load_recipe

EPOCHS = ROUNDS[0].epochs


@dataclass(frozen=True)
class Member:
    """A recipe, and for how many epochs."""

    recipe: str
    epochs: int = EPOCHS


def train_member(member: Member, seed: int, folder: Path) -> list[dict]:
    """The rows of one training: all metrics on test."""
    recipe = load_recipe(member.recipe)
    torch.manual_seed(seed)
    model = build_model(recipe.model_config(num_classes=10))
    model.backbone.load_state_dict(load_file(BACKBONE))
    options = dataclasses.replace(recipe.train, epochs=member.epochs, seed=seed, evaluate_every=2)
    train_set = load_split("train", digits_train_transform())
    val_set = load_split("val", digits_eval_transform())
    train(model, train_set, val_set, folder / "run", options, progress=False)
    test_set = load_split("test", digits_eval_transform())
    figures = evaluate(model.eval(), test_set, progress=False).to_dict()
    return [row("test", member.epochs, name, figures[name]) for name in FIGURES]


STUDY = Study(
    name="as_long",
    question="AP on test of Efficient DETR after the epochs of the shipped detector's first round",
    configurations={"Efficient DETR": Member("digits-efficient-detr")},
    seeds=(0,),
    trial=train_member,
    usual=5400,
    data=DATA,
)


def main() -> None:
    """The command."""
    run(("as_long",))


if __name__ == "__main__":
    main()
