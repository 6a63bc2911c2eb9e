"""deformable-detr sheet"""

import argparse
from pathlib import Path

from deformable_detr.cli.arguments import DATA_HELP, add_command, add_data

KINDS = (".png", ".jpg", ".jpeg", ".webp")


def add(commands: argparse.Action) -> None:
    """Its arguments."""
    command = add_command(
        commands,
        "sheet",
        run,
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


def run(args: argparse.Namespace) -> int:
    """Save a sheet of annotated images."""
    from deformable_detr.cli.beforehand import pointing_to_check, refuse_targets
    from deformable_detr.data.coco import CocoDataset, find_split
    from deformable_detr.look.pictures import picture_sheet

    if args.output.suffix.lower() not in KINDS:
        raise ValueError(f"--output must end in one of {', '.join(KINDS)}, got {args.output}")
    refuse_targets(args.output)
    with pointing_to_check(args.data):
        dataset = CocoDataset(*find_split(args.data, args.split))
    unread: list[str] = []
    picture = picture_sheet(dataset, args.count, args.seed, unread.append)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    picture.save(args.output)
    print(
        f"{min(args.count, len(dataset))} of {len(dataset)} images of {args.split}: {args.output}"
    )
    if unread:
        print(f"{len(unread)} of them cannot be read; all: deformable-detr check {args.data}")
    return 0
