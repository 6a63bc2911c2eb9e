"""A model, and what belongs to it: its classes, its threshold, how it sees images.
Chapter your_own_data."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torchvision.transforms import v2

from deformable_detr.data.names import counted, listed
from deformable_detr.data.preparation import DEFAULT as PREPARATION
from deformable_detr.data.preparation import PREPARATIONS, preparation_of
from deformable_detr.data.transforms import SHORT_SIDE, SMALLEST_SIDE
from deformable_detr.inference.precision import choose_precision, in_bf16, is_narrow
from deformable_detr.models import BaseDetector
from deformable_detr.weights.classes import with_classes
from deformable_detr.weights.ours import load_model, read_card, save_model
from deformable_detr.weights.published import load_pretrained, save_pretrained

LARGEST_SIDE = 4096  # pixels, of the short side in which a file may want images: some GB of memory
THRESHOLD = 0.5  # where none was chosen on validation data


@dataclass(repr=False)
class Detector:
    """A model, and what belongs to it.

    categories: {"id": int, "name": str} of every class, in the order of the labels. threshold: the
    least score of a detection, as chosen on validation data. transforms: how images were prepared
    in training, a name in PREPARATIONS, and short_side the size, in pixels.
    """

    model: BaseDetector
    categories: list[dict]
    threshold: float = THRESHOLD
    transforms: str = PREPARATION
    short_side: int = SHORT_SIDE

    @property
    def resizes(self) -> bool:
        """Whether the model sees every image in one size, `short_side`, or each in its own."""
        return PREPARATIONS[self.transforms].resizes

    @property
    def known_side(self) -> int:
        """The short side, in pixels, of the images that the model knows from training."""
        return self.short_side if self.resizes else PREPARATIONS[self.transforms].usual_side

    def eval_transform(self) -> v2.Transform:
        """How the model sees images when it is measured."""
        return PREPARATIONS[self.transforms].eval_transform(self.short_side)

    def __repr__(self) -> str:
        names = listed((category["name"] for category in self.categories), 5)
        size = f" at short side {self.short_side}" if self.resizes else ""
        count = counted(len(self.categories), "class")
        return (
            f"Detector({type(self.model).__name__}, {count}: {names}; "
            f"threshold {self.threshold:.3f}; images as {self.transforms}{size})"
        )

    def for_categories(self, wanted: list[dict]) -> "Detector":
        """The same detector with just these classes, in their order, found by their names.

        Published weights have 91 classes, 11 of them unused, and COCO has 80. ValueError names
        classes that the detector has not.
        """
        if wanted == self.categories:
            return self
        model, report = with_classes(self.model, self.categories, wanted)
        if missing := report.new_classes:
            names = [category["name"] for category in self.categories]
            raise ValueError(
                f"the model has the classes {', '.join(names[:8])}{', ...' * (len(names) > 8)}; "
                f"{len(missing)} of the data's it has not, such as {missing[0]!r}"
            )
        if is_narrow(self.model):
            model = in_bf16(model)
        return replace(self, model=model, categories=wanted)

    def in_precision(self, precision: str, device: torch.device | str | None = None) -> "Detector":
        """The same detector on a device, in a precision of `precision.PRECISIONS`: for detecting,
        not for saving."""
        if device is not None:
            self.model.to(device)
        chosen = choose_precision(precision, next(self.model.parameters()).device)
        return self if chosen == "float32" else replace(self, model=in_bf16(self.model))

    def card(self) -> dict[str, object]:
        """What belongs to the model, as a file keeps it."""
        size = {"short_side": self.short_side} if self.resizes else {}
        return {"threshold": self.threshold, "transforms": self.transforms} | size

    def save_pretrained(self, path: Path | str, format: str = "ours") -> None:
        """Write model, classes, threshold and how it sees images, as "ours", "huggingface" or
        "official"; see `weights.published`."""
        save_pretrained(self.model, path, self.categories, format, self.card())


def load_detector(name_or_path: Path | str, precision: str = "float32") -> Detector:
    """A trained detector: a file that `train` wrote, or anything that `load_pretrained` reads.
    precision: as `Detector.in_precision` has it."""
    loaded = load_pretrained(name_or_path)
    options = _options(loaded.card, loaded.model, name_or_path)
    return Detector(loaded.model, loaded.categories, **options).in_precision(precision)


def _options(card: dict, model: BaseDetector, name: Path | str) -> dict[str, object]:
    """Threshold, transforms and short_side as a card has them; ValueError where one is wrong."""
    threshold = card.get("threshold", THRESHOLD)
    if not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise ValueError(f"{name}: its threshold must be in [0, 1], got {threshold!r}")
    transforms = card.get("transforms", preparation_of(model.config.backbone))
    if not isinstance(transforms, str) or transforms not in PREPARATIONS:
        known = ", ".join(PREPARATIONS)
        raise ValueError(f"{name}: its transforms must be one of {known}, got {transforms!r}")
    short = card.get("short_side", SHORT_SIDE)
    if type(short) is not int or not SMALLEST_SIDE <= short <= LARGEST_SIDE:
        expected = f"from {SMALLEST_SIDE} to {LARGEST_SIDE}"
        raise ValueError(f"{name}: its short_side must be {expected}, got {short!r:.40}")
    return {"threshold": float(threshold), "transforms": transforms, "short_side": short}


def update_card(path: Path | str, **values: object) -> None:
    """Write these entries into the card of a file of `save_model`, such as threshold=0.3."""
    model, categories = load_model(path)
    save_model(model, path, categories, read_card(path) | values)
