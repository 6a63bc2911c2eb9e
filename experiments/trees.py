"""Crowns of trees in aerial pictures: what each remedy is worth, in a forest elsewhere.

    python experiments/trees.py

A data set that is not the digits': two pictures (data/trees), cut into tiles of 128 pixels. Chapter
your_own_data reads the table.
"""

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from study import RUNS, Study, row
from study import main as run

from deformable_detr.data.coco import CocoDataset, find_split
from deformable_detr.data.tiles import tile_dataset
from deformable_detr.data.voc import convert_voc
from deformable_detr.evaluation.coco import predict_dataset, score
from deformable_detr.models import DEFAULT, MODELS, BaseDetector
from deformable_detr.training.loop import train
from deformable_detr.training.recipe import load_recipe
from deformable_detr.weights.published import load_pretrained

ROOT = Path(__file__).parents[1]
TREES, TILES = ROOT / "data" / "trees", RUNS / "trees"
DETECTOR = ROOT / "data" / "checkpoints" / "digits.safetensors"
SIDE, PER_EPOCH = 128, 58  # pixels of a tile; steps of 8 tiles
FIGURES = ("ap", "ap50", "ar")


@dataclass(frozen=True)
class Remedy:
    """A way to train: from which weights, for how many epochs, on which part of the tiles."""

    start: str = "digits"
    epochs: int = 5
    part: float = 1.0


def make_tiles() -> Path:
    """The data set of tiles, made once."""
    if not (TILES / "annotations" / "test.json").exists():
        whole = TILES.with_name("trees-whole")
        for folder in (whole, TILES):
            shutil.rmtree(folder, ignore_errors=True)
        convert_voc(TREES, whole)
        for split in ("train", "val", "test"):
            place = TILES / split, TILES / "annotations" / f"{split}.json"
            tile_dataset(find_split(whole, split), place, SIDE, progress=False)
    return TILES


def build(remedy: Remedy, seed: int) -> BaseDetector:
    """A new model of the recipe `photos`, or the digits' detector with a head for trees."""
    torch.manual_seed(seed)
    if remedy.start == "digits":
        return load_pretrained(DETECTOR, num_classes=1, num_queries=100).model
    recipe = load_recipe("photos")
    return MODELS[recipe.model.get("name", DEFAULT)][1](recipe.model_config(1))


def train_on_trees(remedy: Remedy, seed: int, folder: Path) -> list[dict]:
    """The rows of one training."""
    tiles, recipe = make_tiles(), load_recipe("photos").at_short_side(SIDE)
    options = dataclasses.replace(recipe.train, epochs=remedy.epochs, batch_size=8, seed=seed)
    learned = CocoDataset(*find_split(tiles, "train"), recipe.train_transform())
    order = torch.randperm(len(learned), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = order[: round(remedy.part * len(order))]
    learned.image_ids = [learned.image_ids[i] for i in sorted(chosen)]
    model = build(remedy, seed)
    train(model, learned, None, folder / "run", options, progress=False)
    (folder / "run" / "checkpoint.pt").unlink()
    rows = []
    for split in ("val", "test"):
        held = CocoDataset(*find_split(tiles, split), recipe.eval_transform())
        found = score(predict_dataset(model, held, progress=False), held).to_dict()
        rows += [row(split, remedy.epochs, name, found[name]) for name in FIGURES]
    return rows


STUDY = Study(
    name="trees",
    question="AP on trees from the air, in a forest 13 km away: what is each remedy worth?",
    configurations={
        "from nothing": Remedy(start="nothing"),
        "from the digits' detector": Remedy(),
        "a quarter of the tiles": Remedy(part=0.25, epochs=20),
    },
    seeds=(0, 1, 2),
    trial=train_on_trees,
    usual=200,
)


def main() -> None:
    """The command."""
    run(("trees",))


if __name__ == "__main__":
    main()
