"""deformable-detr train"""

import argparse
import sys
from pathlib import Path

from deformable_detr.cli.arguments import (
    DATA_HELP,
    SET_HELP,
    WEIGHTS_HELP,
    add_command,
    add_data,
    add_start,
    add_train_options,
)

WATCH_HELP = """\
OUTPUT/curves.png is a picture of losses and AP; tensorboard --logdir OUTPUT shows them live.
Ctrl-C, SIGTERM and SIGHUP end a training after its step, which is saved: the same command goes on
from there, and with a larger --epochs also after the end."""


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
        WATCH_HELP,
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
    """Train, and print the figures of the last weights."""
    import torch

    from deformable_detr.cli.beforehand import refuse_faults
    from deformable_detr.cli.starting import chosen_recipe, new_model
    from deformable_detr.data.coco import CocoDataset
    from deformable_detr.data.places import training_splits, without_val
    from deformable_detr.files import require_folder
    from deformable_detr.training.loop import train
    from deformable_detr.training.processes import make_accelerator

    require_folder(args.output)
    splits = training_splits(args.data)
    recipe = chosen_recipe(args)
    accelerator = make_accelerator()
    main = accelerator.is_main_process
    if main and (text := without_val(args.data)):
        print(text, file=sys.stderr)
    refuse_faults(args.data, splits, accelerator)
    datasets = {split: CocoDataset(*place) for split, place in splits.items()}
    torch.manual_seed(recipe.train.seed)
    model, recipe, notes = new_model(args, recipe, datasets["train"])
    datasets["train"].transform = recipe.train_transform()
    if val_set := datasets.get("val"):
        val_set.transform = recipe.eval_transform()
    card = {"transforms": recipe.transforms, "short_side": recipe.short_side}
    options = {"resume": not args.fresh, "card": card, "notes": notes}
    metrics = train(model, datasets["train"], val_set, args.output, recipe.train, **options)
    if main and metrics:
        print(f"\n{args.output / 'last.safetensors'}:\n{metrics}")
    return 0
