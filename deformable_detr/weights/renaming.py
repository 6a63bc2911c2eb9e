"""Names of tensors and options, ours and others', translated in both directions. Chapter
published_weights.

A model's table stands in a small file of its own; here is what applies it, strictly: a tensor that
is missing, left over or of another shape is an error that names it.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deformable_detr.data.names import counted
from deformable_detr.options import checked, types_of
from deformable_detr.weights.reading import State, as_weights, shown

Renaming = list[tuple[str, str]]  # (ours, theirs); the first that fits a name's start is applied
Place = tuple[str, int | None]  # our name of a tensor, and which third of it, or None for all
Table = dict[str, Place]  # by their names; of one place there may be several
Copies = Callable[[str], list[str]]


@dataclass(frozen=True)
class Layout:
    """What a format calls the tensors of a model.

    whole: for whole names; encoder, decoder: for what follows `encoder.layers.N.` and
    `decoder.layers.N.`. thirds: whether an attention's in_proj, one tensor of 3 C rows, is three
    there.
    """

    whole: Renaming
    encoder: Renaming
    decoder: Renaming
    thirds: bool = False

    def table(self, names: Iterable[str], copies: Copies) -> Table:
        """Every name of their state dict, and the place of its tensor in ours.

        names: of our state dict. copies: all the names, as they would be here, under which they
        have a tensor of ours.
        """
        return {
            theirs: (name, third)
            for name in names
            for copy in copies(name)
            for theirs, third in self.rename(copy)
        }

    def rename(self, name: str) -> list[Place]:
        """Their name of one of ours, or three of them and which third each is."""
        layer = re.fullmatch(r"(encoder|decoder)\.(layers\.\d+)\.(.+)", name)
        if not layer:
            return [(replace_start(name, self.whole), None)]
        kind, index, rest = layer.groups()
        start = replace_start(f"{kind}.{index}.", self.whole)
        theirs = start + replace_start(rest, getattr(self, kind))
        if self.thirds and ".in_proj_" in theirs:
            return [(theirs.replace(".in_proj_", f".{x}_proj."), i) for i, x in enumerate("qkv")]
        return [(theirs, None)]


def replace_start(name: str, renaming: Renaming) -> str:
    """Their name of one of ours: the first pair whose part of ours it starts with is applied."""
    ours, theirs = next(pair for pair in renaming if name.startswith(pair[0]))
    return theirs + name[len(ours) :]


def to_theirs(state: State, table: Table) -> State:
    """Our tensors under their names: views of them, no copies."""
    return {
        theirs: state[name] if third is None else state[name].chunk(3)[third]
        for theirs, (name, third) in table.items()
    }


def to_ours(state: State, expected: State, table: Table, source: object) -> State:
    """A state dict under our names, in our dtypes, every tensor accounted for.

    expected: our state dict, for its shapes. table: of `Layout.table`. source: what the error
    names. Raises ValueError on a tensor that is missing, left over, of another shape, of integers,
    not finite, or that differs between two names that stand for one.
    """
    found: dict[Place, Tensor] = {}
    for theirs, place in table.items():
        if theirs not in state:
            continue
        tensor, like = state[theirs], expected[place[0]]
        shape = list(like.shape) if place[1] is None else [len(like) // 3, *like.shape[1:]]
        if list(tensor.shape) != shape:
            given = f"{tuple(tensor.shape)}, expected {tuple(shape)}"
            raise ValueError(f"{source}: tensor {theirs} has shape {given}")
        if place not in found:
            found[place] = as_weights(tensor, like, theirs, source)
        elif not torch.equal(found[place], tensor.to(like.dtype)):
            raise ValueError(f"{source}: {theirs} differs from another name of the same tensor")
    first_names = {place: theirs for theirs, place in reversed(table.items())}
    require_same(
        {theirs for place, theirs in first_names.items() if place not in found},
        state.keys() - table,
        source,
    )
    parts: dict[str, list[Tensor]] = {}
    for (name, _), tensor in found.items():  # in the order of q, k, v
        parts.setdefault(name, []).append(tensor)
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def require_same(missing: Iterable[str], left_over: Iterable[str], source: object) -> None:
    """ValueError where there are names in either."""
    for problem, names in (("lacks", sorted(missing)), ("has left over", sorted(left_over))):
        if names:
            raise ValueError(
                f"{source} {problem} {counted(len(names), 'tensor')}, such as {shown(names[0])}"
            )


def to_their_options(config: object, form: str) -> dict[str, object]:
    """A configuration under their names. form: "official" or "huggingface"."""
    return {
        theirs: getattr(config, field.name)
        for field in dataclasses.fields(config)
        for theirs in field.metadata.get(form, ())
    }


def to_our_options(content: Mapping, kind: type, form: str) -> dict[str, object]:
    """Options of a configuration class from theirs; what is not said has the default, which is the
    same here and there.

    ValueError where one has another type, or where two of theirs that are one here differ.
    """
    options: dict[str, object] = {}
    for field in dataclasses.fields(kind):
        for theirs in field.metadata.get(form, ()):
            value = field.default if content.get(theirs) is None else content[theirs]
            if not isinstance(value, bool | int | float | str):  # it may be too deep to be shown
                raise ValueError(f"{theirs} must be a number or a text, got {type(value).__name__}")
            if options.setdefault(field.name, value) != value:
                first = f"{field.name} {options[field.name]!r:.80}"
                raise ValueError(f"it has {first} and, as {theirs}, {value!r:.80}")
    return checked(options, types_of(kind), kind.__name__)
