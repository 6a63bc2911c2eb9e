"""Results that one thread computes while others wait: builds, folders, what works here.

Chapter making_it_fast builds kernels with it.
"""

import functools
import os
import threading
from collections.abc import Callable
from typing import TypeVar

R = TypeVar("R")
LOCK = threading.RLock()
if hasattr(os, "register_at_fork"):  # or a fork during a build would wait for it for ever
    os.register_at_fork(
        before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=LOCK.release
    )


def once(function: Callable[..., R]) -> Callable[..., R]:
    """Remember results, as functools.cache does, computed by one thread while others wait."""
    results: dict[tuple, R] = {}

    @functools.wraps(function)
    def remembered(*args: object) -> R:
        if args not in results:
            with LOCK:
                if args not in results:
                    results[args] = function(*args)
        return results[args]

    remembered.results, remembered.cache_clear = results, results.clear
    return remembered
