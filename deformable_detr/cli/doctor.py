"""deformable-detr doctor"""

import argparse

from deformable_detr.cli.arguments import (
    DATA_HELP,
    SET_HELP,
    WEIGHTS_HELP,
    add_command,
    add_data,
    add_device,
    add_start,
)


def add(commands: argparse.Action) -> None:
    """Its arguments."""
    command = add_command(
        commands,
        "doctor",
        run,
        "test data and model in a minute or two before hours are spent, by learning one batch by "
        "heart",
        "data/digits --recipe digits",
        DATA_HELP,
        WEIGHTS_HELP,
        SET_HELP,
        "Exit code 1 if a fault is fatal.",
    )
    add_data(command, "train")
    add_start(command)
    command.add_argument("--steps", type=int, default=150, help="at most (default: %(default)s)")
    add_device(command)


def run(args: argparse.Namespace) -> int:
    """Print a diagnosis of data and model."""
    from deformable_detr.cli.beforehand import choose_device, pointing_to_check
    from deformable_detr.cli.starting import chosen_recipe, new_model
    from deformable_detr.data.annotations import read_annotations
    from deformable_detr.data.coco import CocoDataset
    from deformable_detr.data.places import find_split, has_split
    from deformable_detr.training.doctor import doctor

    recipe = chosen_recipe(args)
    with pointing_to_check(args.data):
        dataset = CocoDataset(*find_split(args.data, args.split))
    model, recipe, notes = new_model(args, recipe, dataset)
    print(*notes, sep="\n", end="\n" * bool(notes))
    dataset.transform = recipe.train_transform()
    val_images = 0
    if has_split(args.data, "val"):
        val_images = len(read_annotations(find_split(args.data, "val")[1])["images"])
    model.to(choose_device(args.device))
    diagnosis = doctor(model, dataset, args.steps, config=recipe.train, val_images=val_images)
    print(diagnosis.table())
    if diagnosis.healthy:
        return 0
    print(f"all faults of the data: deformable-detr check {args.data}")
    return 1
