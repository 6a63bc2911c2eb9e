"""Where built kernels are kept: a folder of the user's own, which nobody else can write to.

$DEFORMABLE_DETR_CACHE, or deformable_detr in $XDG_CACHE_HOME or ~/.cache. Chapter making_it_fast
fills it.
"""

import atexit
import os
import shutil
import stat
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

from deformable_detr.ops.errors import BackendError
from deformable_detr.ops.once import once

# how names of temporary folders begin; nobody else's do, since old ones are removed
BUILDING, TEMPORARY = "deformable_detr-building-", "deformable_detr-kernels-"
HOUR = 3600  # seconds; a build takes two minutes at most


@once
def cache_folder() -> Path:
    """The folder of built libraries, made if need be: the one that is asked for, BackendError where
    there is none; or else the user's own, or where that cannot be written to a private temporary
    one."""
    asked = os.environ.get("DEFORMABLE_DETR_CACHE")
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(asked or Path(base) / "deformable_detr").expanduser().resolve()
        for place in reversed((folder, *folder.parents)):
            if not place.is_dir():
                place.mkdir(exist_ok=True, mode=0o700)  # mkdir(parents=True) would heed the umask
        usable = bool(asked) or os.access(folder, os.W_OK)  # an image's may be for reading only
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        if asked:
            raise BackendError(
                f"DEFORMABLE_DETR_CACHE={asked} cannot hold kernels: {error}"
            ) from None
        usable = False
    if not usable:
        return temporary_folder()
    refuse_unsafe(folder)
    _remove_leftovers(folder, BUILDING, HOUR)
    return folder


@once
def temporary_folder() -> Path:
    """A folder that is removed when this process ends, not a fork of it: a home that cannot be
    written to costs a build each time."""
    # one that is in use after a day is made again, should its process build once more
    _remove_leftovers(Path(tempfile.gettempdir()), TEMPORARY, 24 * HOUR)
    folder, owner = Path(tempfile.mkdtemp(prefix=TEMPORARY)), os.getpid()

    def remove() -> None:
        if os.getpid() == owner:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def _remove_leftovers(folder: Path, prefix: str, seconds: float) -> None:
    """Remove the user's folders in this one that are older: processes that were killed left them.
    By age, because a process may run on another machine, or in a container."""
    for place in folder.glob(f"{prefix}*"):
        with suppress(OSError):  # another process was quicker
            status = place.lstat()
            own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
            if own and time.time() - status.st_mtime > seconds:
                shutil.rmtree(place, ignore_errors=True)


def refuse_unsafe(path: Path) -> None:
    """BackendError where another user could have written `path` or may replace it."""
    path = path.resolve()
    for place in (path, *path.parents):
        status = place.stat()
        others = stat.S_IWGRP | stat.S_IWOTH
        shared = status.st_mode & others and not (place != path and status.st_mode & stat.S_ISVTX)
        owners = {0, os.geteuid()} | (unmapped_root() if place != path else set())
        if shared or status.st_uid not in owners:
            wrong = "other users can write to" if shared else f"user {status.st_uid} owns"
            raise BackendError(
                f"kernels are not loaded from {path}: {wrong} {place}; "
                f"{'`chmod go-w` it, or ' if shared else ''}"
                "set DEFORMABLE_DETR_CACHE to a folder of your own"
            )


@cache
def unmapped_root() -> set[int]:
    """The user as whom root's folders, and other users' whom it does not know either, appear in a
    container that does not know root (Apptainer, bubblewrap, `unshare --user`)."""
    try:
        unknown = int(Path("/proc/sys/kernel/overflowuid").read_text())
        lines = Path("/proc/self/uid_map").read_text().splitlines()
        rows = [[int(number) for number in line.split()] for line in lines]
    except (OSError, ValueError):
        return set()
    known = any(first <= unknown < first + count for first, _, count in rows)
    return set() if known or any(outside == 0 for _, outside, _ in rows) else {unknown}
