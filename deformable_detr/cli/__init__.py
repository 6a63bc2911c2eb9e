"""The command line: what people may type; the function of that name in `commands` does it."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

# the library's own, spelt again: to import it for a --help takes seconds
RECIPES = ("paper", "modern", "small-data", "digits")
PRECISIONS = ("no", "bf16", "fp16")
MERGES = ("fusion", "nms")
SHIPPED = Path(__file__).parents[2] / "data" / "checkpoints" / "digits.safetensors"
DATA_HELP = """\
DATA is a folder in COCO format: images in DATA/train and boxes in DATA/annotations/train.json,
likewise val and test; or as COCO itself comes, DATA/train2017 and
DATA/annotations/instances_train2017.json."""
WEIGHTS_HELP = """\
WEIGHTS is a file that train wrote (best.safetensors), an official file (.pth), a folder that
Hugging Face's save_pretrained wrote, or a name on its hub (SenseTime/deformable-detr)."""


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(
        prog="deformable-detr",
        description="Train, evaluate and use Deformable DETR, a detector of objects in images.",
        epilog="With new data: check, sheet, doctor, train, evaluate, predict, in this order.",
    )
    commands_of = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str, example: str, *notes: str) -> argparse.ArgumentParser:
        return commands_of.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog="\n\n".join([*notes, f"example:\n  deformable-detr {name} {example}"]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    for add_command in (
        add_check,
        add_sheet,
        add_doctor,
        add_train,
        add_evaluate,
        add_predict,
        add_info,
    ):
        add_command(add)
    return parser


def add_check(add: Callable) -> None:
    """deformable-detr check"""
    command = add(
        "check",
        "list every fault of a data set, by annotation, and count its objects",
        "data/digits",
        DATA_HELP,
        "Exit code 1 if a fault is fatal, that is, would stop or spoil a training.",
    )
    command.add_argument("data", type=Path, metavar="DATA", help="folder of the data set")
    command.add_argument("--split", nargs="+", help="default: those of train, val, test it has")


def add_sheet(add: Callable) -> None:
    """deformable-detr sheet"""
    command = add(
        "sheet",
        "draw random images with their boxes and names on one sheet, to look at",
        "data/digits --output sheet.png",
        DATA_HELP,
    )
    add_data(command, "train")
    command.add_argument(
        "--output", type=Path, default=Path("sheet.png"), help="the picture (default: %(default)s)"
    )
    command.add_argument("--count", type=int, default=24, help="images (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0, help="another one draws other images")


def add_doctor(add: Callable) -> None:
    """deformable-detr doctor"""
    command = add(
        "doctor",
        "test data and model in a minute or two before hours are spent, by learning one batch by "
        "heart",
        "data/digits --recipe digits",
        DATA_HELP,
        WEIGHTS_HELP,
        "Exit code 1 if a fault is fatal.",
    )
    add_data(command, "train")
    add_model_options(command)
    command.add_argument("--steps", type=int, default=150, help="at most (default: %(default)s)")
    add_device(command)


def add_train(add: Callable) -> None:
    """deformable-detr train"""
    command = add(
        "train",
        "train a detector, or continue a training that was stopped",
        "data/digits --output runs/first --recipe digits",
        DATA_HELP,
        WEIGHTS_HELP,
        "On several GPUs or machines: accelerate launch -m deformable_detr.cli train ...",
    )
    command.add_argument("data", type=Path, metavar="DATA", help="folder of the data set")
    command.add_argument(
        "--output", type=Path, required=True, help="folder of this run: model, log, checkpoint"
    )
    add_model_options(command)
    command.add_argument(
        "--fresh", action="store_true", help="start anew where --output holds a checkpoint"
    )
    options = command.add_argument_group("instead of the recipe's")
    options.add_argument("--epochs", type=int, help="times that all images are seen")
    options.add_argument("--batch-size", type=int, help="images that one process holds at once")
    options.add_argument(
        "--accumulate", type=int, help="batches to a step, where memory is short of large ones"
    )
    options.add_argument("--lr", type=float, help="learning rate; the backbone's keeps its ratio")
    options.add_argument(
        "--ema-decay", type=float, help="of the average of weights that is kept, such as 0.99"
    )
    options.add_argument("--patience", type=int, help="evaluations without a better AP, then stop")
    options.add_argument(
        "--workers", dest="num_workers", type=int, metavar="N", help="processes that load images"
    )
    options.add_argument("--seed", type=int, help="of weights, data order and augmentation")
    options.add_argument(
        "--mixed-precision", choices=PRECISIONS, help="bf16 or fp16: faster and smaller on a GPU"
    )
    options.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="compute layers twice instead of keeping them: less memory, more time",
    )


def add_evaluate(add: Callable) -> None:
    """deformable-detr evaluate"""
    command = add(
        "evaluate",
        "compute COCO metrics of a detector, and say what it gets wrong",
        "data/digits --split val --report report.html",
        DATA_HELP,
        WEIGHTS_HELP,
    )
    add_data(command, "val")
    add_model(command)
    add_batch_size(command)
    command.add_argument(
        "--top-k", type=int, default=100, help="detections of an image (default: %(default)s)"
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="write all figures to a file")
    command.add_argument(
        "--report", type=Path, metavar="FILE", help="write a page with curves and pictures (HTML)"
    )
    threshold = command.add_mutually_exclusive_group()
    threshold.add_argument(
        "--threshold", type=float, help="score from which errors are counted (default: the model's)"
    )
    threshold.add_argument(
        "--keep-threshold",
        action="store_true",
        help="find the threshold with the best F1 on this split, and store it in the model's file",
    )
    add_views(command)
    add_device(command)


def add_predict(add: Callable) -> None:
    """deformable-detr predict"""
    command = add(
        "predict",
        "detect objects in images, and save pictures of them",
        "data/samples/000001.png --pictures found/ --json found.json",
        WEIGHTS_HELP,
        "Files that cannot be read are passed over; the exit code is then 1.",
    )
    command.add_argument(
        "images", type=Path, nargs="+", metavar="IMAGE", help="image files, or folders of them"
    )
    add_model(command)
    command.add_argument(
        "--threshold",
        type=float,
        help="least score shown, from 0 to 1 (default: the model's own, which evaluate "
        "--keep-threshold and train store, or 0.5)",
    )
    command.add_argument(
        "--pictures",
        "--output",
        type=Path,
        metavar="FOLDER",
        help="save pictures here (default: found, unless there is --json)",
    )
    command.add_argument(
        "--json", type=Path, metavar="FILE", help="write what is found as COCO results"
    )
    add_batch_size(command)
    command.add_argument(
        "--top-k", type=int, default=100, help="detections of an image (default: %(default)s)"
    )
    command.add_argument(
        "--nms",
        type=float,
        metavar="OVERLAP",
        help="of two boxes of a class that overlap more (IoU), show the better one only "
        "(default: show all; a DETR rarely needs this)",
    )
    add_views(command)
    add_device(command)


def add_info(add: Callable) -> None:
    """deformable-detr info"""
    command = add(
        "info",
        "show what a model is and costs: classes, parameters, FLOPs, seconds, memory",
        "--size 128 128",
        WEIGHTS_HELP,
    )
    add_model(command)
    command.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=(800, 1066),
        metavar=("HEIGHT", "WIDTH"),
        help="of the image, in pixels (default: 800 1066)",
    )
    command.add_argument("--batch-size", type=int, default=1, help="default: %(default)s")
    command.add_argument(
        "--repeats", type=int, default=5, help="timed runs; 0 counts only (default: %(default)s)"
    )
    add_device(command)


def add_data(command: argparse.ArgumentParser, split: str) -> None:
    """DATA and --split."""
    command.add_argument("data", type=Path, metavar="DATA", help="folder of the data set")
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


def add_model_options(command: argparse.ArgumentParser) -> None:
    """The recipe, and what changes the model that it makes."""
    command.add_argument(
        "--recipe",
        default="paper",
        help=f"one of {', '.join(RECIPES)}, or a .toml file of your own. paper: the published "
        "model and schedule, for COCO; modern: its best variant with a gentler schedule; "
        "small-data: from COCO's weights to few images of your own; digits: a small model for "
        "small images "
        "(default: %(default)s)",
    )
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
    model = command.add_argument_group("the model, where no weights decide it")
    model.add_argument("--backbone", help="small, or a torchvision ResNet such as resnet50")
    model.add_argument(
        "--backbone-weights",
        metavar="FILE",
        help="safetensors file with the backbone's weights; imagenet: torchvision's, downloaded "
        "(default for a ResNet); none: a backbone that has learned nothing",
    )
    model.add_argument(
        "--deformable-stages",
        type=int,
        help="last stages of the ResNet, to 3, that get deformable convolutions",
    )
    model.add_argument(
        "--levels",
        dest="num_levels",
        type=int,
        metavar="N",
        help="feature levels; 1 is single-scale",
    )
    model.add_argument(
        "--dilation", action="store_true", help="the backbone's last map at stride 16 (DC5)"
    )
    model.add_argument("--queries", type=int, help="object queries: boxes that an image can have")
    model.add_argument("--refine", action="store_true", help="iterative box refinement")
    model.add_argument("--two-stage", action="store_true", help="two-stage; implies --refine")


def add_batch_size(command: argparse.ArgumentParser) -> None:
    """--batch-size, for the commands that detect."""
    command.add_argument(
        "--batch-size",
        type=int,
        default=8,
        help="images at once (default: %(default)s). Those of different sizes are padded to one, "
        "which changes detections a little, as in the official code; 1 avoids it",
    )


def add_views(command: argparse.ArgumentParser) -> None:
    """Test-time augmentation."""
    views = command.add_argument_group("test-time augmentation: slower, and often better")
    views.add_argument(
        "--tta",
        action="store_true",
        help="look at each image in several sizes, and mirrored if the training did so",
    )
    views.add_argument(
        "--tta-scales", type=float, nargs="+", help="needs --tta; default: 0.8 1 1.25"
    )
    views.add_argument(
        "--merge",
        choices=MERGES,
        help="of what the views show: weighted boxes fusion or non-maximum suppression "
        "(default: fusion)",
    )


def add_device(command: argparse.ArgumentParser) -> None:
    """--device."""
    command.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")


def main(argv: list[str] | None = None) -> int:
    """Run a command; errors are one line on stderr and exit code 2, Ctrl-C is 130."""
    args = build_parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a file's name may hold bytes that are no text
            stream.reconfigure(errors="backslashreplace")
    try:
        from deformable_detr.cli import commands  # seconds, in which Ctrl-C may come

        code = getattr(commands, args.command)(args)
        sys.stdout.flush()  # here, where its errors are caught
        return code
    except BrokenPipeError:  # `deformable-detr check DATA | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not (text := one_line(error)):
            raise
        print(f"error: {text}", file=sys.stderr)
        return 2


def one_line(error: Exception) -> str:
    """What a user can do something about, in one line; "" for an error of the program itself."""
    import torch  # as in main

    from deformable_detr.ops import BackendError
    from deformable_detr.training.loop import NonFiniteLossError

    if isinstance(error, ValueError | OSError | NonFiniteLossError | BackendError):
        return str(error)
    text = str(error).partition("\n")[0]
    # torch's own OutOfMemoryError is of devices; on a CPU it raises a RuntimeError
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return f"out of memory: {text}"
    if isinstance(error, RuntimeError) and "can't allocate memory" in text:
        return f"out of memory: {text}"
    return ""
