"""What a detector is trained by: how class logits are scored, matching, and the losses of matched
pairs. Chapter matching_and_loss."""

from deformable_detr.losses.criterion import SetCriterion
from deformable_detr.losses.matcher import HungarianMatcher
from deformable_detr.losses.scoring import FocalScoring, SoftmaxScoring

__all__ = ["FocalScoring", "HungarianMatcher", "SetCriterion", "SoftmaxScoring"]
