"""The training loss: class, L1 and GIoU on matched pairs, of every set.
Chapter matching_and_loss."""

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss

from deformable_detr.boxes import cxcywh_to_xyxy
from deformable_detr.losses.matcher import HungarianMatcher
from deformable_detr.losses.scoring import Scoring, scoring_of
from deformable_detr.structures import Match, Output, Predictions, Target


class SetCriterion(nn.Module):
    """The set loss of DETR (section 3.1), with the class loss that the output's scoring has.

    Every set of an output is matched and supervised anew, unless its matches are known. Where a set
    only tells objects from background, as the first stage of "Deformable DETR" does (A.4), all
    targets count as class 0.
    """

    def __init__(
        self,
        matcher: HungarianMatcher | None = None,
        box_weight: float = 5.0,
        giou_weight: float = 2.0,
    ) -> None:
        super().__init__()
        self.matcher = matcher or HungarianMatcher()
        self.box_weight, self.giou_weight = box_weight, giou_weight

    def forward(
        self,
        output: Output,
        targets: list[Target],
        num_boxes: float | None = None,
        share: float = 1.0,
    ) -> dict[str, Tensor]:
        """The weighted terms, whose sum is the loss.

        Keys: loss_class, loss_box and loss_giou for the last decoder layer; with suffix _0, _1...
        for the earlier ones and _first for the first stage; loss_ and its name for a term that the
        model has computed itself. targets: B of them, on the model's device; labels in [0,
        classes). num_boxes: what the terms are divided by, for each group of queries; by default
        `count_boxes` of the targets. share: the part of a step's images that these are, where
        several batches make a step: their terms add up to those of one large batch. ValueError:
        another number of targets, or a label outside.
        """
        scoring = scoring_of(output)
        self._check(output, targets, scoring)
        if num_boxes is None:
            num_boxes = count_boxes(targets, output.logits.device)
        losses = {}
        for suffix, predictions in output.supervised().items():
            terms = self._terms(predictions, targets, num_boxes, scoring, share)
            losses |= {f"loss_{name}{suffix}": term for name, term in terms.items()}
        return losses | {f"loss_{name}": term * share for name, term in output.losses.items()}

    def _terms(
        self,
        predictions: Predictions,
        targets: list[Target],
        num_boxes: float,
        scoring: Scoring,
        share: float,
    ) -> dict[str, Tensor]:
        if predictions.class_agnostic:
            targets = [dataclasses.replace(t, labels=torch.zeros_like(t.labels)) for t in targets]
        matches = predictions.matches
        if matches is None:
            matches = self.matcher(predictions, targets, scoring)
        num_boxes = num_boxes * predictions.groups
        labels = matched_labels(predictions, targets, matches)
        box, giou = box_losses(predictions, targets, matches)
        return {
            "class": scoring.loss(
                predictions.logits, labels, num_boxes, predictions.counted, share
            ),
            "box": self.box_weight * box / num_boxes,
            "giou": self.giou_weight * giou / num_boxes,
        }

    @staticmethod
    def _check(output: Output, targets: list[Target], scoring: Scoring) -> None:
        images, _, outputs = output.logits.shape
        if len(targets) != images:
            raise ValueError(f"expected {images} targets, one for each image, got {len(targets)}")
        check_labels(targets, outputs - scoring.outputs(0))


def check_labels(targets: list[Target], classes: int) -> None:
    """ValueError, which names the image, where a label is not in [0, classes)."""
    for target in targets:
        wrong = (target.labels < 0) | (target.labels >= classes)
        if wrong.any():
            raise ValueError(
                f"image {target.image_id}: labels must be in [0, {classes}), "
                f"got {target.labels[wrong].tolist()}"
            )


def matched_labels(predictions: Predictions, targets: list[Target], matches: list[Match]) -> Tensor:
    """(B, Q) int64: the label of each query's object, -1 where it has none."""
    labels = torch.full(
        predictions.logits.shape[:2], -1, dtype=torch.long, device=predictions.logits.device
    )
    for image, ((queries, objects), target) in enumerate(zip(matches, targets, strict=True)):
        labels[image, queries] = target.labels[objects]
    return labels


def box_losses(
    predictions: Predictions, targets: list[Target], matches: list[Match]
) -> tuple[Tensor, Tensor]:
    """The L1 distance of matched boxes (normalised cxcywh) and 1 - GIoU, each summed."""
    pairs = list(zip(predictions.boxes, targets, matches, strict=True))
    predicted = torch.cat([boxes[queries] for boxes, _, (queries, _) in pairs])
    wanted = torch.cat([target.boxes[objects] for _, target, (_, objects) in pairs])
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
