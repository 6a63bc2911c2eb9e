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
from study import RUNS, Place, Study, row
from study import main as run

from deformable_detr.data.coco import CocoDataset, find_split
from deformable_detr.data.preparation import PREPARATIONS
from deformable_detr.data.tiles import tile_dataset
from deformable_detr.data.voc import convert_voc
from deformable_detr.evaluation.coco import predict_dataset, score
from deformable_detr.evaluation.report import analyse
from deformable_detr.files import write_json
from deformable_detr.models import DEFAULT, MODELS, BaseDetector
from deformable_detr.provenance import checksum, provenance
from deformable_detr.training.loop import train
from deformable_detr.training.recipe import load_recipe
from deformable_detr.weights.ours import load_model, save_model
from deformable_detr.weights.published import load_pretrained

ROOT = Path(__file__).parents[1]
TREES, TILES = ROOT / "data" / "trees", RUNS / "trees"
DETECTOR = ROOT / "data" / "checkpoints" / "digits.safetensors"
WEIGHTS = DETECTOR.with_name("trees.safetensors")
SIDE, PER_EPOCH = 128, 58  # pixels of a tile; steps of 8 tiles
FIGURES = ("ap", "ap50", "ar")


@dataclass(frozen=True)
class Remedy:
    """A way to train: from which weights, for how many epochs, on which part of the tiles, and
    whether their colours change as the digits' do."""

    start: str = "nothing"
    epochs: int = 5
    part: float = 1.0
    colours: bool = False


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


def training_set(remedy: Remedy, seed: int) -> CocoDataset:
    """The tiles that it learns from."""
    recipe = load_recipe("photos").at_short_side(SIDE)
    transform = PREPARATIONS["digits"].train_transform(SIDE) if remedy.colours else None
    tiles = CocoDataset(*find_split(make_tiles(), "train"), transform or recipe.train_transform())
    order = torch.randperm(len(tiles), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = order[: round(remedy.part * len(order))]
    tiles.image_ids = [tiles.image_ids[i] for i in sorted(chosen)]
    return tiles


def fit(remedy: Remedy, learned: CocoDataset, seed: int, folder: Path) -> BaseDetector:
    """The model after its training on those tiles; its weights stay in the folder."""
    options = load_recipe("photos").at_short_side(SIDE).train
    options = dataclasses.replace(options, epochs=remedy.epochs, batch_size=8, seed=seed)
    model = build(remedy, seed)
    train(model, learned, None, folder / "run", options, progress=False)
    (folder / "run" / "checkpoint.pt").unlink()
    return model


def held_out(split: str) -> CocoDataset:
    """The tiles of val or test, as the model sees them."""
    transform = load_recipe("photos").at_short_side(SIDE).eval_transform()
    return CocoDataset(*find_split(make_tiles(), split), transform)


def describe(remedy: Remedy) -> dict:
    """What makes two trials the same, the weights that they start from too."""
    weights = {"weights": checksum(DETECTOR)} if remedy.start == "digits" else {}
    return dataclasses.asdict(remedy) | weights


def train_on_trees(remedy: Remedy, seed: int, folder: Path) -> list[dict]:
    """The rows of one training."""
    model = fit(remedy, training_set(remedy, seed), seed, folder)
    rows = []
    for split in ("val", "test"):
        found = score(predict_dataset(model, held_out(split), progress=False), held_out(split))
        figures = found.to_dict()
        rows += [row(split, remedy.epochs, name, figures[name]) for name in FIGURES]
    return rows


STUDY = Study(
    name="trees",
    question="AP on trees from the air, in a forest 13 km away: what is each remedy worth?",
    configurations={
        "from nothing": Remedy(),
        "from the digits' detector": Remedy(start="digits"),
        "a quarter of the tiles, as many steps": Remedy("digits", part=0.25, epochs=20),
        "other colours": Remedy(colours=True),
        "three times as long": Remedy(epochs=15),
        "three times as long, other colours": Remedy(epochs=15, colours=True),
    },
    seeds=(0, 1),
    trial=train_on_trees,
    describe=describe,
    usual=125,
    seconds={"three times as long": 350, "three times as long, other colours": 350},
)


def ship(name: str = "three times as long", seed: int = 0) -> None:
    """The weights that were best on val, with the threshold of the best F1 there, as
    data/checkpoints/trees.safetensors."""
    place = Place(STUDY, name, seed)
    model, _ = load_model(place.folder / "run" / "last.safetensors")
    recipe = load_recipe("photos").at_short_side(SIDE)
    val = held_out("val")
    threshold = analyse(model, val, threshold=None, progress=False).threshold
    card = {"threshold": threshold, "transforms": recipe.transforms, "short_side": SIDE}
    save_model(model, WEIGHTS, val.categories, card)
    found = {f"{row['split']} {row['metric']}": row["value"] for row in place.result()["rows"]}
    about = provenance("python experiments/trees.py", ("torchvision",))
    write_json(WEIGHTS.with_suffix(".json"), about | {"trained": name, "seed": seed} | found)


def main() -> None:
    """The command: the study, and then the weights that a chapter looks at."""
    run(("trees",))
    ship()


if __name__ == "__main__":
    main()
