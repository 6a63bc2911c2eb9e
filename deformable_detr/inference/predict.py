"""Detect objects in files, folders, arrays and pictures, with the names of what they are."""

import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torchvision.ops import box_convert, clip_boxes_to_image
from tqdm import tqdm

from deformable_detr.data.images import Picture, find_images, read_image
from deformable_detr.data.transforms import SHORT_SIDE
from deformable_detr.evaluation_mode import evaluating
from deformable_detr.inference.postprocess import postprocess
from deformable_detr.inference.views import MERGES, View, make_views, suppress
from deformable_detr.look.pictures import draw_detections
from deformable_detr.models.deformable_detr import DeformableDETR
from deformable_detr.structures import Batch, Detections
from deformable_detr.training.recipes import TRANSFORMS
from deformable_detr.weights.formats import plain_categories
from deformable_detr.weights.ours import load_model, save_model
from deformable_detr.weights.published import load_pretrained

THRESHOLD = 0.5  # where none was chosen on validation data


@dataclass
class Prediction:
    """What was found in one image, best first.

    boxes: (N, 4) xyxy in pixels of the image as it is shown, that is, turned as its EXIF says.
    scores: (N,) in [0, 1]. labels: (N,) int64, positions among the model's classes. names and
    category_ids: N each, of those classes in the data that the model was trained on. size: the
    image's (H, W). path: its file, if it came from one.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    names: list[str]
    category_ids: list[int]
    size: tuple[int, int]
    path: Path | None = None
    picture: Image.Image | None = field(default=None, repr=False)  # where there is no file

    @classmethod
    def of(
        cls,
        found: Detections,
        categories: list[dict],
        image: Image.Image,
        path: Path | None = None,
    ) -> "Prediction":
        """Detections in an image with the names of their classes; all else as above."""
        classes = [categories[label] for label in found.labels.tolist()]
        return cls(
            found.boxes,
            found.scores,
            found.labels,
            [category["name"] for category in classes],
            [category["id"] for category in classes],
            (image.height, image.width),
            path,
            None if path else image,
        )

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def image(self) -> Image.Image:
        """The RGB picture, read again where it came from a file."""
        return read_image(self.path) if self.picture is None else self.picture

    def to_coco(self, image_id: int | str | None = None) -> list[dict]:
        """COCO results, with the data's own category ids.

        image_id: where it is None, that of `file_id`. ValueError where there is no file either.
        """
        if image_id is None:
            if self.path is None:
                raise ValueError("an image that came from no file needs an image_id")
            image_id = file_id(self.path)
        return [
            {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}
            for category_id, box, score in zip(
                self.category_ids,
                box_convert(self.boxes, "xyxy", "xywh").tolist(),
                self.scores.tolist(),
                strict=True,
            )
        ]

    def to_supervision(self) -> object:
        """The same as supervision.Detections, boxes cut at the image's border, the names in
        data["class_name"].

        ImportError, in one line, where that package is not installed.
        """
        try:
            import supervision
        except ImportError:
            raise ImportError(
                "to_supervision needs the package supervision: pip install supervision"
            ) from None
        return supervision.Detections(
            xyxy=clip_boxes_to_image(self.boxes, self.size).numpy(),
            confidence=self.scores.numpy(),
            class_id=self.labels.numpy(),
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def draw(self) -> Image.Image:
        """The picture with boxes, names and scores on it."""
        found = Detections(self.scores, self.labels, self.boxes, torch.arange(len(self)))
        return draw_detections(
            self.image, found, dict(zip(self.labels.tolist(), self.names, strict=True))
        )


def file_id(path: Path) -> int | str:
    """The number that a file is named after (39769 of 000000039769.jpg), or else its name."""
    return int(path.stem) if path.stem.isdecimal() else path.name


@dataclass
class Detector:
    """A model, and what belongs to it.

    categories: {"id": int, "name": str} of every class, in the order of the labels. threshold: the
    least score of a detection, as chosen on validation data. transforms: how images were prepared
    in training, a name in `recipes.TRANSFORMS`, and short_side the size, in pixels.
    """

    model: DeformableDETR
    categories: list[dict]
    threshold: float = THRESHOLD
    transforms: str = "coco"
    short_side: int = SHORT_SIDE

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


def pick_classes(model: DeformableDETR, labels: list[int]) -> DeformableDETR:
    """A model of these classes only, in this order, whose logits are otherwise the same.

    In the head of the first stage channel 0 scores objects of all classes: it stays in its place.
    """
    new = DeformableDETR(replace(model.config, num_classes=len(labels)))
    state = model.state_dict()
    objectness = f"class_heads.{model.config.decoder_layers}."
    for name in [name for name in state if name.startswith("class_heads.")]:
        first_stage = model.config.two_stage and name.startswith(objectness)
        state[name] = state[name][[0, *labels[1:]] if first_stage else labels]
    new.load_state_dict(state)
    return new.to(next(model.parameters()).device).train(model.training)


def load_detector(name_or_path: Path | str) -> Detector:
    """A trained detector: a file that `train` wrote, or anything that `load_pretrained` reads."""
    loaded = load_pretrained(name_or_path)
    card = read_card(name_or_path) if str(name_or_path).endswith(".safetensors") else {}
    threshold = card.get("threshold", THRESHOLD)
    if not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise ValueError(f"{name_or_path}: its threshold must be in [0, 1], got {threshold!r}")
    transforms = card.get("transforms", transforms_of(loaded.model))
    if not isinstance(transforms, str) or transforms not in TRANSFORMS:
        known = ", ".join(TRANSFORMS)
        raise ValueError(
            f"{name_or_path}: its transforms must be one of {known}, got {transforms!r}"
        )
    short = card.get("short_side", SHORT_SIDE)
    if type(short) is not int or short < 32:
        raise ValueError(f"{name_or_path}: its short_side must be 32 or more, got {short!r}")
    return Detector(loaded.model, loaded.categories, float(threshold), transforms, short)


def transforms_of(model: DeformableDETR) -> str:
    """How images are best prepared for a model that does not say: small ones see them as they are,
    others at COCO's size."""
    return "digits" if model.config.backbone == "small" else "coco"


def read_card(path: Path | str) -> dict:
    """The card in a file of `save_model`; ValueError in one line where there is none."""
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


def predict(
    model: Detector | DeformableDETR | Path | str,
    images: Picture | Iterable[Picture],
    categories: list[dict] | None = None,
    threshold: float | None = None,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    top_k: int = 100,
    transform: Callable[[Image.Image], Tensor] | None = None,
    views: list[View] | None = None,
    merge: str = "fusion",
    nms: float | None = None,
    progress: bool = False,
) -> list[Prediction]:
    """Detect objects in images.

    model: a detector, or a name or path that `load_detector` reads. images: a file, a folder (all
    images in it, by name), an array, a PIL image, or a list of these. Arrays are uint8 or uint16,
    (H, W), (H, W, 3) as RGB, or (H, W, 4) as RGBA. categories: as in `Detector`, where model is a
    bare one. threshold: least score, in [0, 1]; None is the detector's own, or 0.5. device: to
    which the model is moved first; by default it stays. top_k: detections of an image at most.
    transform: from a PIL image to a (3, h, w) tensor, where it should not be the detector's. views:
    for test-time augmentation, from `make_views`; merge: how they are merged, a name in
    `tta.MERGES`. nms: overlap (IoU, in [0, 1]) from which of two boxes of a class only the better
    one stays; None, the default, keeps all, as the paper does: queries learn not to repeat others.
    Raises FileNotFoundError and ValueError, in one line, on a file that is not there or no image.
    In a folder, such files are passed over, and one warning at the end names them.
    """
    skipped: list[str] = []
    found = list(
        predict_each(
            _as_detector(model, categories),
            images,
            threshold,
            batch_size,
            device,
            top_k,
            views or ([View(transform)] if transform else None),
            merge,
            nms,
            skipped.append,
            progress,
        )
    )
    if skipped:
        warnings.warn(f"{len(skipped)} files passed over: {'; '.join(skipped)}", stacklevel=2)
    return found


def predict_each(
    detector: Detector,
    images: Picture | Iterable[Picture],
    threshold: float | None = None,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    top_k: int = 100,
    views: list[View] | None = None,
    merge: str = "fusion",
    nms: float | None = None,
    on_skip: Callable[[str], object] = lambda line: None,
    progress: bool = False,
    skip_named: bool = False,
) -> Iterator[Prediction]:
    """`predict`, one by one, so that no more than a batch of images is held.

    on_skip is called with a line for each file of a folder that cannot be read; with skip_named,
    files that were named themselves are passed over likewise.
    """
    threshold = detector.threshold if threshold is None else threshold
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}")
    if nms is not None and not 0 <= nms <= 1:
        raise ValueError(f"nms must be in [0, 1], or None for all boxes, got {nms}")
    if min(batch_size, top_k) < 1:
        raise ValueError(f"batch_size and top_k must be at least 1, got {batch_size}, {top_k}")
    if merge not in MERGES:
        raise ValueError(f"merge must be one of {sorted(MERGES)}, got {merge!r}")
    views = views or make_views(detector.transforms, short_side=detector.short_side)
    sources = list(find_images(images))
    if device is not None:
        detector.model.to(device)
    readable = _read_all(sources, on_skip, skip_named)
    with tqdm(total=len(sources), unit="image", disable=not progress, leave=False) as bar:
        while batch := list(islice(readable, batch_size)):
            all_found = detect(
                detector.model, [i for _, i in batch], views, merge, top_k, threshold, nms
            )
            for (path, image), found in zip(batch, all_found, strict=True):
                yield Prediction.of(found, detector.categories, image, path)
            bar.update(len(batch))


@torch.no_grad()
def detect(
    model: DeformableDETR,
    images: list[Image.Image],
    views: list[View],
    merge: str = "fusion",
    top_k: int = 100,
    threshold: float = 0.0,
    nms: float | None = None,
) -> list[Detections]:
    """The top_k best detections of each RGB picture with scores from the threshold on, in its
    pixels and on the CPU."""
    device = next(model.parameters()).device
    sizes = [(image.height, image.width) for image in images]
    seen = []
    for view in views:
        batch = Batch.from_images([view.of(image) for image in images]).to(device)
        with evaluating(model):
            found = [each.to("cpu") for each in postprocess(model(batch), sizes, top_k)]
        seen.append([view.back(f, i.width) for f, i in zip(found, images, strict=True)])
    merged = seen[0]
    if len(views) > 1:
        merged = [MERGES[merge](list(of_image)) for of_image in zip(*seen, strict=True)]
    if nms is not None:
        merged = [suppress([found], nms) for found in merged]
    counts = [min(top_k, int((found.scores >= threshold).sum())) for found in merged]
    return [found[:count] for found, count in zip(merged, counts, strict=True)]


def _read_all(
    sources: list[tuple[Picture, bool]], on_skip: Callable[[str], object], skip_named: bool
) -> Iterator[tuple[Path | None, Image.Image]]:
    """Each readable picture and its path; `on_skip` hears of the others."""
    for source, in_folder in sources:
        try:
            image = read_image(source)
        except (ValueError, FileNotFoundError) as error:  # the latter of a link to nowhere
            if not (in_folder or skip_named):
                raise
            on_skip(str(error))
            continue
        yield source if isinstance(source, Path) else None, image


def _as_detector(
    model: Detector | DeformableDETR | Path | str, categories: list[dict] | None
) -> Detector:
    if isinstance(model, Path | str):
        model = load_detector(model)
    if isinstance(model, DeformableDETR):
        categories = categories or plain_categories(model.config.num_classes)
        model = Detector(model, categories, transforms=transforms_of(model))
    categories = categories or model.categories
    if len(categories) != model.model.config.num_classes:
        raise ValueError(
            f"the model has {model.model.config.num_classes} classes, "
            f"got {len(categories)} categories"
        )
    return replace(model, categories=categories)
