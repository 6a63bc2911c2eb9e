"""Where a result comes from: command, seed, processor, versions, checksum of the data.

Every study, benchmark and chapter stores this beside its figures, in data/results/.
"""

import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

CHECKSUMS = "checksums.json"  # what a command that makes a data set leaves in its folder


def provenance(
    command: str,
    packages: Sequence[str] = (),
    seed: int | None = None,
    data: str | Path | None = None,
) -> dict:
    """What made a result and on which machine, as JSON has it.

    packages: whose versions are told, None for one that is not installed; torch is always among
    them. data: the file or folder that the result was computed from. Keys: command, cpu, vectors
    (the instructions that torch uses), cores, system, python, versions, and seed and data (its
    `checksum`) where they are given. FileNotFoundError where data is not there.
    """
    about = {
        "command": command,
        "cpu": processor(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: installed_version(name) for name in ("torch", *packages)},
    }
    if seed is not None:
        about["seed"] = seed
    if data is not None:
        about["data"] = checksum(data)
    return about


def processor() -> str:
    """The processor's name, or as much as the operating system tells; never empty."""
    try:  # Linux
        listing = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        listing = ""
    if found := re.search(r"^model name\s*: *(\S.*)$", listing, re.M):
        return found[1].strip()
    if platform.system() == "Darwin":  # platform.processor() says "arm" for all of Apple's
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        try:
            told = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            pass
        else:
            if name := told.stdout.strip():
                return name
    return platform.processor() or platform.machine() or "unknown"


def installed_version(package: str) -> str | None:
    """The version of a package, or None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def checksum(data: str | Path) -> str | dict[str, str]:
    """The SHA-256 of a file, or of a folder's files and their names, as 64 hexadecimal digits.

    A folder with checksums.json has told what it holds: that is returned instead, such as
    {split: checksum} for data/digits. FileNotFoundError where data is not there.
    """
    data = Path(data)
    if data.is_file():
        return _file_checksum(data)
    if not data.is_dir():
        raise FileNotFoundError(f"no data at {data}")
    if (data / CHECKSUMS).is_file():
        return json.loads((data / CHECKSUMS).read_text())
    whole = hashlib.sha256()
    for path in sorted(path for path in data.rglob("*") if path.is_file()):
        whole.update(f"{path.relative_to(data).as_posix()}\0{_file_checksum(path)}\n".encode())
    return whole.hexdigest()


def _file_checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
