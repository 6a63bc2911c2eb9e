"""deformable-detr info"""

import argparse
import dataclasses

from deformable_detr.cli.arguments import WEIGHTS_HELP, add_command, add_device, add_model


def add(commands: argparse.Action) -> None:
    """Its arguments."""
    command = add_command(
        commands,
        "info",
        run,
        "show what a model is and costs: classes, parameters, FLOPs, seconds, memory",
        "--size 128 128",
        WEIGHTS_HELP,
    )
    add_model(command)
    command.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="of the image, in pixels (default: as the model knows them, 800 1066 on COCO)",
    )
    command.add_argument("--batch-size", type=int, default=1, help="default: %(default)s")
    command.add_argument(
        "--repeats", type=int, default=5, help="timed runs; 0 counts only (default: %(default)s)"
    )
    add_device(command)


def run(args: argparse.Namespace) -> int:
    """Print a model's classes, options and costs."""
    from deformable_detr.cli.beforehand import choose_device
    from deformable_detr.data.names import printable
    from deformable_detr.evaluation.complexity import complexity
    from deformable_detr.inference.detector import load_detector
    from deformable_detr.models import model_name

    detector = load_detector(args.model)
    names = ", ".join(printable(category["name"]) for category in detector.categories)
    rows = {"file": args.model, "classes": f"{len(detector.categories)}: {names}"}
    rows |= {"threshold": detector.threshold, "prepares images as": detector.transforms}
    if detector.resizes:
        rows |= {"short side": detector.short_side}
    rows |= {"model": model_name(detector.model.config)}
    rows |= dataclasses.asdict(detector.model.config)
    for name, value in rows.items():
        print(f"{name:20}{value}")
    model = detector.model.to(choose_device(args.device))
    print()
    short = detector.known_side
    size = tuple(args.size or (short, short * 4 // 3))
    print(complexity(model, size, args.batch_size, args.repeats).table())
    return 0
