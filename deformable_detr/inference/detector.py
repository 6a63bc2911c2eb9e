"""A model, and what belongs to it: its classes, its threshold, how it sees images. Chapter 12."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torchvision.transforms import v2

from deformable_detr.data.preparation import DEFAULT as PREPARATION
from deformable_detr.data.preparation import PREPARATIONS, preparation_of
from deformable_detr.data.transforms import SHORT_SIDE, SMALLEST_SIDE
from deformable_detr.models import BaseDetector, build_model
from deformable_detr.models.heads import ClassHead
from deformable_detr.weights.ours import load_model, save_model
from deformable_detr.weights.published import load_pretrained

THRESHOLD = 0.5  # where none was chosen on validation data


@dataclass
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

    def eval_transform(self) -> v2.Transform:
        """How the model sees images when it is measured."""
        return PREPARATIONS[self.transforms].eval_transform(self.short_side)

    def for_categories(self, wanted: list[dict]) -> "Detector":
        """The same detector with just these classes, in their order, found by their names.

        Published weights have 91 classes, 11 of them unused, and COCO has 80. ValueError names
        classes that the detector has not.
        """
        if wanted == self.categories:
            return self
        names = [category["name"] for category in self.categories]
        missing = [c["name"] for c in wanted if c["name"] not in names]
        if missing:
            raise ValueError(
                f"the model has the classes {', '.join(names[:8])}{', ...' * (len(names) > 8)}; "
                f"{len(missing)} of the data's it has not, such as {missing[0]!r}"
            )
        rows = [names.index(category["name"]) for category in wanted]
        if rows == list(range(len(names))):
            return replace(self, categories=wanted)
        return replace(self, model=pick_classes(self.model, rows), categories=wanted)


def pick_classes(model: BaseDetector, labels: list[int]) -> BaseDetector:
    """A model of these classes only, in this order, whose logits are otherwise the same.

    The logit of no object, where there is one, stays the last. In a class-agnostic
    head channel 0 scores objects of all classes: it stays in its place.
    """
    new = build_model(replace(model.config, num_classes=len(labels)))
    state = model.state_dict()
    for name, head in model.named_modules():
        if isinstance(head, ClassHead):
            kept = [0, *labels[1:]] if head.class_agnostic else labels
            kept = [*kept, *range(model.config.num_classes, head.out_features)]
            for kind in ("weight", "bias"):
                state[f"{name}.{kind}"] = state[f"{name}.{kind}"][kept]
    new.load_state_dict(state)
    return new.to(next(model.parameters()).device).train(model.training)


def load_detector(name_or_path: Path | str) -> Detector:
    """A trained detector: a file that `train` wrote, or anything that `load_pretrained` reads."""
    loaded = load_pretrained(name_or_path)
    card = read_card(name_or_path) if str(name_or_path).endswith(".safetensors") else {}
    return Detector(loaded.model, loaded.categories, **_options(card, loaded.model, name_or_path))


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
    if type(short) is not int or short < SMALLEST_SIDE:
        raise ValueError(f"{name}: its short_side must be {SMALLEST_SIDE} or more, got {short!r}")
    return {"threshold": float(threshold), "transforms": transforms, "short_side": short}


def read_card(path: Path | str) -> dict:
    """The card in a file of `save_model`; ValueError, in one line, on other files."""
    try:
        with safe_open(path, framework="pt") as file:
            card = json.loads((file.metadata() or {}).get("card", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a file of save_model: {error}") from None
    if not isinstance(card, dict):
        raise ValueError(f"{path}: its card must be a JSON object, got {card!r}")
    return card


def update_card(path: Path | str, **values: object) -> None:
    """Write these entries into the card of a file of `save_model`, such as threshold=0.3."""
    model, categories = load_model(path)
    save_model(model, path, categories, read_card(path) | values)
