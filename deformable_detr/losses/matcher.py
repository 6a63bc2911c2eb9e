"""One-to-one assignment of predictions to objects (Kuhn, 1955; DETR, section 3.1)."""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import generalized_box_iou

from deformable_detr.boxes import cxcywh_to_xyxy
from deformable_detr.structures import Output, Target

Match = tuple[Tensor, Tensor]


def focal_cost(logits: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """What it would change in the focal loss to call each logit positive rather than negative."""
    p = logits.sigmoid()
    positive = alpha * (1 - p) ** gamma * -(p + 1e-8).log()
    negative = (1 - alpha) * p**gamma * -(1 - p + 1e-8).log()
    return positive - negative


class HungarianMatcher:
    """The assignment of least total cost: focal, L1 and GIoU terms, weighted."""

    def __init__(
        self, class_cost: float = 2.0, box_cost: float = 5.0, giou_cost: float = 2.0
    ) -> None:
        self.class_cost, self.box_cost, self.giou_cost = class_cost, box_cost, giou_cost

    @torch.no_grad()
    def __call__(self, output: Output, targets: list[Target]) -> list[Match]:
        """For each image, the indices of min(Q, N) predictions and those of their objects.

        output: logits (B, Q, classes), boxes (B, Q, 4) cxcywh. targets: B of them. Returns B pairs
        of int64 tensors on the CPU. Raises ValueError where a prediction is not finite.
        """
        return [
            self._match(logits, boxes, target)
            for logits, boxes, target in zip(output.logits, output.boxes, targets, strict=True)
        ]

    def _match(self, logits: Tensor, boxes: Tensor, target: Target) -> Match:
        cost = self.cost(logits.float(), boxes.float(), target).cpu()  # (Q, N)
        if not cost.isfinite().all():
            raise ValueError(
                f"image {target.image_id}: predictions or boxes are not finite or have no size, "
                "cannot match them"
            )
        queries, objects = linear_sum_assignment(cost.numpy())
        return torch.as_tensor(queries), torch.as_tensor(objects)

    def cost(self, logits: Tensor, boxes: Tensor, target: Target) -> Tensor:
        """(Q, N): what it costs to assign each of Q predictions to each of N objects."""
        class_cost = focal_cost(logits)[:, target.labels]
        objects = target.boxes.to(boxes)
        box_cost = torch.cdist(boxes, objects, p=1)
        giou = generalized_box_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(objects))
        return self.class_cost * class_cost + self.box_cost * box_cost - self.giou_cost * giou
