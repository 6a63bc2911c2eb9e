"""All commands. Their files import what needs torch where they run, not before: a --help is there
at once."""

import argparse

from deformable_detr.cli import (
    check,
    convert,
    doctor,
    evaluate,
    explain,
    export,
    info,
    options,
    predict,
    sheet,
    tile,
    train,
)
from deformable_detr.cli.arguments import Parser

COMMANDS = (
    *(convert, tile, check, sheet, doctor, options, train),
    *(evaluate, predict, explain, export, info),
)


def build_parser() -> argparse.ArgumentParser:
    """All commands and their arguments."""
    parser = Parser(
        prog="deformable-detr",
        description="Train, evaluate and use Deformable DETR and its family: detectors of objects "
        "in images.",
        epilog="With new data: check, sheet, doctor, train, evaluate, predict, in this order. "
        "What it looked at: explain.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser
