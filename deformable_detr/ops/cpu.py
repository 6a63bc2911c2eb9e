"""The kernel for the CPU: kernels/ms_deform_attn.cu, built by the C++ compiler at first use.

One library for each (dtype, D, L * K), about a second each, kept in a folder of the user's own:
$DEFORMABLE_DETR_CACHE, or deformable_detr in $XDG_CACHE_HOME or ~/.cache.
"""

import atexit
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import textwrap
import threading
from collections.abc import Callable
from functools import cache, lru_cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from deformable_detr.ops.errors import BackendError

FLAGS = (
    "-std=c++17",
    "-O3",
    "-pthread",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
)
NAMES = {torch.float32: "float", torch.float64: "double"}
SMALL = 1 << 18  # channels sampled, below which a second thread costs more than it gives


def forward(
    value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """The operator; arguments are checked, of one dtype, on the CPU. Returns (B, Q, M * D)."""
    value, locations, weights = (x.contiguous() for x in (value, locations, weights))
    B, S, M, D = value.shape
    Q, K = locations.shape[1], locations.shape[4]
    output, table = value.new_empty(B, Q, M * D), levels(tuple(shapes), K)
    if output.numel():
        library = load(value.dtype, D, len(shapes) * K, S * M * D >= 2**31)
        done = library.forward(
            *pointers(value, table, locations, weights, output),
            *sizes(B, S, Q, M),
            _threads(weights.numel() * D),
        )
        _memory_sufficed(done)
    return output


def backward(
    value: Tensor,
    shapes: list[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    grad_output: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of value, locations and weights; arguments as in `forward`."""
    inputs = value, locations, weights, grad_output
    value, locations, weights, grad_output = (x.contiguous() for x in inputs)
    B, S, M, D = value.shape
    Q, K = locations.shape[1], locations.shape[4]
    make = torch.empty_like if value.numel() else torch.zeros_like
    gradients, table = [make(x) for x in (value, locations, weights)], levels(tuple(shapes), K)
    if value.numel():
        library = load(value.dtype, D, len(shapes) * K, S * M * D >= 2**31)
        done = library.backward(
            *pointers(value, table, locations, weights, grad_output, *gradients),
            *sizes(B, S, Q, M),
            _threads(weights.numel() * D),
        )
        _memory_sufficed(done)
    return tuple(gradients)


@lru_cache(1024)
def levels(shapes: tuple[tuple[int, int], ...], K: int) -> Tensor:
    """The kernel's struct Levels, for reading: every point's height, width and first token."""
    starts = [sum(h * w for h, w in shapes[:level]) for level in range(len(shapes))]
    rows = [h for h, _ in shapes], [w for _, w in shapes], starts
    return torch.tensor([[n for n in row for _ in range(K)] for row in rows], dtype=torch.int32)


def pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    """The addresses of contiguous tensors, good while the caller holds these."""
    return [ctypes.c_void_p(x.data_ptr()) for x in tensors]


def sizes(B: int, S: int, Q: int, M: int) -> tuple[ctypes.c_longlong | ctypes.c_int, ...]:
    """The kernel's images, tokens, queries and heads."""
    return ctypes.c_longlong(B), ctypes.c_int(S), ctypes.c_int(Q), ctypes.c_int(M)


def _memory_sufficed(done: bool) -> None:
    if not done:
        raise RuntimeError("ms_deform_attn can't allocate memory, or start a thread")


def _threads(work: int) -> ctypes.c_int:
    return ctypes.c_int(1 if work < SMALL else torch.get_num_threads())


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


@once
def why_not() -> str | None:
    """Why this backend cannot run here, or None where it can, as building the paper's shows."""
    if os.name != "posix":
        return "needs Linux or macOS"
    try:
        load(torch.float32, 32, 16)
    except BackendError as error:
        return textwrap.shorten(str(error), 500)
    return None


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


@once
def load(dtype: torch.dtype, D: int, points: int, huge: bool = False) -> ctypes.CDLL:
    """The library for one dtype, D channels a head, and L * K points; built where it is not yet.

    huge: offsets of 64 bits. Raises BackendError where the compiler fails, or what is in the cache
    is no library.
    """
    macros = {"VALUE": NAMES[dtype], "REAL": NAMES[dtype], "D": D, "POINTS": points}
    macros["OFFSET"] = "long long" if huge else "int"
    try:
        library = build(macros, openmp())
    except OSError as error:
        raise BackendError(f"the kernel could not be built: {error}") from None
    try:
        loaded = ctypes.CDLL(str(library))
    except OSError as error:
        raise BackendError(
            f"the built kernel does not load ({error}); remove {library} to build it anew, or set "
            "DEFORMABLE_DETR_CACHE to a folder from which programs may run"
        ) from None
    loaded.forward.restype = loaded.backward.restype = ctypes.c_bool
    return loaded


@cache
def openmp() -> tuple[str, ...]:
    """-fopenmp, where GCC's OpenMP is loaded already, which torch's own threads then mostly run on;
    else nothing.

    With a second one, or threads of its own, the kernel would compete with torch's, which go on
    spinning for some milliseconds after their last work.
    """
    try:
        ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return ()
    return ("-fopenmp",) if "Free Software Foundation" in _machine()[0] else ()  # GCC


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
    folder_of_sources = sources()
    command = [
        compiler(),
        *FLAGS,
        *(() if program else ("-shared", "-fPIC")),
        _native(),
        *(f"-D{name}={x}" for name, x in macros.items()),
        *flags,
    ]
    key = hashlib.sha256("\0".join([*command, *_machine()]).encode())
    for name in ("ms_deform_attn.cu", source):
        key.update(folder_of_sources.joinpath(name).read_bytes())
    folder = cache_folder()
    library = folder / f"{key.hexdigest()[:32]}.so"
    if not library.exists():
        folder.mkdir(mode=0o700, exist_ok=True)  # whoever removed it since
        with (
            resources.as_file(folder_of_sources) as source_folder,
            tempfile.TemporaryDirectory(dir=folder, prefix="building-") as temporary,
        ):
            made = Path(temporary) / "kernel.so"
            run = subprocess.run(
                [*command, str(source_folder / source), "-o", str(made)],
                capture_output=True,
                text=True,
            )
            if run.returncode:
                said = run.stderr[-2000:] or f"it said nothing, and returned {run.returncode}"
                raise BackendError(f"{command[0]} could not build the kernel:\n{said}")
            made.chmod(0o700)  # whatever the umask
            os.replace(made, library)  # whole or not at all, also with several processes at once
    refuse_unsafe(library)
    return library


def sources() -> Traversable:
    """The folder of the kernels' sources: the package's, or the source tree's, not installed."""
    try:
        return resources.files("deformable_detr.kernels")
    except ModuleNotFoundError:
        return Path(__file__).parents[2] / "kernels"


def _native() -> str:
    return "-march=native" if platform.machine() in ("x86_64", "AMD64", "i686") else "-mcpu=native"


@cache
def _machine() -> tuple[str, ...]:
    """What, beside sources and flags, decides whether a built library runs here."""
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True).stdout
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = sorted({x for x in lines if x.startswith(("flags", "Features", "model name"))})
    except OSError:
        processor = [platform.processor()]
    return version, platform.machine(), *processor


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
        return _temporary()
    refuse_unsafe(folder)
    return folder


@once
def _temporary() -> Path:
    """Removed when this process ends, not a fork of it: a home that cannot be written to costs a
    build each time."""
    folder, owner = Path(tempfile.mkdtemp(prefix="deformable_detr-")), os.getpid()

    def remove() -> None:
        if os.getpid() == owner:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


@cache
def _unmapped_root() -> set[int]:
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


def refuse_unsafe(path: Path) -> None:
    """BackendError where another user could have written `path` or may replace it."""
    path = path.resolve()
    for place in (path, *path.parents):
        status = place.stat()
        others = stat.S_IWGRP | stat.S_IWOTH
        shared = status.st_mode & others and not (place != path and status.st_mode & stat.S_ISVTX)
        owners = {0, os.geteuid()} | (_unmapped_root() if place != path else set())
        if shared or status.st_uid not in owners:
            wrong = "other users can write to" if shared else f"user {status.st_uid} owns"
            raise BackendError(
                f"kernels are not loaded from {path}: {wrong} {place}; "
                f"{'`chmod go-w` it, or ' if shared else ''}"
                "set DEFORMABLE_DETR_CACHE to a folder of your own"
            )
