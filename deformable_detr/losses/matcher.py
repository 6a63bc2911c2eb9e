"""One-to-one assignment of predictions to objects (Kuhn, 1955; DETR, section 3.1).
Chapter matching_and_loss."""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import generalized_box_iou

from deformable_detr.boxes import cxcywh_to_xyxy
from deformable_detr.losses.scoring import FocalScoring, Scoring
from deformable_detr.structures import Match, Predictions, Target


class HungarianMatcher:
    """The assignment of least total cost: class, L1 and GIoU terms, weighted.

    The class term with its weight is the scoring's.
    """

    def __init__(self, box_cost: float = 5.0, giou_cost: float = 2.0) -> None:
        self.box_cost, self.giou_cost = box_cost, giou_cost

    @torch.no_grad()
    def __call__(
        self, predictions: Predictions, targets: list[Target], scoring: Scoring | None = None
    ) -> list[Match]:
        """For each image, the indices of min(Q, N) predictions and those of their objects.

        predictions: logits (B, Q, outputs), boxes (B, Q, 4) cxcywh; with groups, each group of
        Q / groups queries is matched by itself; those that are not counted, to nothing. targets: B
        of them. scoring: None is focal. Returns B pairs of int64 tensors on the CPU. Raises
        ValueError where a prediction is not finite.
        """
        scoring = scoring or FocalScoring()
        costs = [
            self.cost(logits.float(), boxes.float(), target, scoring)
            for logits, boxes, target in zip(
                predictions.logits, predictions.boxes, targets, strict=True
            )
        ]
        counted = predictions.counted
        counted = [None] * len(targets) if counted is None else counted.cpu()
        return [
            _match(cost, target, predictions.groups, rows)
            for cost, target, rows in zip(_to_cpu(costs), targets, counted, strict=True)
        ]

    def cost(
        self, logits: Tensor, boxes: Tensor, target: Target, scoring: Scoring | None = None
    ) -> Tensor:
        """(Q, N): what it costs to assign each of Q predictions to each of N objects."""
        scoring = scoring or FocalScoring()
        objects = target.boxes.to(boxes)
        box_cost = torch.cdist(boxes, objects, p=1)
        giou = generalized_box_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(objects))
        class_cost = scoring.cost(logits, target.labels)
        return class_cost + self.box_cost * box_cost - self.giou_cost * giou


def _to_cpu(costs: list[Tensor]) -> list[Tensor]:
    """The matrices of a whole batch in one transfer: each one makes a GPU wait."""
    if not costs or costs[0].device.type == "cpu":
        return costs
    flat = torch.cat([cost.flatten() for cost in costs]).cpu()
    parts = flat.split([cost.numel() for cost in costs])
    return [part.view(cost.shape) for part, cost in zip(parts, costs, strict=True)]


def _match(cost: Tensor, target: Target, groups: int, counted: Tensor | None) -> Match:
    """The least total cost (Q, N), in each group of queries by itself; counted: (Q,)."""
    if not cost.isfinite().all():
        raise ValueError(
            f"image {target.image_id}: predictions or boxes are not finite or have no size, "
            "cannot match them"
        )
    parts = torch.arange(len(cost)).chunk(groups)
    if counted is not None:
        parts = [part[counted[part]] for part in parts]
    found = [linear_sum_assignment(cost[part].numpy()) for part in parts]
    queries = [part[rows] for part, (rows, _) in zip(parts, found, strict=True)]
    return torch.cat(queries), torch.cat([torch.as_tensor(objects) for _, objects in found])
