"""Libraries that print by themselves, quiet: what they say, errors say. Chapter your_own_data."""

import ctypes
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path


def silence_libtiff() -> bool:
    """Have the libtiff that Pillow brings along print no errors and warnings of its own; whether
    that was done. Pillow raises an error of its own where a picture cannot be read."""
    folders = find_spec("PIL").submodule_search_locations
    files = [each for f in folders for each in Path(f).parent.glob("pillow.libs/libtiff*")]
    with suppress(OSError, AttributeError):
        for file in files:
            library = ctypes.CDLL(str(file))
            library.TIFFSetErrorHandler(None)
            library.TIFFSetWarningHandler(None)
        return bool(files)
    return False
