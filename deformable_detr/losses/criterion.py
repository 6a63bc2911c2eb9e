"""The training loss: focal, L1 and GIoU on matched pairs, for every decoder layer (chapter 8)."""

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from deformable_detr.boxes import cxcywh_to_xyxy
from deformable_detr.losses.matcher import HungarianMatcher, Match
from deformable_detr.structures import Output, Target


class SetCriterion(nn.Module):
    """The set loss of DETR with the focal loss of Deformable DETR (section 4 and Appendix A.4).

    Every decoder layer is matched and supervised anew, and so is the first stage, which only has
    to tell objects from background: all its targets count as class 0.
    """

    def __init__(
        self,
        matcher: HungarianMatcher | None = None,
        class_weight: float = 2.0,
        box_weight: float = 5.0,
        giou_weight: float = 2.0,
    ) -> None:
        super().__init__()
        self.matcher = matcher or HungarianMatcher()
        self.weights = {"class": class_weight, "box": box_weight, "giou": giou_weight}

    def forward(
        self, output: Output, targets: list[Target], num_boxes: float | None = None
    ) -> dict[str, Tensor]:
        """The weighted terms, whose sum is the loss.

        Keys: loss_class, loss_box and loss_giou for the last decoder layer; with suffix _0, _1...
        for the earlier ones and _first for the first stage. targets: B of them, on the model's
        device; labels in [0, classes). num_boxes: what every term is divided by; by default
        `count_boxes` of the targets. ValueError: another number of targets, or a label outside.
        """
        self._check(output, targets)
        if num_boxes is None:
            num_boxes = count_boxes(targets, output.logits.device)
        layers = {"": output}
        layers |= {f"_{i}": earlier for i, earlier in enumerate(output.auxiliary)}
        losses = {}
        for suffix, layer in layers.items():
            losses |= self._layer(layer, targets, num_boxes, suffix)
        if output.first_stage is not None:
            anything = [dataclasses.replace(t, labels=torch.zeros_like(t.labels)) for t in targets]
            losses |= self._layer(output.first_stage, anything, num_boxes, "_first")
        return losses

    def _layer(
        self, output: Output, targets: list[Target], num_boxes: float, suffix: str
    ) -> dict[str, Tensor]:
        matches = self.matcher(output, targets)
        terms = {
            "class": class_loss(output, targets, matches),
            **dict(zip(("box", "giou"), box_losses(output, targets, matches), strict=True)),
        }
        return {
            f"loss_{name}{suffix}": self.weights[name] * term / num_boxes
            for name, term in terms.items()
        }

    @staticmethod
    def _check(output: Output, targets: list[Target]) -> None:
        images, _, classes = output.logits.shape
        if len(targets) != images:
            raise ValueError(f"expected {images} targets, one for each image, got {len(targets)}")
        for target in targets:
            wrong = (target.labels < 0) | (target.labels >= classes)
            if wrong.any():
                raise ValueError(
                    f"image {target.image_id}: labels must be in [0, {classes}), "
                    f"got {target.labels[wrong].tolist()}"
                )


def class_loss(output: Output, targets: list[Target], matches: list[Match]) -> Tensor:
    """The focal loss (Lin et al., 2017) summed over all queries and classes; a query without an
    object is a negative for every class."""
    wanted = torch.zeros_like(output.logits)
    for image, ((queries, objects), target) in enumerate(zip(matches, targets, strict=True)):
        wanted[image, queries, target.labels[objects]] = 1
    return sigmoid_focal_loss(output.logits, wanted, alpha=0.25, gamma=2, reduction="sum")


def box_losses(
    output: Output, targets: list[Target], matches: list[Match]
) -> tuple[Tensor, Tensor]:
    """The L1 distance of matched boxes (normalised cxcywh) and 1 - GIoU, each summed."""
    predicted = torch.cat([boxes[q] for boxes, (q, _) in zip(output.boxes, matches, strict=True)])
    wanted = torch.cat([t.boxes[o] for t, (_, o) in zip(targets, matches, strict=True)])
    corners = cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(wanted)
    giou = generalized_box_iou_loss(*corners, reduction="sum", eps=0)
    return (predicted - wanted).abs().sum(), giou


def count_boxes(targets: list[Target], device: torch.device) -> float:
    """The mean number of boxes in a process' targets, at least 1: what every loss is divided by."""
    total = torch.tensor(float(sum(len(t.labels) for t in targets)), device=device)
    processes = 1
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
        processes = dist.get_world_size()
    return max(total.item() / processes, 1.0)
