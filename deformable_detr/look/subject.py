"""Whom one can ask what it looks at: our detectors, and Hugging Face's. Chapter looking."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image
from torch import Tensor, nn

from deformable_detr.data.preparation import DEFAULT, PREPARATIONS, preparation_of
from deformable_detr.models import BaseDetector
from deformable_detr.structures import Batch, Output
from deformable_detr.weights.classes import plain_categories

THRESHOLD = 0.5  # of a bare model

Transform = Callable[[Image.Image], Tensor]


@dataclass
class Subject:
    """A model with what is needed to ask it.

    model: from a `Batch` to an `Output`. names: of its classes, in the order of the labels.
    threshold: least score of a detection. transform: from an RGB picture to what the model sees,
    (3, h, w).
    """

    model: nn.Module
    names: list[str]
    threshold: float
    transform: Transform


class HuggingFaceDetector(nn.Module):
    """A detector of transformers that is called, and that answers, as ours do."""

    def __init__(self, theirs: nn.Module) -> None:
        super().__init__()
        self.theirs = theirs

    def forward(self, batch: Batch) -> Output:
        """The last layer's logits and boxes."""
        images = batch.images.to(next(self.theirs.parameters()).dtype)
        output = self.theirs(pixel_values=images, pixel_mask=(~batch.mask).long())
        return Output(output.logits, output.pred_boxes)


def as_subject(
    detector: Any, transform: Transform | None = None, threshold: float | None = None
) -> Subject:
    """A `Detector`, a bare model of ours, or one of Hugging Face's with its classes' names.

    transform, threshold: instead of the detector's own. A bare model and one of Hugging Face's see
    images as in evaluation on COCO, unless their backbone says otherwise. TypeError where it is
    none of these.
    """
    subject = _subject(detector)
    return replace(
        subject,
        transform=transform or subject.transform,
        threshold=subject.threshold if threshold is None else threshold,
    )


def _subject(detector: Any) -> Subject:
    if hasattr(detector, "eval_transform"):  # a Detector, which lives above this room
        names = [category["name"] for category in detector.categories]
        return Subject(detector.model, names, detector.threshold, detector.eval_transform())
    if isinstance(detector, BaseDetector):
        names = [category["name"] for category in plain_categories(detector.config.num_classes)]
        prepare = PREPARATIONS[preparation_of(detector.config.backbone)]
        return Subject(detector, names, THRESHOLD, prepare.eval_transform())
    if hasattr(getattr(detector, "config", None), "id2label"):
        names = [name for _, name in sorted(detector.config.id2label.items())]
        transform = PREPARATIONS[DEFAULT].eval_transform()
        return Subject(HuggingFaceDetector(detector), names, THRESHOLD, transform)
    expected = "a Detector, a model of ours or of Hugging Face's with id2label"
    raise TypeError(f"detector must be {expected}, got {type(detector).__name__}")
