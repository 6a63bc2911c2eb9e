"""A detector as a function of plain tensors, which exporters can trace."""

import torch
from torch import Tensor, nn

from deformable_detr.boxes import cxcywh_to_xyxy
from deformable_detr.data.transforms import MEAN, STD
from deformable_detr.losses.scoring import Scoring
from deformable_detr.models import BaseDetector
from deformable_detr.structures import Batch

INPUTS = ("images", "sizes")


class DetectorGraph(nn.Module):
    """From pixels to what a detector says of its queries, and with top_k also to detections.

    It holds at any batch size and any image size, through torch.export, torch.jit.trace and both
    ONNX exporters.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: BaseDetector, top_k: int | None = None) -> None:
        super().__init__()
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        self.model, self.top_k = model, top_k
        for name, value in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1), persistent=False)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of what `forward` returns."""
        raw = "logits", "boxes"
        return (*raw, "scores", "labels", "pixel_boxes") if self.top_k else raw

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """images: (B, 3, H, W) float32, RGB in [0, 1], each at the top left, whatever stands beside
        it. sizes: (B, 2) int64, the (height, width) of each.

        Returns logits (B, Q, outputs) and boxes (B, Q, 4) cxcywh, relative to each image; with
        top_k then scores (B, N), labels (B, N) int64 and boxes (B, N, 4) xyxy in pixels of `sizes`,
        best first, as `postprocess` has them.
        """
        output = self.model(self.batch(images, sizes))
        raw = output.logits, output.boxes
        return (*raw, *best(*raw, sizes, self.model.scoring, self.top_k)) if self.top_k else raw

    def batch(self, images: Tensor, sizes: Tensor) -> Batch:
        """What the model takes: normal pixels, zero beside the images."""
        mask = padding_mask(images, sizes)
        images = ((images - self.mean) / self.std).masked_fill(mask.unsqueeze(1), 0)
        return Batch(images, mask, sizes)


def padding_mask(images: Tensor, sizes: Tensor) -> Tensor:
    """(B, H, W), True beside the images, whose (height, width) are sizes, (B, 2)."""
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device).unsqueeze(1)  # (H, 1)
    columns = torch.arange(width, device=images.device)
    return (rows >= sizes[:, 0, None, None]) | (columns >= sizes[:, 1, None, None])


def best(
    logits: Tensor, boxes: Tensor, sizes: Tensor, scoring: Scoring, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """At most top_k detections of each image: scores, labels and boxes, xyxy in pixels."""
    scores, queries, labels = scoring.best(logits, top_k)
    boxes = boxes.gather(1, queries.unsqueeze(-1).expand(-1, -1, 4))
    pixels = sizes.flip(1).repeat(1, 2).unsqueeze(1)  # (B, 1, 4): width, height, width, height
    return scores, labels, cxcywh_to_xyxy(boxes) * pixels
