"""Reading files of tensors that may be damaged or hostile. Chapter published_weights, section 6.

Nothing in a file is executed, and nothing is unfolded to more than the file can hold.
"""

import argparse
import json
import re
import stat
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deformable_detr.files import first_line

State = dict[str, Tensor]
CUT_OFF = "it is damaged or cut off, as a copy or download that was not finished"
ENDS_EARLY = ("header too small", "invalid header length", "not fully covered")  # of safetensors
WRAPPERS = ("module.", "_orig_mod.", "model.")  # of DDP, torch.compile, Lightning


@contextmanager
def open_safetensors(path: Path | str) -> Iterator[Any]:
    """A file of safetensors, open; ValueError, in one line, where it is none."""
    require_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        reason = CUT_OFF if any(text in str(error) for text in ENDS_EARLY) else first_line(error)
        raise ValueError(f"{path} is not a readable safetensors file: {reason}") from None


def read_safetensors(path: Path | str) -> tuple[State, dict[str, str]]:
    """The tensors and the metadata of a file."""
    with open_safetensors(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, file.metadata() or {}


def read_pickle(path: Path | str) -> Mapping:
    """The dict in a file of torch.save; ValueError, in one line, where it is none.

    argparse.Namespace, which official files hold, is the one class allowed beyond torch's own.
    """
    require_regular(path)
    _refuse_bomb(Path(path))
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # what they say of odd files, the error says
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make the loader raise anything
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"{CUT_OFF}, or not written by torch.save"
        if refused:
            reason = f"it asks to call {refused[1]}, which was not done"
        raise ValueError(f"{path} is not a readable file of weights: {reason}") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold a dict of tensors, got {type(content).__name__}")
    return content


def read_json(text: str, source: object) -> Any:
    """What a JSON text says; ValueError, in one line, where it is none or nested without end."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not JSON that can be read: {first_line(error)}") from None


def require_regular(path: Path | str) -> None:
    """FileNotFoundError where there is nothing, ValueError where a path is a pipe, a device or
    something else that could be read for ever."""
    if not Path(path).exists():
        raise FileNotFoundError(f"no model at {path}")
    if not stat.S_ISREG(Path(path).stat().st_mode):
        raise ValueError(f"{path} is no regular file")


def tensors_of(given: Mapping, path: Path | str) -> State:
    """A state dict of a pickle, without the prefixes of what the model was wrapped in.

    ValueError where something in it is no weight, or where its tensors, which may be views of one
    number, are larger than the file could hold.
    """
    strange = [n for n, x in given.items() if not isinstance(n, str) or not _is_weight(x)]
    if strange:
        raise ValueError(f"{path}: {strange[0]!r:.80} is not a dense tensor of real numbers")
    size, claimed = Path(path).stat().st_size, sum(x.nbytes for x in given.values())
    if claimed > 2 * size:  # twice: several names may share one tensor
        raise ValueError(f"{path}: tensors of {claimed:,} bytes cannot be in {size:,} bytes")
    return unwrapped(dict(given))


def unwrapped(state: State) -> State:
    """The tensors without prefixes that all their names share."""
    for _ in WRAPPERS:
        for prefix in WRAPPERS:
            if state and all(name.startswith(prefix) for name in state):
                state = {name.removeprefix(prefix): x for name, x in state.items()}
    return state


def shown(name: str) -> str:
    """A name that somebody else chose, as a message can show it: in one line, not without end."""
    return repr(name)[1:-1][:80]


def as_weights(tensor: Tensor, like: Tensor, name: str, source: object) -> Tensor:
    """A tensor in the dtype of another; ValueError where one is of integers and the other is not,
    or where a number is NaN or infinite."""
    if tensor.is_floating_point() != like.is_floating_point():
        given = f"{tensor.dtype}, expected {like.dtype}"
        raise ValueError(f"{source}: tensor {name} is of {given}")
    tensor = tensor.detach().to(like.dtype)
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise ValueError(f"{source}: tensor {name} has a number that is NaN or infinite")
    return tensor


def _refuse_bomb(path: Path) -> None:
    """ValueError where an archive's records, unpacked, are larger than the file."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(record.file_size for record in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return  # torch.load says what is wrong with it
    if unpacked > path.stat().st_size:
        raise ValueError(
            f"{path} would unpack to {unpacked:,} bytes from {path.stat().st_size:,}: "
            "torch.save compresses nothing"
        )


def _is_weight(value: object) -> bool:
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized:
        return False
    return value.device.type == "cpu" and not value.is_complex()
