"""Detect objects in files, folders, arrays and pictures, with the names of what they are. Chapter
12."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from deformable_detr.data.images import Picture, find_images, read_image
from deformable_detr.data.preparation import preparation_of
from deformable_detr.evaluation_mode import evaluating
from deformable_detr.inference.detector import Detector, load_detector
from deformable_detr.inference.postprocess import postprocess
from deformable_detr.inference.prediction import Prediction
from deformable_detr.inference.views import MERGES, View, make_views, suppress
from deformable_detr.models import BaseDetector
from deformable_detr.structures import Batch, Detections
from deformable_detr.weights.classes import plain_categories


def predict(
    model: Detector | BaseDetector | Path | str,
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
    `views.MERGES`. nms: overlap (IoU, in [0, 1]) from which of two boxes of a class only the better
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
    model: BaseDetector,
    images: list[Image.Image],
    views: list[View],
    merge: str = "fusion",
    top_k: int = 100,
    threshold: float = 0.0,
    nms: float | None = None,
) -> list[Detections]:
    """The top_k best detections of each RGB picture with scores from the threshold on, in its
    pixels and on the CPU. ValueError where merge is not in MERGES."""
    if merge not in MERGES:
        raise ValueError(f"merge must be one of {sorted(MERGES)}, got {merge!r}")
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
    model: Detector | BaseDetector | Path | str, categories: list[dict] | None
) -> Detector:
    if isinstance(model, Path | str):
        model = load_detector(model)
    if not isinstance(model, Detector):
        categories = categories or plain_categories(model.config.num_classes)
        model = Detector(model, categories, transforms=preparation_of(model.config.backbone))
    categories, classes = categories or model.categories, model.model.config.num_classes
    if len(categories) != classes:
        raise ValueError(f"the model has {classes} classes, got {len(categories)} categories")
    return replace(model, categories=categories)
