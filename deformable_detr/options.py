"""Options said once: a field of a configuration with its help, from which recipes, the command line
and the formats of others derive theirs."""

import dataclasses
import difflib
import tomllib
import typing
from collections.abc import Iterable, Mapping
from typing import Any

NOUNS = {  # what values of these types are called
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple: "a list of texts",
    dict: "a table",
}


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


def with_default(config: type, name: str, default: object) -> Any:
    """The field `name` of a configuration with another default, for a class that inherits it."""
    field = next(field for field in dataclasses.fields(config) if field.name == name)
    return dataclasses.field(default=default, metadata=field.metadata)


def help_of(config: object) -> dict[str, str]:
    """The line of help of each field of a configuration, by name."""
    return {field.name: field.metadata.get("help", "") for field in dataclasses.fields(config)}


def types_of(kind: type) -> dict[str, type]:
    """The type of each field of a configuration class, by name."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def checked(given: Mapping[str, object], types: Mapping[str, type], what: str) -> dict[str, object]:
    """Values as a configuration takes them: of a list a tuple, of a whole number a float where one
    is wanted, and of "none" None where an option may be that.

    given: by name, as TOML has them. types: from `types_of`. what: the name of the configuration in
    messages. ValueError, in one line, on an unknown name, with those that exist, and on a value of
    another type.
    """
    values = {}
    for name, value in given.items():
        if name not in types:
            hint = meant(name, types)
            raise ValueError(f"{what} has no {name!r}{hint}; it has {', '.join(types)}")
        values[name] = _fit(value, types[name], name)
    return values


def meant(given: str, known: Iterable[str]) -> str:
    """The nearest of the known names, as a message asks for it; "" where none is near."""
    near = difflib.get_close_matches(given, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def parse_settings(
    settings: Iterable[str], tables: tuple[str, ...]
) -> dict[str, dict[str, object]]:
    """What `--set` was given, TABLE.NAME=VALUE each, as a TOML file would hold it: for each table
    its values by name. Of a name that is given twice the last value counts."""
    found: dict[str, dict[str, object]] = {table: {} for table in tables}
    for setting in settings:
        place, equals, text = setting.partition("=")
        table, _, name = place.strip().partition(".")
        if not (equals and name and table in found):
            forms = " or ".join(f"{table}.NAME=VALUE" for table in tables)
            hint = meant(table, tables) if equals and name else ""
            raise ValueError(f"--set takes {forms}, got {setting!r}{hint}")
        found[table][name] = parse_value(text.strip())
    return found


def parse_value(text: str) -> object:
    """The value that a text is in TOML; what is none, such as a bare word, is the text itself."""
    try:
        content = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return content["value"] if len(content) == 1 else text


def plain_type(kind: type) -> type:
    """The type in NOUNS that an option has, whatever is in it and whether or not it may be None."""
    arguments = [each for each in typing.get_args(kind) if each is not type(None)]
    if typing.get_origin(kind) is tuple or not arguments:
        return typing.get_origin(kind) or kind
    return plain_type(arguments[0])


def _fit(value: object, kind: type, name: str) -> object:
    expected = plain_type(kind)
    if value == "none" and type(None) in typing.get_args(kind):
        return None
    if expected is tuple:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
    elif type(value) is expected:
        return value
    elif expected is float and type(value) is int:
        return float(value)
    raise ValueError(f"{name} must be {NOUNS[expected]}, got {value!r}")
