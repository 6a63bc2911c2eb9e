"""Arguments that several commands share. Nothing here imports torch: a --help is there at once."""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from deformable_detr.options import help_of, meant, plain_type, types_of
from deformable_detr.training.config import TrainConfig
from deformable_detr.training.recipes import NAMES, about

SHIPPED = Path(__file__).parents[2] / "data" / "checkpoints" / "digits.safetensors"
DATA_HELP = """\
DATA is a folder in COCO format: images in DATA/train and boxes in DATA/annotations/train.json,
likewise val (or valid) and test; or as COCO itself comes, DATA/train2017 and
DATA/annotations/instances_train2017.json; or as Roboflow exports it, boxes in
DATA/train/_annotations.coco.json beside the images."""
WEIGHTS_HELP = """\
WEIGHTS is a file that train wrote (best.safetensors), an official file (.pth), a folder that
Hugging Face's save_pretrained wrote, or a name on its hub (SenseTime/deformable-detr)."""
SET_HELP = """\
--set changes any option of the model and of its training: train.epochs=3 model.num_queries=50
model.two_stage=true model.name=detr. `deformable-detr options` lists them all. Values are TOML's; a
bare word is text."""
METAVARS = {int: "N", float: "X", str: "NAME", tuple: "NAME"}


class Parser(argparse.ArgumentParser):
    """One that says which name was meant, under the usage of the command that was given."""

    def parse_known_args(self, *given: object) -> tuple[argparse.Namespace, list[str]]:
        """Nothing is left over for the parser of all commands, whose usage would not help."""
        found, unknown = super().parse_known_args(*given)
        if unknown:
            known = [name for action in self._actions for name in action.option_strings]
            name = unknown[0].partition("=")[0]
            self.error(f"unrecognized arguments: {' '.join(unknown)}{meant(name, known)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """With the nearest of the choices there are."""
        if wrong := re.search(r"invalid choice: '(.*?)'", message):
            choices = (action.choices or () for action in self._actions)
            message += meant(wrong[1], [str(name) for each in choices for name in each])
        super().error(message)


def add_command(
    commands: argparse.Action,
    name: str,
    run: Callable[[argparse.Namespace], int],
    text: str,
    example: str,
    *notes: str,
) -> argparse.ArgumentParser:
    """A command: what it does, in one line and by `run`, an example, and notes below its help."""
    command = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog="\n\n".join([*notes, f"example:\n  deformable-detr {name} {example}"]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.set_defaults(run=run)
    return command


def add_data(command: argparse.ArgumentParser, split: str | None = None) -> None:
    """DATA, and --split for the commands that read one."""
    command.add_argument("data", type=Path, metavar="DATA", help="folder of the data set")
    if split:
        command.add_argument("--split", default=split, help="default: %(default)s")


def add_model(command: argparse.ArgumentParser) -> None:
    """--model, for the commands that use a trained detector."""
    command.add_argument(
        "--model",
        default=str(SHIPPED),
        required=not SHIPPED.exists(),  # it is of the repository, not of an installed package
        metavar="WEIGHTS",
        help="the trained detector (default, in the repository: its detector of digits)",
    )


def add_recipe(command: argparse.ArgumentParser) -> None:
    """The recipe, and --set to change what is in it."""
    recipes = "; ".join(f"{name}: {about(name)}" for name in NAMES)
    command.add_argument(
        "--recipe",
        default="paper",
        help=f"one of these, or a .toml file of your own. {recipes} (default: %(default)s)",
    )
    command.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="TABLE.NAME=VALUE",
        help="options instead of the recipe's; see below",
    )


def add_start(command: argparse.ArgumentParser) -> None:
    """What else decides the model that a training starts from."""
    add_recipe(command)
    command.add_argument(
        "--short-side",
        type=int,
        help="of an evaluated image in pixels, instead of the recipe's (800 on COCO); training's "
        "sizes keep their proportion to it. Less is faster, and more helps small objects",
    )
    command.add_argument(
        "--init",
        metavar="WEIGHTS",
        help="start from these, which decide the model; none: start from nothing (default: the "
        "recipe's)",
    )
    command.add_argument(
        "--backbone-weights",
        metavar="FILE",
        help="safetensors file with the backbone's weights; imagenet: torchvision's, downloaded "
        "(default for a ResNet); none: a backbone that has learned nothing",
    )


class SetTrain(argparse.Action):
    """Has --epochs 3 say --set train.epochs=3."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | list[str],
        option_string: str | None = None,
    ) -> None:
        if self.nargs == 0:
            values = "false" if option_string.startswith("--no-") else "true"
        elif isinstance(values, list):
            values = json.dumps(values)
        namespace.set = [*namespace.set, f"train.{self.const}={values}"]


def add_train_options(command: argparse.ArgumentParser) -> None:
    """A flag for each option of `TrainConfig`, after its name, its type and its line of help."""
    group = command.add_argument_group(
        "training", "instead of the recipe's; --epochs 3 is short for --set train.epochs=3"
    )
    types = types_of(TrainConfig)
    for name, text in help_of(TrainConfig).items():
        kind, flag = plain_type(types[name]), name.replace("_", "-")
        group.add_argument(
            *((f"--{flag}", f"--no-{flag}") if kind is bool else (f"--{flag}",)),
            action=SetTrain,
            const=name,
            default=argparse.SUPPRESS,
            nargs={bool: 0, tuple: "*"}.get(kind),
            metavar=METAVARS.get(kind),
            help=text.replace("%", "%%"),
        )


def add_batch_size(command: argparse.ArgumentParser) -> None:
    """--batch-size, for the commands that detect."""
    command.add_argument(
        "--batch-size",
        type=int,
        default=8,
        help="images at once, at most; those of one size, so that none is padded and detections "
        "do not depend on it (default: %(default)s)",
    )


def add_top_k(command: argparse.ArgumentParser) -> None:
    """--top-k, for the commands that detect."""
    command.add_argument(
        "--top-k", type=int, default=100, help="detections of an image (default: %(default)s)"
    )


def add_precision(command: argparse.ArgumentParser) -> None:
    """--precision."""
    command.add_argument(
        "--precision",
        choices=("float32", "bf16", "auto"),
        default="float32",
        help="bf16: smaller weights, and less time where the processor has AMX; "
        "auto: bf16 there and on GPUs that have it (default: float32)",
    )


def add_device(command: argparse.ArgumentParser) -> None:
    """--device."""
    command.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
