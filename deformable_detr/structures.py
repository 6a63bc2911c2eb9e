"""What flows between data, model and results: one object each."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass
class Target:
    """The objects of one image.

    labels: (N,) int64, contiguous class indices. boxes: (N, 4) cxcywh, normalised to [0, 1].
    original_size: (H, W) in pixels, before any resizing.
    """

    image_id: int
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


@dataclass
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
class Output:
    """What a detector returns, the last decoder layer's predictions first.

    logits: (B, Q, classes). boxes: (B, Q, 4) cxcywh, normalised to each image without its padding.
    references: (B, Q, 2 or 4), what this layer's boxes started from. auxiliary: the earlier
    decoder layers, first to last. first_stage: the proposals of all tokens, in a two-stage model.
    """

    logits: Tensor
    boxes: Tensor
    auxiliary: list[Output] = field(default_factory=list)
    first_stage: Output | None = None
    references: Tensor | None = None


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
