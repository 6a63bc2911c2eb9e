"""Building kernels/ms_deform_attn.cu with the C++ compiler that is on the machine, at first use.

About a second for each library, kept in `cache_folder()`. Chapters cuda_kernel and making_it_fast
build it in the open.
"""

import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from deformable_detr.ops.cache import BUILDING, cache_folder, refuse_unsafe
from deformable_detr.ops.errors import BackendError

FLAGS = (
    "-std=c++17",
    "-O3",
    "-pthread",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
)
ANSWER, BUILD = 20, 120  # seconds in which a compiler must say its version, and build a kernel


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
        *compiler(),
        *FLAGS,
        *(() if program else ("-shared", "-fPIC")),
        native(),
        *(f"-D{name}={x}" for name, x in macros.items()),
        *flags,
    ]
    folder, key = cache_folder(), _key(command, source)
    library = _kept(folder, key)
    if library is None:
        folder.mkdir(mode=0o700, exist_ok=True)  # whoever removed it since
        library = _compile(command, source, folder, key)
    refuse_unsafe(library)
    return library


def _key(command: list[str], source: str) -> str:
    """A name for all that a build depends on: command, machine, sources."""
    key = hashlib.sha256("\0".join([*command, *machine()]).encode())
    for name in ("ms_deform_attn.cu", source):
        key.update(sources().joinpath(name).read_bytes())
    return key.hexdigest()[:32]


def _kept(folder: Path, key: str) -> Path | None:
    """The library of this key, where there is one that is whole: a disk that was full, or a machine
    that lost its power, leaves others, and loading those ends the process."""
    for library in sorted(folder.glob(f"{key}-*.so")):
        if library.name == _name(key, library.read_bytes()):
            return library
    return None


def _name(key: str, content: bytes) -> str:
    """A library's name, which vouches for all of its bytes."""
    return f"{key}-{hashlib.sha256(content).hexdigest()[:32]}.so"


def _compile(command: list[str], source: str, folder: Path, key: str) -> Path:
    with (
        resources.as_file(sources()) as texts,
        tempfile.TemporaryDirectory(dir=folder, prefix=BUILDING) as temporary,
    ):
        made = Path(temporary) / "kernel.so"
        run = _run([*command, str(texts / source), "-o", str(made)], BUILD, TMPDIR=temporary)
        if run.returncode or not made.exists():
            said = run.stderr[-2000:] or f"it said nothing, and returned {run.returncode}"
            raise BackendError(f"{shlex.join(compiler())} could not build the kernel:\n{said}")
        made.chmod(0o700)  # whatever the umask
        with open(made, "r+b") as file:
            library = folder / _name(key, file.read())
            os.fsync(file.fileno())  # or a name could be on the disk before what it names
        os.replace(made, library)  # whole or not at all, also with several processes at once
    return library


def _run(command: Sequence[str], seconds: float, **environment: str) -> subprocess.CompletedProcess:
    """What a compiler says. BackendError where it does not start, and where it takes longer: it is
    ended then, and whatever it has started, which would else hold its output open."""
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    text = {"encoding": "utf-8", "errors": "replace"}  # a message may quote anything
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            env=os.environ | environment,
            start_new_session=True,
            **pipes,
            **text,
        )
    except OSError as error:
        raise BackendError(f"{command[0]} does not start: {error}") from None
    with process:
        try:
            said = process.communicate(timeout=seconds)
        except BaseException as error:
            with suppress(ProcessLookupError, PermissionError):  # it has just ended by itself
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                name = shlex.join(compiler())
                raise BackendError(f"{name} did not answer within {seconds} s") from None
            raise
    return subprocess.CompletedProcess(command, process.returncode, *said)


@cache
def compiler() -> tuple[str, ...]:
    """The words that call the C++ compiler: $CXX, which may hold a launcher or arguments ("ccache
    g++", "g++ -m64"), or the first of c++, g++ and clang++ on the path; BackendError where there is
    none."""
    asked = os.environ.get("CXX", "").strip()
    for first, *others in [_words(asked)] if asked else (["c++"], ["g++"], ["clang++"]):
        if found := shutil.which(first):
            return found, *others
    raise BackendError(
        f"no C++ compiler: {asked or 'c++, g++ and clang++'} not on the path; "
        "install g++ or clang++ (Debian: apt install g++, conda: cxx-compiler)"
    )


def _words(asked: str) -> list[str]:
    """A command's words, split as a shell would, unless it is a path with spaces."""
    if shutil.which(asked):
        return [asked]
    try:
        return shlex.split(asked)
    except ValueError as error:
        raise BackendError(f"CXX is no command: {asked!r}: {error}") from None


@cache
def machine() -> tuple[str, ...]:
    """What, beside sources and flags, decides whether a built library runs here; the compiler's
    version first."""
    version = _run([*compiler(), "--version"], ANSWER).stdout
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
