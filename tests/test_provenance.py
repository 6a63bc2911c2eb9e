"""Where results come from: told completely, on every system, and the same for the same data."""

import hashlib
import json
import platform
import re
import subprocess
from pathlib import Path

import pytest

from deformable_detr import provenance as module
from deformable_detr.provenance import checksum, installed_version, processor, provenance


def on_system(monkeypatch, system, cpuinfo=None, brand=None, told=""):
    """A machine whose system, /proc/cpuinfo, sysctl and platform.processor() say this."""

    def read_text(path, **options):
        assert path == Path("/proc/cpuinfo")
        if cpuinfo is None:
            raise FileNotFoundError(path)
        return cpuinfo

    def run(command, **options):
        assert system == "Darwin" and command[0] == "sysctl"
        if brand is None:
            raise FileNotFoundError(command[0])
        return subprocess.CompletedProcess(command, 0, stdout=brand)

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(module.subprocess, "run", run)
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "processor", lambda: told)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")


X86 = "processor\t: 0\nmodel\t\t: 1\nmodel name\t: AMD EPYC 7B13 \nflags\t\t: fpu\n"
ARM = "processor\t: 0\nCPU implementer\t: 0x41\n"
MACHINES = {
    "Linux": ({"system": "Linux", "cpuinfo": X86}, "AMD EPYC 7B13"),
    "Linux on ARM": ({"system": "Linux", "cpuinfo": ARM}, "aarch64"),
    "Linux without /proc": ({"system": "Linux", "told": "x86_64"}, "x86_64"),
    "a nameless virtual machine": ({"system": "Linux", "cpuinfo": "model name\t: \n"}, "aarch64"),
    "macOS": ({"system": "Darwin", "brand": "Apple M2\n", "told": "arm"}, "Apple M2"),
    "macOS without sysctl": ({"system": "Darwin", "told": "arm"}, "arm"),
    "Windows": ({"system": "Windows", "told": "Intel64 Family 6"}, "Intel64 Family 6"),
}


@pytest.mark.parametrize("name", MACHINES)
def test_every_system_names_its_processor(monkeypatch, name):
    machine, expected = MACHINES[name]
    on_system(monkeypatch, **machine)
    assert processor() == expected


def test_this_machine_is_named():
    assert processor().strip() == processor() != ""


def test_what_is_told():
    about = provenance("python study.py", ("numpy", "no-such-package"))
    assert list(about) == ["command", "cpu", "vectors", "cores", "system", "python", "versions"]
    assert about["command"] == "python study.py" and about["cores"] >= 1
    assert list(about["versions"]) == ["torch", "numpy", "no-such-package"]
    assert about["versions"]["no-such-package"] is None
    assert about["versions"]["torch"] == installed_version("torch") is not None
    assert json.loads(json.dumps(about)) == about


def test_seed_and_data_are_told_where_they_are_given(tmp_path):
    (tmp_path / "file").write_bytes(b"data")
    about = provenance("x", seed=0, data=tmp_path / "file")
    assert about["seed"] == 0
    assert about["data"] == hashlib.sha256(b"data").hexdigest()
    with pytest.raises(FileNotFoundError, match=r"no data at .*nothing"):
        provenance("x", data=tmp_path / "nothing")


def test_a_folder_is_its_files_and_their_names(tmp_path):
    for folder in ("one", "other"):
        (tmp_path / folder / "train").mkdir(parents=True)
        for name in ("b.png", "a.png", "train/c.png"):
            (tmp_path / folder / name).write_text(name)
    one, other = tmp_path / "one", tmp_path / "other"
    before = checksum(one)
    assert checksum(str(other)) == before
    (other / "a.png").write_text("changed")
    assert checksum(other) != before
    (other / "a.png").write_text("a.png")
    (other / "a.png").rename(other / "z.png")
    assert checksum(other) != before


def test_a_folder_that_has_checksums_is_believed(tmp_path):
    (tmp_path / "checksums.json").write_text('{"train": "1", "val": "2"}')
    (tmp_path / "image.png").write_text("image")
    assert checksum(tmp_path) == {"train": "1", "val": "2"}


ROOT = Path(__file__).parents[1]
MAKERS = [*ROOT.glob("experiments/*.py"), *ROOT.glob("benchmarks/*.py"), ROOT / "book/chapters.py"]


@pytest.mark.parametrize("path", MAKERS, ids=lambda path: path.stem)
def test_what_makes_results_says_where_they_come_from(path):
    """All of it here, nothing by other means."""
    text = path.read_text(encoding="utf-8")
    beside = (
        path.with_name(f"{name}.py") for name in re.findall(r"^from (\w+) import", text, re.M)
    )
    whole = text + "".join(file.read_text(encoding="utf-8") for file in beside if file.exists())
    assert "data/results" not in text.split("import")[0] or " provenance(" in whole
    for other in ("cpuinfo", "importlib.metadata", "platform."):
        assert other not in text.replace("sys.platform", ""), f"{path.name} asks {other} by itself"
