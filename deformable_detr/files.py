"""Files that are written whole or not at all, and what an error says in one line."""

import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError


def write_json(path: Path | str, content: object) -> None:
    """Write a readable JSON file, atomically; ValueError where a number is NaN or infinite."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, "utf-8"))


def write_atomically(path: Path | str, write: Callable[[str], object]) -> None:
    """Have `write` make a temporary file, and put it in place only when it is whole on disk."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        temporary.touch(exist_ok=False)
        allowed = temporary.stat().st_mode  # by the umask, which safetensors leaves aside
        write(str(temporary))
        with open(temporary, "r+b") as file:  # Windows syncs no file that is open to read
            os.fsync(file.fileno())
        temporary.chmod(allowed)
        temporary.replace(path)
    except (OSError, RuntimeError, SafetensorError) as error:
        full = shutil.disk_usage(path.parent).free < 1 << 20
        reason = "the disk is full" if full else getattr(error, "strerror", None) or error
        raise OSError(f"cannot write {path}: {reason}") from None
    finally:
        temporary.unlink(missing_ok=True)


def first_line(error: Exception) -> str:
    """What an error says, in one line; its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
