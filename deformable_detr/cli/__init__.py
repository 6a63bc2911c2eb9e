"""The command line: one file for each command, with its arguments and what it does.
Chapter your_own_data."""

import os
import sys
import warnings

from deformable_detr.cli.memory import keep_memory
from deformable_detr.cli.quiet import silence_libtiff
from deformable_detr.interrupts import Interrupted, end_at_once


def main(argv: list[str] | None = None) -> int:
    """Run a command; errors are one line on stderr and exit code 2, Ctrl-C is 130."""
    if argv is None:  # as a program of its own
        end_at_once()
        keep_memory()
    from deformable_detr.cli.commands import build_parser

    args = build_parser().parse_args(argv)
    silence_libtiff()
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
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.number
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        from deformable_detr.cli.errors import one_line
        from deformable_detr.data.names import printable

        if not (text := one_line(error)):
            raise
        print(f"error: {printable(text, len(text))}", file=sys.stderr)
        return 2
