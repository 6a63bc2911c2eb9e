"""What commands look at before hours are spent: data, files to be written, the device."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator

from deformable_detr.data.faults import Fault, told
from deformable_detr.data.names import counted
from deformable_detr.data.places import Place
from deformable_detr.data.split_checks import check_data
from deformable_detr.files import first_line, nearest


def refuse_faults(data: Path, splits: dict[str, Place], accelerator: Accelerator) -> None:
    """Print the fatal faults of these splits of the data, and raise ValueError if there are any.

    The main process looks; the others wait, and raise with it.
    """
    found = 0
    for split, faults in check_data(splits) if accelerator.is_main_process else ():
        found += print_fatal(split, faults)
    count = torch.tensor(float(found), device=accelerator.device)
    refuse_any(int(accelerator.reduce(count, "sum")), data)


def print_fatal(split: str, faults: list[Fault]) -> int:
    """How many of the faults are fatal; those are printed."""
    fatal = [fault for fault in faults if fault.fatal]
    for line in told(fatal):
        print(f"{split}: {line}", file=sys.stderr)
    return len(fatal)


def refuse_any(count: int, data: Path) -> None:
    """ValueError if there are fatal faults."""
    if count:
        faults = counted(count, "fatal fault")
        raise ValueError(f"{faults} in the data; all of them: deformable-detr check {data}")


@contextmanager
def pointing_to_check(data: Path) -> Iterator[None]:
    """Have a ValueError, which is on the first fault of the data, say what lists all."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error}; all faults: deformable-detr check {data}") from None


def refuse_targets(*paths: Path | None) -> None:
    """ValueError where one of these files could not be written."""
    for path in filter(None, paths):
        if path.is_dir():
            raise ValueError(f"{path} is a folder, expected the name of a file")
        folder = nearest(path.parent)
        if not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise ValueError(f"cannot write {path}: {folder} is no folder that can be written")


def choose_device(name: str | None) -> torch.device:
    """The device of that name, or a GPU if there is one; ValueError in one line on another."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()  # the device "meta" has no numbers
    except (RuntimeError, AssertionError) as error:  # the latter of a torch without CUDA
        raise ValueError(f"no device {name}: {first_line(error)}") from None
    return device
