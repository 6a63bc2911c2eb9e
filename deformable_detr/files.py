"""Files that are written whole or not at all, and what an error says in one line."""

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from deformable_detr.interrupts import TEMPORARY


def write_json(path: Path | str, content: object) -> None:
    """Write a readable JSON file, atomically; ValueError where a number is NaN or infinite."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, "utf-8"))


def write_atomically(path: Path | str, write: Callable[[str], object]) -> None:
    """Have `write` make a temporary file, and put it in place only when it is whole on disk."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        TEMPORARY.add(str(temporary))
        try:
            temporary.touch(exist_ok=False)
            allowed = temporary.stat().st_mode  # by the umask, which safetensors leaves aside
            write(str(temporary))
            with open(temporary, "r+b") as file:  # Windows syncs no file that is open to read
                os.fsync(file.fileno())
            temporary.chmod(allowed)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
            TEMPORARY.discard(str(temporary))


def require_folder(path: Path | str) -> None:
    """OSError, in one line, where a path is something else than a folder, and no folder can be made
    there either."""
    wanted = Path(path).absolute()
    folder = nearest(wanted)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "is not there"
        what = what if folder == wanted else f"cannot be: {folder} {what}"
        raise NotADirectoryError(f"{path} {what}, expected a folder")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"cannot write {path}: {folder} may not be written into")


def require_new(*paths: Path) -> None:
    """FileExistsError where one of these is a file, or a folder that holds something."""
    for path in paths:
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            raise FileExistsError(f"{path} is there already: give another folder")


@contextmanager
def removed_on_error(folder: Path) -> Iterator[None]:
    """Make a folder; where it is new or empty, nothing stays in it if what is done then fails.
    FileExistsError, which removes nothing, where another process does the same."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    if new:
        folder.mkdir()
    empty = not any(folder.iterdir())
    try:
        yield
    except FileExistsError:
        raise
    except BaseException:
        for path in new[-1:] or (list(folder.iterdir()) if empty else ()):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        raise


def nearest(path: Path) -> Path:
    """The path, absolute, or the nearest of its parents that is there; its drive, if none is."""
    places = path.absolute(), *path.absolute().parents
    return next((place for place in places if place.exists()), places[-1])


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that were killed in `write_atomically` have left in a folder, into
    which nobody else writes now."""
    for path in folder.glob(".*"):
        if re.fullmatch(r"\..+-[0-9a-f]{32}", path.name):
            path.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Have what fails in writing a file raise an OSError that names it, in one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
    except RuntimeError as error:
        if "inline_container" not in str(error):  # else it is torch.save's
            raise
        reason = first_line(error)
    else:
        return
    raise OSError(f"cannot write {path}: {'the disk is full' if _is_full(path) else reason}")


def _is_full(path: Path) -> bool:
    folder = nearest(path.parent)
    return folder.exists() and shutil.disk_usage(folder).free < 1 << 20


def first_line(error: Exception) -> str:
    """What an error says, in one line; its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
