"""deformable-detr train"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from deformable_detr.cli.arguments import (
    DATA_HELP,
    SET_HELP,
    WEIGHTS_HELP,
    add_command,
    add_data,
    add_start,
    add_train_options,
)
from deformable_detr.training.config import TrainConfig

if TYPE_CHECKING:
    from deformable_detr.data.coco import CocoDataset


def add(commands: argparse.Action) -> None:
    """Its arguments."""
    command = add_command(
        commands,
        "train",
        run,
        "train a detector, or continue a training that was stopped",
        "data/digits --output runs/first --recipe digits",
        DATA_HELP,
        WEIGHTS_HELP,
        SET_HELP,
        "On several GPUs or machines: accelerate launch -m deformable_detr.cli train ...",
    )
    add_data(command)
    command.add_argument(
        "--output", type=Path, required=True, help="folder of this run: model, log, checkpoint"
    )
    add_start(command)
    command.add_argument(
        "--fresh", action="store_true", help="start anew where --output holds a checkpoint"
    )
    add_train_options(command)


def run(args: argparse.Namespace) -> int:
    """Train, then store the best threshold on val with the models."""
    import torch

    from deformable_detr.cli.beforehand import refuse_faults
    from deformable_detr.cli.starting import chosen_recipe, new_model
    from deformable_detr.data.coco import CocoDataset, find_split, has_split
    from deformable_detr.training import loop
    from deformable_detr.training.processes import make_accelerator

    has_val = has_split(args.data, "val")
    accelerator = make_accelerator()
    refuse_faults(args.data, ("train", "val") if has_val else ("train",), accelerator)
    recipe = chosen_recipe(args)
    train_set = CocoDataset(*find_split(args.data, "train"), recipe.train_transform())
    val_set = None
    if has_val:
        val_set = CocoDataset(*find_split(args.data, "val"), recipe.eval_transform())
    torch.manual_seed(recipe.train.seed)
    model = new_model(args, recipe, train_set)
    card = {"transforms": recipe.transforms, "short_side": recipe.short_side}
    metrics = loop.train(
        model, train_set, val_set, args.output, recipe.train, not args.fresh, card=card
    )
    if accelerator.is_main_process:
        if metrics:
            print(metrics)
        finish(args.output, val_set, recipe.train)
    return 0


def finish(folder: Path, val_set: "CocoDataset | None", config: TrainConfig) -> None:
    """Store with the models of a run the best threshold on val."""
    from deformable_detr.cli.beforehand import choose_device
    from deformable_detr.evaluation.report import analyse
    from deformable_detr.inference.detector import load_detector, update_card

    for path in (folder / "last.safetensors", folder / "best.safetensors"):
        if not path.exists():
            continue
        text = "no val split to choose the best weights and a threshold on"
        if val_set:
            model = load_detector(path).model.to(choose_device(None))
            found = analyse(model, val_set, config.batch_size, threshold=None, top_k=config.top_k)
            update_card(path, threshold=found.threshold)
            text = f"best threshold on val {found.threshold:.3f}"
        print(f"model: {path}, {text}")
