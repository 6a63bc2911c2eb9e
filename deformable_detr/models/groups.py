"""Several groups of learned queries in training, of which each finds all objects, and the first
alone afterwards (Chen et al., 2023). Chapter "Groups and queries"."""

import dataclasses
from dataclasses import dataclass

from deformable_detr.models.base import BaseDetector, Sets
from deformable_detr.options import option
from deformable_detr.structures import Queries, Target, Tokens


@dataclass(frozen=True)
class GroupOptions:
    """How many groups there are, beside the other options of a configuration."""

    groups: int = option(11, "groups of num_queries queries each, in training; one is used after")


class Grouped(BaseDetector):
    """A detector with learned queries that has config.groups times as many while it is trained.

    Self-attention is within groups, all else is shared, and each group is matched by itself; so
    every object has as many queries that learn from it, and the loss is the mean of the groups'.
    """

    config: GroupOptions

    def learned_queries(self) -> int:
        """Those of all groups, one after another."""
        return self.config.groups * self.config.num_queries

    def queries(self, memory: Tokens, targets: list[Target] | None) -> tuple[Queries, Sets]:
        """All of them in training, else those of the first group."""
        queries, sets = super().queries(memory, targets)
        if targets is not None:
            return dataclasses.replace(queries, groups=self.config.groups), sets
        parts = queries.content, queries.position, queries.references
        N = self.config.num_queries
        return Queries(*(None if x is None else x[:, :N] for x in parts)), sets
