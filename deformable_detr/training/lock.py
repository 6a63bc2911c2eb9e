"""One training in a folder at a time: a lock that ends with its process.
Chapter training_at_every_size."""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from deformable_detr.files import writing

if os.name == "nt":
    import msvcrt
else:
    import fcntl

HERE: set[Path] = set()  # what this process holds: to POSIX a process may lock a file twice
BEYOND = 1 << 30  # the byte that is locked: Windows lets nobody else read a locked one


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file while open; ValueError, which names its process, where another one does.

    The operating system takes the lock from a process that ends, however it ends, so that the file
    may stay. Where a file system knows no locks, there is none.
    """
    path = path.resolve()
    if path in HERE:
        raise ValueError(f"{path.parent} is in use by another training of this process")
    with writing(path):
        file = open(path, "a+b", buffering=0)  # noqa: SIM115
    with file:
        _lock(file)
        HERE.add(path)
        try:
            yield
        finally:
            HERE.discard(path)


def _lock(file: IO) -> None:
    try:
        if os.name == "nt":
            file.seek(BEYOND)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:  # unlike flock, not inherited by workers, which outlive a killed process by seconds
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, BEYOND)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            folder, owner = Path(file.name).parent, _owner(file)
            raise ValueError(f"{folder} is in use by a training ({owner})") from None
    with suppress(OSError):  # of a full disk
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())


def _owner(file: IO) -> str:
    with suppress(OSError):
        file.seek(0)
        return file.read(200).decode("utf-8", "replace") or "of an unknown process"
    return "of an unknown process"
