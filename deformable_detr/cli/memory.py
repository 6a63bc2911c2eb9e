"""Memory that a program keeps between steps, instead of giving it back and asking anew. Chapter
training_at_every_size.

glibc maps each large block anew and has the system clear its pages; a model asks for the same
blocks in every step. Kept, they cost nothing the second time.
"""

import ctypes
import os
from contextlib import suppress

SWITCH = "DEFORMABLE_DETR_MALLOC"  # "default" leaves the allocator as it comes
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
KEPT, MAPPED = 2**31 - 1, 1 << 30  # bytes: free ones that stay; blocks that are mapped all the same
OLD_LIMIT = 32 << 20  # bytes: the largest threshold that glibc before 2.35 takes


def keep_memory() -> bool:
    """Have glibc keep what is freed; whether that was done: not with another allocator or system,
    nor where the user has set one of its variables or SWITCH."""
    settings = os.environ.get(SWITCH), os.environ.get("GLIBC_TUNABLES", "")
    own = settings[0] == "default" or "glibc.malloc" in settings[1]
    if own or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    with suppress(OSError, AttributeError, TypeError):  # the latter on Windows
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 (musl has mallopt too, and does not know it)
        largest = (library.mallopt(MMAP_THRESHOLD, size) for size in (MAPPED, OLD_LIMIT))
        return any(largest) and bool(library.mallopt(TRIM_THRESHOLD, KEPT))
    return False
