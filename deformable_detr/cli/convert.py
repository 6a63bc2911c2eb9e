"""deformable-detr convert"""

import argparse
from pathlib import Path

from deformable_detr.cli.arguments import add_command


def add(commands: argparse.Action) -> None:
    """Its arguments."""
    command = add_command(
        commands,
        "convert",
        run,
        "write a data set of Pascal VOC's format, all its splits at once, in COCO's",
        "VOC2012 DATA",
        "VOC has folders train, val (or valid) and test with pictures and XML files; or, as it"
        "\ncomes itself, JPEGImages, Annotations and ImageSets/Main. Pictures are copied.",
    )
    command.add_argument(
        "source", type=Path, metavar="VOC", help="folder of pictures and XML files"
    )
    command.add_argument("data", type=Path, metavar="DATA", help="new folder of the data set")


def run(args: argparse.Namespace) -> int:
    """Convert, and say what was read and what left out."""
    from deformable_detr.data.voc import convert_voc
    from deformable_detr.interrupts import end_by_exception

    end_by_exception()  # half a data set does not stay after Ctrl-C
    for line in convert_voc(args.source, args.data):
        print(line)
    print(f"now look at it: deformable-detr check {args.data}")
    return 0
