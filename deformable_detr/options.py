"""Options said once: a field of a configuration with its help, from which recipes, the command line
and the formats of others derive theirs."""

import dataclasses


def option(
    default: object, help: str, official: str | None = None, huggingface: str | tuple[str, ...] = ()
) -> object:
    """A dataclass field with a default and a line of help.

    official, huggingface: what the official code's arguments and transformers' config.json call it;
    several names of transformers' that must agree are a tuple. None and () where they have none.
    """
    theirs = (huggingface,) if isinstance(huggingface, str) else tuple(huggingface)
    return dataclasses.field(
        default=default, metadata={"help": help, "official": official, "huggingface": theirs}
    )


def help_of(config: object) -> dict[str, str]:
    """The line of help of each field of a configuration, by name."""
    return {field.name: field.metadata.get("help", "") for field in dataclasses.fields(config)}
