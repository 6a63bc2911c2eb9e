"""Building kernels/ms_deform_attn.cu with the C++ compiler that is on the machine, at first use.

About a second for each library, kept in `cache_folder()`. Chapters 6 and 7 build it in the open.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from deformable_detr.ops.cache import cache_folder, refuse_unsafe
from deformable_detr.ops.errors import BackendError

FLAGS = (
    "-std=c++17",
    "-O3",
    "-pthread",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
)


def build(
    macros: dict[str, str | int],
    flags: tuple[str, ...] = (),
    source: str = "cpu.cpp",
    program: bool = False,
) -> Path:
    """The shared library for these macros, from the cache or made now and put there whole.

    flags: beside, and stronger than, FLAGS. source: the file that includes ms_deform_attn.cu.
    program: a program instead. Raises BackendError where the compiler fails.
    """
    command = [
        compiler(),
        *FLAGS,
        *(() if program else ("-shared", "-fPIC")),
        native(),
        *(f"-D{name}={x}" for name, x in macros.items()),
        *flags,
    ]
    folder = cache_folder()
    library = folder / f"{_key(command, source)}.so"
    if not library.exists():
        folder.mkdir(mode=0o700, exist_ok=True)  # whoever removed it since
        _compile(command, source, library)
    refuse_unsafe(library)
    return library


def _key(command: list[str], source: str) -> str:
    """A name for all that a build depends on: command, machine, sources."""
    key = hashlib.sha256("\0".join([*command, *machine()]).encode())
    for name in ("ms_deform_attn.cu", source):
        key.update(sources().joinpath(name).read_bytes())
    return key.hexdigest()[:32]


def _compile(command: list[str], source: str, library: Path) -> None:
    with (
        resources.as_file(sources()) as folder,
        tempfile.TemporaryDirectory(dir=library.parent, prefix="building-") as temporary,
    ):
        made = Path(temporary) / "kernel.so"
        run = subprocess.run(
            [*command, str(folder / source), "-o", str(made)], capture_output=True, text=True
        )
        if run.returncode:
            said = run.stderr[-2000:] or f"it said nothing, and returned {run.returncode}"
            raise BackendError(f"{command[0]} could not build the kernel:\n{said}")
        made.chmod(0o700)  # whatever the umask
        os.replace(made, library)  # whole or not at all, also with several processes at once


@cache
def compiler() -> str:
    """The C++ compiler: $CXX, or the first of c++, g++ and clang++ on the path; BackendError where
    there is none."""
    asked = os.environ.get("CXX")
    found = next(
        filter(None, map(shutil.which, [asked] if asked else ["c++", "g++", "clang++"])), None
    )
    if found is None:
        raise BackendError(
            f"no C++ compiler: {asked or 'c++, g++ and clang++'} not on the path; "
            "install g++ or clang++ (Debian: apt install g++, conda: cxx-compiler)"
        )
    return found


@cache
def machine() -> tuple[str, ...]:
    """What, beside sources and flags, decides whether a built library runs here; the compiler's
    version first."""
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True).stdout
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = sorted({x for x in lines if x.startswith(("flags", "Features", "model name"))})
    except OSError:
        processor = [platform.processor()]
    return version, platform.machine(), *processor


def native() -> str:
    """The flag that asks for all instructions of this processor."""
    return "-march=native" if platform.machine() in ("x86_64", "AMD64", "i686") else "-mcpu=native"


def sources() -> Traversable:
    """The folder of the kernels' sources: the package's, or the source tree's, not installed."""
    try:
        return resources.files("deformable_detr.kernels")
    except ModuleNotFoundError:
        return Path(__file__).parents[2] / "kernels"
