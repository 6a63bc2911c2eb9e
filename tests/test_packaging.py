"""One list of dependencies, complete and in step everywhere."""

import ast
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from importlib.metadata import entry_points, packages_distributions
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]
OWN = {"deformable_detr", "tests", "chapters", "build", "conf", "make_digits", "readme"}
OWN |= {"rendering", "schematics"} | {path.stem for path in (ROOT / "book").glob("*.py")}
OWN |= {"benchmarks", "MultiScaleDeformableAttention"}  # scripts; a name that we install
OWN |= {path.stem for path in (ROOT / "experiments").glob("*.py")}


def distributions(requirements: list[str]) -> set[str]:
    """The names of requirements, in the one spelling that the index compares."""
    names = (re.match(r"[\w.-]+", requirement)[0] for requirement in requirements)
    return {re.sub(r"[-_.]+", "-", name).lower() for name in names}


def imported(folder: Path) -> set[str]:
    """The top-level modules that the Python files below a folder import."""
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - OWN


def undeclared(folder: str, declared: set[str]) -> set[str]:
    """The modules imported below a folder that no declared distribution provides."""
    providers = packages_distributions()
    return {
        module
        for module in imported(ROOT / folder)
        if not distributions(providers.get(module, [])) & declared
    }


def test_environment_installs_the_project_with_every_extra_but_the_gpu_s():
    (pip,) = (entry["pip"] for entry in ENVIRONMENT["dependencies"] if isinstance(entry, dict))
    (requirement,) = pip
    extras = re.fullmatch(r"-e \.\[([\w,]+)\]", requirement)[1].split(",")
    assert sorted(extras) == sorted(set(EXTRAS) - {"cuda12", "cuda13"})
    # CuPy: one package for each CUDA
    assert ENVIRONMENT["name"] == PROJECT["project"]["name"]


def test_environment_has_the_python_versions_of_the_project():
    conda = [entry for entry in ENVIRONMENT["dependencies"] if isinstance(entry, str)]
    assert {"cxx-compiler", "pip"} <= set(conda)
    (python,) = (entry for entry in conda if entry.startswith("python"))
    lowest, beyond = re.fullmatch(r"python>=3\.(\d+),<3\.(\d+)", python).groups()
    assert PROJECT["project"]["requires-python"] == f">=3.{lowest}"
    label = "Programming Language :: Python :: 3."
    classified = [c for c in PROJECT["project"]["classifiers"] if c.startswith(label)]
    assert classified == [f"{label}{minor}" for minor in range(int(lowest), int(beyond))]
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py3{lowest}"


def test_every_package_is_listed_and_exists():
    mapped = PROJECT["tool"]["setuptools"]["package-dir"]
    listed = PROJECT["tool"]["setuptools"]["packages"]
    for package in listed:
        folder = ROOT / mapped.get(package, package.replace(".", "/"))
        assert (folder / "__init__.py").is_file(), package
    folders = {path.parent for path in (ROOT / "deformable_detr").rglob("*.py")}
    found = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert found | set(mapped) == set(listed)


def test_the_library_imports_only_what_it_declares():
    declared = distributions(PROJECT["project"]["dependencies"])
    # of extras: CuPy, under a name that depends on the CUDA, and what runs an exported file;
    # supervision is optional
    assert undeclared("deformable_detr", declared) <= {"cupy", "onnxruntime", "supervision"}


@pytest.mark.parametrize("folder", ["book", "chapters", "data", "experiments", "tests"])
def test_the_rest_imports_only_what_the_extras_declare(folder):
    assert "deformable-detr[export]" in EXTRAS["book"]
    extra = EXTRAS["book"] + EXTRAS["export"] + (EXTRAS["dev"] if folder == "tests" else [])
    declared = distributions(PROJECT["project"]["dependencies"] + extra)
    assert (ROOT / folder).is_dir()
    assert undeclared(folder, declared) == set()


def test_the_command_is_installed():
    (command,) = (
        entry for entry in entry_points(group="console_scripts") if entry.name == "deformable-detr"
    )
    assert command.value == PROJECT["project"]["scripts"]["deformable-detr"]
    script = shutil.which(command.name, path=sysconfig.get_path("scripts"))
    ran = subprocess.run([script, "--help"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    for name in ("train", "evaluate", "predict", "check"):
        assert name in ran.stdout
