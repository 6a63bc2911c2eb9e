"""The command line: deformable-detr train | evaluate | predict | check."""

import argparse
import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

from deformable_detr import train as training
from deformable_detr.checkpoint import load_model
from deformable_detr.datasets import CocoDataset, check_dataset, find_split, open_image
from deformable_detr.detector import DeformableDETR, DeformableDETRConfig
from deformable_detr.evaluate import evaluate
from deformable_detr.postprocess import postprocess
from deformable_detr.structures import Batch
from deformable_detr.transforms import (
    coco_eval_transform,
    coco_train_transform,
    digits_eval_transform,
    digits_train_transform,
)
from deformable_detr.visualize import draw_detections

SHIPPED = Path(__file__).parents[1] / "data" / "checkpoints" / "digits.safetensors"
SMALL_MODEL = dict(
    backbone="small",
    num_levels=3,
    embed_dim=64,
    num_heads=4,
    encoder_layers=2,
    decoder_layers=2,
    ffn_dim=256,
    dropout=0.0,
    num_queries=30,
)
TRANSFORMS = {
    "paper": (coco_train_transform, coco_eval_transform),
    "digits": (digits_train_transform, digits_eval_transform),
}
DATA_HELP = """\
DATA is a folder in COCO format: images in DATA/train and boxes in DATA/annotations/train.json,
likewise val and test; or as COCO itself comes, DATA/train2017 and
DATA/annotations/instances_train2017.json."""


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(
        prog="deformable-detr", description="Train, evaluate and use Deformable DETR."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: object, text: str, example: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=f"{DATA_HELP}\n\nexample:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        return command

    command = add(
        "train",
        run_train,
        "train a detector, or continue a training that was stopped",
        "deformable-detr train data/digits --output runs/first --recipe digits",
    )
    command.add_argument("data", type=Path, metavar="DATA", help="folder of the data set")
    command.add_argument("--output", type=Path, required=True, help="folder of this run")
    command.add_argument(
        "--recipe",
        choices=sorted(training.RECIPES),
        default="paper",
        help="paper: the published model and schedule, for COCO; digits: a small model for small "
        "images (default: %(default)s)",
    )
    command.add_argument("--epochs", type=int, help="instead of the recipe's")
    command.add_argument("--batch-size", type=int, help="images per step and process")
    command.add_argument("--lr", type=float, help="learning rate; the backbone's keeps its ratio")
    command.add_argument("--workers", type=int, help="processes that load images")
    command.add_argument("--seed", type=int, help="of weights, data order and augmentation")
    command.add_argument("--backbone", help="small, or a torchvision ResNet such as resnet50")
    command.add_argument(
        "--backbone-weights", type=Path, help="safetensors file with the backbone's weights"
    )
    command.add_argument("--levels", type=int, help="feature levels; 1 is single-scale")
    command.add_argument("--queries", type=int, help="detections that an image can have")
    command.add_argument("--refine", action="store_true", help="iterative box refinement")
    command.add_argument("--two-stage", action="store_true", help="two-stage; implies --refine")
    command.add_argument(
        "--fresh", action="store_true", help="start anew where --output holds a checkpoint"
    )

    command = add(
        "evaluate",
        run_evaluate,
        "compute COCO metrics of a detector",
        "deformable-detr evaluate data/digits --split test",
    )
    command.add_argument("data", type=Path, metavar="DATA", help="folder of the data set")
    add_model_option(command)
    command.add_argument("--split", default="val", help="default: %(default)s")
    command.add_argument("--batch-size", type=int, default=8, help="default: %(default)s")
    command.add_argument("--json", type=Path, help="also write the metrics to this file")

    command = add(
        "predict",
        run_predict,
        "detect objects in images and save pictures of them",
        "deformable-detr predict data/samples/000001.png --output found/",
    )
    command.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image files")
    add_model_option(command)
    command.add_argument(
        "--threshold", type=float, default=0.3, help="least score shown (default: %(default)s)"
    )
    command.add_argument(
        "--output", type=Path, default=Path("found"), help="folder of the pictures"
    )

    command = add(
        "check",
        run_check,
        "list every fault of a data set by annotation id",
        "deformable-detr check data/digits",
    )
    command.add_argument("data", type=Path, metavar="DATA", help="folder of the data set")
    command.add_argument("--split", nargs="+", help="default: those of train, val, test it has")
    return parser


def add_model_option(command: argparse.ArgumentParser) -> None:
    """--model, for the commands that use a trained detector."""
    command.add_argument(
        "--model",
        type=Path,
        default=SHIPPED,
        help="safetensors file that train wrote (default: the repository's detector of digits)",
    )


def run_train(args: argparse.Namespace) -> int:
    """deformable-detr train"""
    faults = []
    has_val = has_split(args.data, "val")
    for split in ("train", "val") if has_val else ("train",):
        found = check_dataset(*find_split(args.data, split))
        faults += [(split, fault) for fault in found if fault.fatal]
    if faults:
        for split, fault in faults[:20]:
            print(f"{split}: {fault}", file=sys.stderr)
        raise ValueError(
            f"{len(faults)} fatal faults in the data; "
            f"all of them: deformable-detr check {args.data}"
        )
    train_transform, eval_transform = TRANSFORMS[args.recipe]
    train_set = CocoDataset(*find_split(args.data, "train"), train_transform())
    val_set = CocoDataset(*find_split(args.data, "val"), eval_transform()) if has_val else None
    recipe = choose_recipe(args)
    torch.manual_seed(recipe.seed)
    model = DeformableDETR(choose_model(args, len(train_set.categories)))
    if args.backbone_weights:
        load_backbone(model, args.backbone_weights)
    metrics = training.train(model, train_set, val_set, args.output, recipe, resume=not args.fresh)
    if metrics:
        print(metrics)
    print(f"model: {args.output / ('best' if metrics else 'last')}.safetensors")
    return 0


def choose_recipe(args: argparse.Namespace) -> training.TrainConfig:
    """The recipe with what the command line changes in it."""
    recipe = training.RECIPES[args.recipe]
    given = {
        "epochs": args.epochs,
        "batch_size": args.batch_size,
        "lr": args.lr,
        "num_workers": args.workers,
        "seed": args.seed,
        "backbone_lr": args.lr and args.lr * recipe.backbone_lr / recipe.lr,
    }
    return dataclasses.replace(recipe, **{k: v for k, v in given.items() if v is not None})


def choose_model(args: argparse.Namespace, num_classes: int) -> DeformableDETRConfig:
    """The recipe's model with what the command line changes in it."""
    base = SMALL_MODEL if args.recipe == "digits" else {}
    given = {"backbone": args.backbone, "num_levels": args.levels, "num_queries": args.queries}
    config = DeformableDETRConfig(
        num_classes=num_classes,
        refine=args.refine or args.two_stage or args.recipe == "digits",
        two_stage=args.two_stage or args.recipe == "digits",
    )
    return dataclasses.replace(config, **base | {k: v for k, v in given.items() if v is not None})


def load_backbone(model: DeformableDETR, path: Path) -> None:
    """Strictly, from a safetensors file."""
    try:
        model.backbone.load_state_dict(load_file(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} does not fit the backbone: {reason}") from None


def run_evaluate(args: argparse.Namespace) -> int:
    """deformable-detr evaluate"""
    model, _ = load_model(args.model)
    dataset = CocoDataset(*find_split(args.data, args.split), eval_transform_of(model))
    metrics = evaluate(model, dataset, args.batch_size)
    print(metrics)
    if args.json:
        args.json.write_text(json.dumps(metrics.to_dict(), indent=1) + "\n")
    return 0


def eval_transform_of(model: DeformableDETR) -> object:
    """Small models see images as they are, the others at COCO's size."""
    recipe = "digits" if model.config.backbone == "small" else "paper"
    return TRANSFORMS[recipe][1]()


@torch.no_grad()
def run_predict(args: argparse.Namespace) -> int:
    """deformable-detr predict"""
    if not 0 <= args.threshold <= 1:
        raise ValueError(f"--threshold must be in [0, 1], got {args.threshold}")
    (stem, count), *_ = Counter(path.stem for path in args.images).most_common(1)
    if count > 1:
        raise ValueError(f"{count} images would be saved as {stem}.png; give them in separate runs")
    model, categories = load_model(args.model)
    names = [category["name"] for category in categories]
    transform = eval_transform_of(model)
    args.output.mkdir(parents=True, exist_ok=True)
    for path in tqdm(args.images, unit="image", disable=len(args.images) < 5):
        image = open_image(path)
        batch = Batch.from_images([transform(image)])
        (found,) = postprocess(
            model(batch), [(image.height, image.width)], threshold=args.threshold
        )
        saved = args.output / f"{path.stem}.png"
        draw_detections(image, found, names).save(saved)
        tqdm.write(f"{path}: {len(found)} found, picture in {saved}")
        rows = zip(found.scores.tolist(), found.labels.tolist(), found.boxes.tolist(), strict=True)
        for value, label, box in rows:
            corners = "  ".join(f"{name} {x:6.1f}" for name, x in zip("xyxy", box, strict=True))
            tqdm.write(f"  {names[label]:12} {value:.2f}  {corners}")
    return 0


def run_check(args: argparse.Namespace) -> int:
    """deformable-detr check"""
    splits = args.split or [s for s in ("train", "val", "test") if has_split(args.data, s)]
    if not splits:
        find_split(args.data, "train")  # says what was expected
    fatal = 0
    for split in splits:
        faults = check_dataset(*find_split(args.data, split))
        for fault in faults:
            print(f"{split}: {fault}")
        fatal += sum(fault.fatal for fault in faults)
        print(f"{split}: {len(faults)} faults, {sum(f.fatal for f in faults)} of them fatal")
    return 1 if fatal else 0


def has_split(data: Path, split: str) -> bool:
    """Whether a data set has annotations for a split."""
    try:
        find_split(data, split)
    except FileNotFoundError:
        return False
    return True


def main(argv: list[str] | None = None) -> int:
    """Run a command; errors are one line on stderr and exit code 2, Ctrl-C is 130."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError, training.NonFiniteLossError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
