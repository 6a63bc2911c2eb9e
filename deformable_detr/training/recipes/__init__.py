"""Recipes: how to train which model, as small files with a reason beside each value; `recipe` reads
them. Chapter recipe."""

import tomllib
from pathlib import Path

FOLDER = Path(__file__).parent
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


def about(name: str) -> str:
    """What a recipe in NAMES says that it is."""
    return tomllib.loads((FOLDER / f"{name}.toml").read_text("utf-8"))["about"]
