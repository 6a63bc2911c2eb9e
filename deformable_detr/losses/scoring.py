"""How class logits are read: what a match costs, what the loss is, which detections they make.

A model has one scoring, and its output carries it. Chapter matching_and_loss builds the focal one;
the softmax with a class for "no object" is DETR's.
"""

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from deformable_detr.ops.sizes import smaller
from deformable_detr.structures import Output

PRIOR = 0.01  # of an object, for every class of every query, before training (Lin et al., 2017)
Best = tuple[Tensor, Tensor, Tensor]  # scores, queries and labels, (B, N) each


class Scoring(Protocol):
    """What matcher, criterion, heads and postprocessing ask."""

    def outputs(self, num_classes: int) -> int:
        """How many logits a query has."""

    def reset_bias(self, bias: Tensor) -> None:
        """What a class head's bias is before training."""

    def cost(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(Q, N), weighted: what it costs to give each of Q queries, logits (Q, outputs), each of N
        labels."""

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        num_boxes: float,
        counted: Tensor | None = None,
        share: float = 1.0,
    ) -> Tensor:
        """The weighted class loss, of which those of a step's batches add up. logits: (B, Q,
        outputs). labels: (B, Q) int64, -1 where a query has no object. num_boxes: of the step.
        counted: (B, Q), False where a query is left out. share: the part of the step's images that
        these are."""

    def scores(self, logits: Tensor) -> Tensor:
        """What a detection's score is, in [0, 1]: (..., outputs) to (..., classes)."""

    def best(self, logits: Tensor, top_k: int) -> Best:
        """At most top_k detections of each image, best first."""


class FocalScoring:
    """An independent sigmoid for each class, trained by the focal loss (Lin et al., 2017), as in
    "Deformable DETR": its matching cost and its loss both have the weight 2."""

    def __init__(
        self,
        loss_weight: float = 2.0,
        cost_weight: float = 2.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
    ) -> None:
        self.loss_weight, self.cost_weight = loss_weight, cost_weight
        self.alpha, self.gamma = alpha, gamma

    def outputs(self, num_classes: int) -> int:
        """One for each class."""
        return num_classes

    def reset_bias(self, bias: Tensor) -> None:
        """The logit of PRIOR: at first nearly everything is background."""
        nn.init.constant_(bias, -math.log((1 - PRIOR) / PRIOR))

    def cost(self, logits: Tensor, labels: Tensor) -> Tensor:
        """By how much the focal loss changes when a logit is called positive, (Q, N)."""
        return self.cost_weight * focal_cost(logits, self.alpha, self.gamma)[:, labels]

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        num_boxes: float,
        counted: Tensor | None = None,
        share: float = 1.0,
    ) -> Tensor:
        """The sum over queries and classes, divided by the number of boxes; a query without an
        object is a negative for every class."""
        wanted = torch.zeros_like(logits)
        image, query = (labels >= 0).nonzero(as_tuple=True)
        wanted[image, query, labels[image, query]] = 1
        reduction = "sum" if counted is None else "none"
        loss = sigmoid_focal_loss(logits, wanted, self.alpha, self.gamma, reduction)
        if counted is not None:
            loss = loss[counted].sum()
        return self.loss_weight * loss / num_boxes

    def scores(self, logits: Tensor) -> Tensor:
        """Each class's own probability."""
        return logits.sigmoid()

    def best(self, logits: Tensor, top_k: int) -> Best:
        """The highest scores over all queries and classes: a query may appear with several."""
        _, Q, classes = logits.shape
        scores, index = self.scores(logits).flatten(1).topk(smaller(top_k, Q * classes), dim=1)
        return scores, index // classes, index % classes


class SoftmaxScoring:
    """One softmax over all classes and, last, "no object", trained by cross-entropy, as in DETR
    (section 3.1): weights of 1, and of `no_object` for the many queries that find nothing."""

    def __init__(
        self, loss_weight: float = 1.0, cost_weight: float = 1.0, no_object: float = 0.1
    ) -> None:
        self.loss_weight, self.cost_weight, self.no_object = loss_weight, cost_weight, no_object

    def outputs(self, num_classes: int) -> int:
        """One for each class, and one for no object."""
        return num_classes + 1

    def reset_bias(self, bias: Tensor) -> None:
        """As torch has made it."""

    def cost(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The probability of the label, negative, (Q, N): in DETR not its logarithm, so that it is
        of the size of the boxes' costs."""
        return -self.cost_weight * logits.softmax(-1)[:, labels]

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        num_boxes: float,
        counted: Tensor | None = None,
        share: float = 1.0,
    ) -> Tensor:
        """Cross-entropy, a mean over queries, weighted by class: of the batch, as in the official
        code, where that is the whole step; else of the step, whose num_boxes find a query each."""
        nothing = logits.shape[-1] - 1
        queries = labels.numel() if counted is None else counted.sum()
        found = num_boxes if share < 1 else (labels >= 0).sum()
        total = found + self.no_object * (queries / share - found)
        labels = labels.where(labels >= 0, nothing)
        if counted is not None:
            labels = labels.where(counted, -100)  # what cross_entropy leaves out
        weights = torch.ones_like(logits[0, 0])
        weights[nothing] = self.no_object
        loss = F.cross_entropy(logits.transpose(1, 2), labels, weights, reduction="sum")
        return self.loss_weight * loss / total

    def scores(self, logits: Tensor) -> Tensor:
        """The probabilities of all classes but "no object"."""
        return logits.softmax(-1)[..., :-1]

    def best(self, logits: Tensor, top_k: int) -> Best:
        """Each query's best class; "no object" is none."""
        scores, labels = self.scores(logits).max(-1)
        scores, queries = scores.topk(smaller(top_k, logits.shape[1]), dim=1)
        return scores, queries, labels.gather(1, queries)


SCORINGS = {"focal": FocalScoring, "softmax": SoftmaxScoring}


def focal_cost(logits: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """What it would change in the focal loss to call each logit positive rather than negative."""
    p = logits.sigmoid()
    positive = alpha * (1 - p) ** gamma * -(p + 1e-8).log()
    negative = (1 - alpha) * p**gamma * -(1 - p + 1e-8).log()
    return positive - negative


def scoring_of(output: Output) -> Scoring:
    """The output's own; focal where it names none."""
    return output.scoring or FocalScoring()
