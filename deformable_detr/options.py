"""Options said once: a field of a configuration with its help, from which recipes, the command line
and the formats of others derive theirs."""

import dataclasses
from typing import Any


def option(
    default: object,
    help: str,
    official: str | tuple[str, ...] = (),
    huggingface: str | tuple[str, ...] = (),
) -> Any:
    """A dataclass field with a default and a line of help.

    official, huggingface: what the official code's arguments and transformers' config.json call it;
    a tuple where they have several that must agree, empty where they have none.
    """
    theirs = {
        name: (names,) if isinstance(names, str) else names
        for name, names in (("official", official), ("huggingface", huggingface))
    }
    return dataclasses.field(default=default, metadata={"help": help} | theirs)


def help_of(config: object) -> dict[str, str]:
    """The line of help of each field of a configuration, by name."""
    return {field.name: field.metadata.get("help", "") for field in dataclasses.fields(config)}
