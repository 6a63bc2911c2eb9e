"""What flows between data, model and results: one object each.
Chapters pixels_to_boxes and refinement."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

Match = tuple[Tensor, Tensor]  # the indices of predictions, and those of their objects


@dataclass
class Target:
    """The objects of one image.

    image_id: the data's own, of any kind, which no array ever holds.
    labels: (N,) int64, contiguous class indices. boxes: (N, 4) cxcywh, normalised to [0, 1].
    original_size: (H, W) in pixels, before any resizing.
    """

    image_id: Hashable
    labels: Tensor
    boxes: Tensor
    original_size: tuple[int, int]

    def to(self, device: torch.device | str) -> Target:
        """The same target with its tensors on a device."""
        return replace(self, labels=self.labels.to(device), boxes=self.boxes.to(device))


@dataclass
class Batch:
    """Images of different sizes as one tensor, padded on the right and at the bottom.

    images: (B, 3, H, W), zero on padding. mask: (B, H, W) bool, True on padding. sizes: (B, 2)
    int64, (H, W) of each image before padding. targets: B of them, or None.
    """

    images: Tensor
    mask: Tensor
    sizes: Tensor
    targets: list[Target] | None = None

    @classmethod
    def from_images(cls, images: list[Tensor], targets: list[Target] | None = None) -> Batch:
        """Pad images, each (3, h, w), to the largest height and width among them."""
        if not images:
            raise ValueError("a batch needs at least one image")
        wrong = [tuple(image.shape) for image in images if image.ndim != 3 or len(image) != 3]
        if wrong:
            raise ValueError(f"images must be (3, h, w), got {wrong[0]}")
        sizes = torch.tensor([image.shape[-2:] for image in images])
        height, width = sizes.amax(0).tolist()
        padded = images[0].new_zeros(len(images), 3, height, width)
        mask = torch.ones(len(images), height, width, dtype=torch.bool, device=padded.device)
        for i, image in enumerate(images):
            h, w = image.shape[-2:]
            padded[i, :, :h, :w] = image
            mask[i, :h, :w] = False
        return cls(padded, mask, sizes, targets)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on a device."""
        targets = None if self.targets is None else [t.to(device) for t in self.targets]
        tensors = (self.images.to(device), self.mask.to(device), self.sizes.to(device))
        return Batch(*tensors, targets)

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Tokens:
    """L feature maps as one sequence of S = sum(H_l * W_l) tokens.

    features, position: (B, S, C). padding_mask: (B, S), True on padding. spatial_shapes: L pairs
    (H, W). valid_ratios: (B, L, 2), the part of each level that is image, as (x, y) in (0, 1].
    """

    features: Tensor
    position: Tensor
    padding_mask: Tensor
    spatial_shapes: list[tuple[int, int]]
    valid_ratios: Tensor


@dataclass
class Denoising:
    """What is known of queries that are noised objects (DN-DETR): which must find which.

    size: the first queries of all are such, so many. matches: of each image, which of them must
    find which object. groups: how many copies of each object there are. counted: (B, size), False
    where a place was left empty, whose prediction is not judged; None where all are.
    """

    size: int
    matches: list[Match]
    groups: int = 1
    counted: Tensor | None = None


@dataclass(frozen=True)
class Queries:
    """What asks: object queries in a decoder, tokens in an encoder.

    content: (B, Q, C). position: (B, Q, C), what is added to the content wherever places matter;
    None where the decoder makes it from the references. references: (B, Q, 2) as (x, y) or
    (B, Q, 4) as cxcywh, relative to the image without its padding; None where attention is dense.
    attention_mask: (Q, Q) bool, True where one query may not look at another. groups: of equal
    size, each of which finds all objects and knows nothing of the others (Group DETR). denoising:
    what is known of the first ones, which are of no group. padding_mask: (B, Q) bool, True where a
    place is empty, at which nobody looks.
    """

    content: Tensor
    position: Tensor | None = None
    references: Tensor | None = None
    attention_mask: Tensor | None = None
    groups: int = 1
    denoising: Denoising | None = None
    padding_mask: Tensor | None = None


@dataclass
class Predictions:
    """One set of predictions that training supervises: what a layer says of every query.

    logits: (B, Q, outputs). boxes: (B, Q, 4) cxcywh, normalised to each image without its padding.
    references: (B, Q, 2 or 4), what the boxes started from. matches: of each image, where it is
    known beforehand which query must find which object. groups: of queries, each matched by itself.
    counted: (B, Q), False where a query is neither matched nor judged. class_agnostic: objects are
    only told from background, as class 0.
    """

    logits: Tensor
    boxes: Tensor
    references: Tensor | None = None
    matches: list[Match] | None = None
    groups: int = 1
    counted: Tensor | None = None
    class_agnostic: bool = False

    def queries(self, start: int, end: int | None = None) -> Predictions:
        """Those of a range of queries."""
        part = slice(start, end)
        rows = (None if x is None else x[:, part] for x in (self.references, self.counted))
        references, counted = rows
        return replace(
            self,
            logits=self.logits[:, part],
            boxes=self.boxes[:, part],
            references=references,
            counted=counted,
        )


@dataclass
class Output(Predictions):
    """What a detector returns: the last decoder layer's predictions, and all others beside them.

    auxiliary: the earlier decoder layers, first to last. others: further sets by name, such as
    "first", the proposals of a two-stage model. scoring: how logits are read; None is focal
    (`losses.scoring`). losses: further terms by name, weighted, which the model has computed itself
    because they are of no predictions, each a mean over images.
    """

    auxiliary: list[Predictions] = field(default_factory=list)
    others: dict[str, Predictions] = field(default_factory=dict)
    scoring: Any = None
    losses: dict[str, Tensor] = field(default_factory=dict)

    def supervised(self) -> dict[str, Predictions]:
        """Every set by the suffix of its losses: "", "_0", "_1"..., then "_" and its name."""
        layers = {f"_{i}": layer for i, layer in enumerate(self.auxiliary)}
        return {"": self} | layers | {f"_{name}": each for name, each in self.others.items()}

    def float(self) -> Output:
        """The same in float32, from whatever precision the model ran in."""
        return _map_tensors(self, lambda x: x.float() if x.is_floating_point() else x)


def _map_tensors(value: object, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of nested lists, tuples, dictionaries and dataclasses with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(_map_tensors(item, change) for item in value)
    if isinstance(value, dict):
        return {key: _map_tensors(item, change) for key, item in value.items()}
    if dataclasses.is_dataclass(value):
        return type(value)(**_map_tensors(vars(value), change))
    return value


@dataclass
class Detections:
    """The detections of one image, best first.

    scores: (N,) in [0, 1]. labels: (N,) int64. boxes: (N, 4) xyxy in pixels of the original image.
    queries: (N,) int64, the query that found each.
    """

    scores: Tensor
    labels: Tensor
    boxes: Tensor
    queries: Tensor

    @classmethod
    def cat(cls, parts: list[Detections]) -> Detections:
        """All detections of one or more parts, in this order."""
        fields = zip(*(vars(part).values() for part in parts), strict=True)
        return cls(*map(torch.cat, fields))

    def to(self, device: torch.device | str) -> Detections:
        """The same detections on a device."""
        return Detections(*(tensor.to(device) for tensor in vars(self).values()))

    def __getitem__(self, index: slice | Tensor) -> Detections:
        """Some of them: a slice, or a tensor of places or of True and False."""
        return Detections(*(tensor[index] for tensor in vars(self).values()))

    def __len__(self) -> int:
        return len(self.scores)
