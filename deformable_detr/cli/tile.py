"""deformable-detr tile"""

import argparse
from pathlib import Path

from deformable_detr.cli.arguments import DATA_HELP, add_command, add_data


def add(commands: argparse.Action) -> None:
    """Its arguments."""
    command = add_command(
        commands,
        "tile",
        run,
        "cut a data set of large images into tiles, to train on small objects",
        "data/digits --output runs/tiles --side 64",
        DATA_HELP,
        "predict --tiles SIDE then looks at large images in tiles of the same size.",
    )
    add_data(command)
    command.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="new folder of the data set"
    )
    command.add_argument(
        "--side", type=int, required=True, metavar="PIXELS", help="of a tile, in pixels"
    )
    command.add_argument(
        "--overlap",
        type=float,
        default=0.25,
        help="part of a tile that its neighbour has too; smaller objects are whole in one of them "
        "(default: %(default)s)",
    )
    command.add_argument("--split", nargs="+", help="default: all that DATA has")


def run(args: argparse.Namespace) -> int:
    """Cut the splits, and say what is in each now."""
    from deformable_detr.cli.beforehand import pointing_to_check
    from deformable_detr.data.places import all_splits, find_split
    from deformable_detr.data.tiles import tile_dataset, tile_places
    from deformable_detr.files import removed_on_error, require_folder, require_new
    from deformable_detr.interrupts import end_by_exception

    require_folder(args.output)
    if args.split:
        places = {split: find_split(args.data, split) for split in args.split}
    else:
        places = all_splits(args.data)
    targets = {
        split: (args.output / split, args.output / "annotations" / f"{split}.json")
        for split in places
    }
    for target in targets.values():
        require_new(*target)
    tile_places(1, 1, args.side, args.overlap)  # refuses what makes no tiles
    end_by_exception()  # half a data set does not stay after Ctrl-C
    with removed_on_error(args.output), pointing_to_check(args.data):
        for split, place in places.items():
            print(f"{split}: {tile_dataset(place, targets[split], args.side, args.overlap)}")
    print(f"now look at it: deformable-detr sheet {args.output}")
    return 0
