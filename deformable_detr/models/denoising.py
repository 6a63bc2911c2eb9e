"""Denoising: noised objects as further queries in training, which must find what they were made of
(Li et al., 2022; Zhang et al., 2023). Chapter "Denoising"."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from deformable_detr.boxes import cxcywh_to_xyxy
from deformable_detr.losses.criterion import check_labels
from deformable_detr.models.base import Sets
from deformable_detr.models.deformable import DeformableDetector
from deformable_detr.options import option, with_default
from deformable_detr.structures import Denoising, Match, Queries, Target, Tokens


@dataclass(frozen=True)
class DenoisingOptions:
    """How objects are noised, beside the other options of a configuration; the defaults are those
    of DN-DETR."""

    label_noise: float = option(0.2, "share of noised objects whose class is drawn anew, in [0, 1]")
    box_noise: float = option(0.4, "how far noised boxes are from their objects, in half sides")
    empty_places: bool = option(
        False,
        "places of denoising that an image has no object for, because another has more, take part "
        "as in the official code, so that the loss depends on the batch",
    )

    def __post_init__(self) -> None:
        if not 0 <= self.label_noise <= 1:
            raise ValueError(f"label_noise must be in [0, 1], got {self.label_noise}")
        if not self.box_noise >= 0:
            raise ValueError(f"box_noise must be at least 0, got {self.box_noise}")
        super().__post_init__()


class Denoised(DeformableDetector):
    """A detector that learns from noised objects too, in groups, each of which has every object.

    In a batch they stand before all other queries, which may not look at them, and neither may one
    group at another: group by group, in each `copies` of all objects, one set after another; as
    many places for an image as the fullest one needs. A member of the family says how many groups
    there are, what noise is, and how a class becomes content.
    """

    config: DenoisingOptions
    copies = 1  # of an object in a group, of which the first must find it

    def groups_for(self, most: int) -> int:
        """How many groups there are, where an image has at most so many objects, and one has."""
        raise NotImplementedError

    def noise(self, boxes: Tensor, draws: Tensor) -> Tensor:
        """Noised boxes: (B, groups, copies, N, 4) cxcywh, and random numbers in [-1, 1) for them,
        to the same shape."""
        raise NotImplementedError

    def label_width(self) -> int:
        """Of a row in the table of classes."""
        return self.config.embed_dim

    def describe(self, labels: Tensor) -> Tensor:
        """The content (..., C) of noised objects with these labels."""
        return self.label_embed(labels)

    def build_queries(self) -> None:
        """Also a table of classes. Its last row is of none; published models have it."""
        super().build_queries()
        self.label_embed = nn.Embedding(self.config.num_classes + 1, self.label_width())

    def queries(self, memory: Tokens, targets: list[Target] | None) -> tuple[Queries, Sets]:
        """In training also the noised objects."""
        queries, sets = super().queries(memory, targets)
        return queries if targets is None else self.with_denoising(queries, targets), sets

    def with_denoising(self, queries: Queries, targets: list[Target]) -> Queries:
        """The queries after those of noised objects; ValueError names an image with a label that is
        no class."""
        check_labels(targets, self.config.num_classes)
        # so that the table has a gradient in a batch without objects too, as DDP demands
        content = queries.content + 0 * self.label_embed.weight[0, 0]
        queries = dataclasses.replace(queries, content=content)
        labels, boxes, exist = side_by_side(targets)
        most = exist.shape[1]
        groups = self.groups_for(most) if most else 0
        if not groups:
            return queries
        labels, boxes, exist = (
            x[:, None, None].expand(-1, groups, self.copies, *x.shape[1:])
            for x in (labels, boxes, exist)
        )
        changed, others, moves = draw(labels, self.config.num_classes)
        labels = others.where(changed < self.config.label_noise, labels)
        absent = ~exist.unsqueeze(-1)
        content = self.describe(labels).masked_fill(absent, 0).flatten(1, 3)
        references = self.noise(boxes, moves).masked_fill(absent, 0.5).flatten(1, 3)
        counts = [len(target.labels) for target in targets]
        matches, counted = matches_of(exist.shape[1:], counts), exist.flatten(1)
        known = Denoising(counted.shape[1], matches, groups, self.judged(counted))
        hidden = None if self.config.empty_places or min(counts) == most else ~counted
        return join(Queries(content, None, references, padding_mask=hidden), queries, known)

    def judged(self, exist: Tensor) -> Tensor | None:
        """Which of the places (B, size) have a prediction that counts; None is all."""
        return exist


@dataclass(frozen=True)
class ContrastiveOptions(DenoisingOptions):
    """How objects are noised with a contrast; the defaults are those of DINO."""

    label_noise: float = with_default(DenoisingOptions, "label_noise", 0.25)
    box_noise: float = with_default(DenoisingOptions, "box_noise", 1.0)
    denoising_pairs: int = option(
        100, "near and far copies of objects in an image, in training; 0 is none"
    )
    crossed_edges: bool = option(
        False, "sides of noised boxes may be negative, as in the official code, which cuts them off"
    )

    may_be_zero: ClassVar[tuple[str, ...]] = ("denoising_pairs",)


class Contrastive(Denoised):
    """Contrastive denoising (DINO, section 3.3): in each group, a near copy of every object, which
    must find it, and a farther one, which must say that there is none."""

    config: ContrastiveOptions
    copies = 2

    def groups_for(self, most: int) -> int:
        """As many as there are pairs for, and at least one."""
        pairs = self.config.denoising_pairs
        return max(1, pairs // most) if pairs else 0

    def noise(self, boxes: Tensor, draws: Tensor) -> Tensor:
        """Edges of the first copies move by less than box_noise half sides, those of the second by
        once to twice as much."""
        further = torch.arange(self.copies, device=boxes.device).view(-1, 1, 1)
        draws = draws + further * torch.where(draws < 0, -1.0, 1.0)
        return move_edges(boxes, draws, self.config.box_noise, not self.config.crossed_edges)

    def judged(self, exist: Tensor) -> Tensor | None:
        """In the official code empty places have to say that there is nothing, too."""
        return None if self.config.empty_places else exist


def side_by_side(targets: list[Target]) -> tuple[Tensor, Tensor, Tensor]:
    """Labels (B, N), boxes (B, N, 4), and whether there is such an object, (B, N); N is the most
    that an image has."""
    labels = [target.labels for target in targets]
    parts = labels, [t.boxes for t in targets], [torch.ones_like(x).bool() for x in labels]
    return tuple(pad_sequence(part, batch_first=True) for part in parts)


def draw(labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """The random numbers of noised objects: whether a label changes, in [0, 1); to which class; and
    four for the box, in [-1, 1)."""
    shape, device = labels.shape, labels.device
    changed = torch.rand(shape, device=device)
    others = torch.randint(num_classes, shape, device=device)
    return changed, others, 2 * torch.rand(*shape, 4, device=device) - 1


def matches_of(sizes: tuple[int, int, int], counts: list[int]) -> list[Match]:
    """For images with so many objects, the places of first copies, and which objects are there.
    sizes: groups, copies, N."""
    groups, copies, most = sizes
    places = torch.arange(groups * copies * most).view(sizes)[:, 0]  # (groups, N)
    return [(places[:, :n].flatten(), torch.arange(n).repeat(groups)) for n in counts]


def join(noised: Queries, queries: Queries, known: Denoising) -> Queries:
    """Both, the noised ones first, with what is known of them, and the masks between them."""
    B, total = queries.content.shape[:2]
    mask = denoising_mask(known.groups, known.size, total, queries.content.device)
    empty = noised.padding_mask
    if empty is not None:
        empty = torch.cat([empty, empty.new_zeros(B, total)], 1)
    return dataclasses.replace(
        queries,
        content=torch.cat([noised.content, queries.content], 1),
        references=torch.cat([noised.references, queries.references], 1),
        attention_mask=mask,
        denoising=known,
        padding_mask=empty,
    )


def denoising_mask(groups: int, size: int, total: int, device: torch.device) -> Tensor:
    """(size + total) squared, True where one query may not look at another: the total at the end
    not at the noised ones, and these not at other groups'. They may look at the total."""
    group = torch.arange(size, device=device) // (size // groups)
    group = torch.cat([group, group.new_full((total,), groups)])
    return (group[:, None] != group) & (group < groups)


# Noise


def shift(boxes: Tensor, draws: Tensor, scale: float) -> Tensor:
    """DN-DETR's noise: centres that are off by up to scale half sides, and sides by up to scale of
    themselves, all kept in [0, 1]. boxes: (..., 4) cxcywh. draws: as boxes, in [-1, 1)."""
    sides = boxes[..., 2:]
    reach = torch.cat([sides / 2, sides], -1)
    return (boxes + draws * reach * scale).clamp(0, 1)


def move_edges(boxes: Tensor, draws: Tensor, scale: float, sort: bool = True) -> Tensor:
    """Boxes of which each edge has moved by draws times scale half sides, kept in [0, 1].

    boxes: (..., 4) cxcywh. draws: as boxes; from 1 on, edges may cross. sort: such boxes are those
    between the edges; else their sides are negative. Returns cxcywh.
    """
    half = torch.cat([boxes[..., 2:]] * 2, -1) / 2
    start, end = (cxcywh_to_xyxy(boxes) + draws * half * scale).clamp(0, 1).split(2, -1)
    if sort:
        start, end = start.minimum(end), start.maximum(end)
    return torch.cat([(start + end) / 2, end - start], -1)
