"""The command line: one file for each command, with its arguments and what it does. Chapter 12.

Its files import what needs torch where they run, not before: a --help is there at once.
"""

import argparse
import os
import sys
import warnings

from deformable_detr.cli import (
    check,
    convert,
    doctor,
    evaluate,
    info,
    options,
    predict,
    sheet,
    train,
)
from deformable_detr.data.names import printable

COMMANDS = (convert, check, sheet, doctor, options, train, evaluate, predict, info)


def build_parser() -> argparse.ArgumentParser:
    """All commands and their arguments."""
    parser = argparse.ArgumentParser(
        prog="deformable-detr",
        description="Train, evaluate and use Deformable DETR and its family: detectors of objects "
        "in images.",
        epilog="With new data: check, sheet, doctor, train, evaluate, predict, in this order.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command; errors are one line on stderr and exit code 2, Ctrl-C is 130."""
    args = build_parser().parse_args(argv)
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a file's name may hold bytes that are no text
            stream.reconfigure(errors="backslashreplace")
    try:
        code = args.run(args)
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
        print(f"error: {printable(text, len(text))}", file=sys.stderr)
        return 2


def one_line(error: Exception) -> str:
    """What a user can do something about, in one line; "" for an error of the program itself."""
    import torch

    from deformable_detr.ops import BackendError
    from deformable_detr.training.faults import NonFiniteLossError

    if isinstance(error, ValueError | OSError | NonFiniteLossError | BackendError):
        return str(error)
    text = str(error).partition("\n")[0]
    # torch's own OutOfMemoryError is of devices; on a CPU it raises a RuntimeError
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return f"out of memory: {text}"
    if isinstance(error, RuntimeError) and "can't allocate memory" in text:
        return f"out of memory: {text}"
    return ""
