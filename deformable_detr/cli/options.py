"""deformable-detr options"""

import argparse
import json
import textwrap

from deformable_detr.cli.arguments import SET_HELP, add_command, add_recipe
from deformable_detr.options import help_of

COLUMN, WIDTH = 36, 100  # where the help begins, and where its lines end


def add(commands: argparse.Action) -> None:
    """Its arguments."""
    command = add_command(
        commands,
        "options",
        run,
        "list all options of a recipe's training and of its model, with their values and help",
        "--recipe digits --set model.two_stage=false",
        SET_HELP,
    )
    add_recipe(command)


def run(args: argparse.Namespace) -> int:
    """Print each option as --set takes it."""
    from deformable_detr.models import MODELS, model_name
    from deformable_detr.training.recipe import load_recipe

    recipe = load_recipe(args.recipe).changed(args.set)
    model = recipe.model_config(num_classes=1)
    print(f"recipe {recipe.name}: {recipe.about}")
    print(line("model.name", model_name(model), f"one of {', '.join(MODELS)}"))
    for table, config in (("model", model), ("train", recipe.train)):
        for name, text in help_of(config).items():
            if name != "num_classes":  # the data's
                print(line(f"{table}.{name}", getattr(config, name), text))
    return 0


def line(name: str, value: object, text: str) -> str:
    """An option in two columns; the second one as long as it must be."""
    shown = value if isinstance(value, str) else "none" if value is None else json.dumps(value)
    setting = f"{name}={shown}"
    filled = textwrap.wrap(text, WIDTH - COLUMN) or [""]
    return f"\n{' ' * COLUMN}".join([f"{setting:{COLUMN - 1}} {filled[0]}", *filled[1:]])
