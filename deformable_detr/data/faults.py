"""A fault of a data set, and how many of them are said. Chapter your_own_data."""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from deformable_detr.data.names import printable

ONE_BY_ONE = 10  # faults of one kind that are listed; of more, the first stands for all


@dataclass
class Fault:
    """Something wrong with a data set, in one line. A fatal one would stop or spoil a training."""

    kind: str
    fatal: bool
    message: str
    image_id: Hashable | None = None
    annotation_id: Hashable | None = None

    def __post_init__(self) -> None:
        self.message = printable(self.message, len(self.message))  # whoever forgot a name in it

    def __str__(self) -> str:
        return f"{'FATAL' if self.fatal else 'warning'}: {self.message}"


def told(faults: list[Fault]) -> Iterator[str]:
    """A line for each fault; but only one where more than ONE_BY_ONE are of a kind, which have one
    cause."""
    kinds: dict[tuple, list[Fault]] = {}
    for fault in faults:
        kinds.setdefault((fault.kind, fault.fatal), []).append(fault)
    for (kind, fatal), of_kind in kinds.items():
        if len(of_kind) <= ONE_BY_ONE:
            yield from map(str, of_kind)
        else:
            level = "FATAL" if fatal else "warning"
            yield f"{level}: {len(of_kind)} x {kind}, the first: {of_kind[0].message}"
