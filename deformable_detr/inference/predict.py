"""Detect objects in files, folders, arrays and pictures, with the names of what they are.
Chapter your_own_data."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from deformable_detr.data.crowding import TOP_K
from deformable_detr.data.names import counted
from deformable_detr.data.preparation import preparation_of
from deformable_detr.data.transforms import SMALLEST_SIDE
from deformable_detr.evaluation_mode import evaluating
from deformable_detr.inference.detector import Detector, load_detector
from deformable_detr.inference.postprocess import postprocess
from deformable_detr.inference.prediction import Prediction
from deformable_detr.inference.remarks import Remarks
from deformable_detr.inference.sizes import batches_of_one_size, in_order
from deformable_detr.inference.sources import Picture, Source, find_sources, image_ids
from deformable_detr.inference.tiles import detect_tiles
from deformable_detr.inference.views import MERGES, View, make_views, suppress
from deformable_detr.models import BaseDetector
from deformable_detr.structures import Batch, Detections
from deformable_detr.weights.classes import plain_categories

AHEAD = 16  # batches among which images of one size are looked for

OnLine = Callable[[str], object]


def predict(
    model: Detector | BaseDetector | Path | str,
    images: Picture | Iterable[Picture],
    categories: list[dict] | None = None,
    threshold: float | None = None,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    top_k: int | None = None,
    transform: Callable[[Image.Image], Tensor] | None = None,
    views: list[View] | None = None,
    merge: str = "fusion",
    nms: float | None = None,
    tiles: int | None = None,
    precision: str = "float32",
    progress: bool = False,
) -> list[Prediction]:
    """Detect objects in images.

    model: a detector, or a name or path that `load_detector` reads. images: a file, a folder (all
    images in it, by name), a file's bytes, an array, a tensor, a PIL image, or a list of these; see
    `find_sources`. categories: {"id": int, "name": str} each, of the classes to look for, found in
    the model by their names; of a bare model, whose classes have no names, all of them. threshold:
    least score, in [0, 1]; None is the detector's own, or 0.5. batch_size: images at once, at most;
    only those of one size, so that what is found does not depend on it. device: to which the model
    is moved first; by default it stays. top_k: detections of an image at most, by default TOP_K, or
    with tiles so many of each. transform: from a PIL image to a (3, h, w) tensor, where it should
    not be the detector's. views: for test-time augmentation, from `make_views`; merge: how they are
    merged, a name in `views.MERGES`. nms: overlap (IoU, in [0, 1]) from which of two boxes of a
    class only the better one stays; None, the default, keeps all, as the paper does: queries learn
    not to repeat others. tiles: look at each image in pieces with sides of so many pixels; see
    `tiles.detect_tiles`. precision: "float32", "bf16", or "auto", bf16 where the device
    has instructions for it.
    Raises FileNotFoundError and ValueError, in one line, on a file that is not there or no image.
    In a folder, such files are passed over, and one warning at the end names them; another says
    where only a file's first frame was looked at, or an image was shrunk much.
    """
    skipped: list[str] = []
    notes: list[str] = []
    found = predict_each(
        _as_detector(model, categories).in_precision(precision, device),
        images,
        threshold,
        batch_size,
        device,
        top_k,
        views or ([View(transform)] if transform else None),
        merge,
        nms,
        tiles,
        on_skip=skipped.append,
        on_note=notes.append,
        progress=progress,
    )
    predictions = list(found)
    if skipped:
        notes.append(f"{counted(len(skipped), 'file')} passed over: {'; '.join(skipped)}")
    for line in notes:
        warnings.warn(line, stacklevel=2)
    return predictions


def predict_each(
    detector: Detector,
    images: Picture | Iterable[Picture],
    threshold: float | None = None,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    top_k: int | None = None,
    views: list[View] | None = None,
    merge: str = "fusion",
    nms: float | None = None,
    tiles: int | None = None,
    on_skip: OnLine = lambda line: None,
    on_note: OnLine = lambda line: None,
    progress: bool = False,
    skip_named: bool = False,
) -> Iterator[Prediction]:
    """`predict`, one by one in the order given, so that no more than a batch of images is held.

    on_skip is called with a line for each file of a folder that cannot be read; with skip_named,
    files that were named themselves are passed over likewise. on_note is called at the end, with
    what else is worth a line.
    """
    threshold = detector.threshold if threshold is None else threshold
    _check(threshold, nms, batch_size, top_k, tiles)
    views = views or make_views(detector.transforms, short_side=detector.short_side)
    sources = list(find_sources(images))
    ids = image_ids(sources)
    if device is not None:
        detector.model.to(device)
    remarks = Remarks(detector, tiles)
    look = Look(detector, views, merge, top_k, threshold, nms, tiles, batch_size)

    def look_at(places: list[int]) -> list[Prediction | None]:
        """Those of some sources, of one size; None for what cannot be read."""
        images = [_read(sources[i], remarks, on_skip, skip_named) for i in places]
        readable = [image for image in images if image is not None]
        found = iter(look(readable))
        return [
            None
            if image is None
            else Prediction.of(*next(found), detector.categories, image, sources[i].path, ids[i])
            for i, image in zip(places, images, strict=True)
        ]

    batches = _batches(sources, batch_size, remarks)
    with tqdm(total=len(sources), unit="image", disable=not progress, leave=False) as bar:
        for prediction in in_order(batches, look_at):
            if prediction is not None:
                yield prediction
            bar.update()
    for line in remarks.lines():
        on_note(line)


@dataclass
class Look:
    """One way to look at pictures, whole or in tiles: the options of `predict`."""

    detector: Detector
    views: list[View]
    merge: str
    top_k: int | None
    threshold: float
    nms: float | None
    tiles: int | None
    batch_size: int

    def __call__(self, images: list[Image.Image]) -> list[tuple[Detections, float]]:
        """What is found in each, and the best score of all, also below the threshold."""
        return list(map(self._in_tiles, images)) if self.tiles else self._whole(images)

    def _whole(self, images: list[Image.Image]) -> list[tuple[Detections, float]]:
        top_k, nms = self.top_k or TOP_K, self.nms
        found = detect(self.detector.model, images, self.views, self.merge, top_k, nms)
        highest = [max(each.scores.tolist(), default=0.0) for each in found]
        found = [each[each.scores >= self.threshold] for each in found]
        return list(zip(found, highest, strict=True))

    def _in_tiles(self, image: Image.Image) -> tuple[Detections, float]:
        highest = [0.0]

        def look(tiles: list[Image.Image]) -> list[Detections]:
            found, best = zip(*self._whole(tiles), strict=True)
            highest.extend(best)
            return list(found)

        whole = self.detector.resizes  # then it has no more pixels than any other image
        found = detect_tiles(look, image, self.tiles, self.batch_size, whole)
        return found[: self.top_k], max(highest)


@torch.no_grad()
def detect(
    model: BaseDetector,
    images: list[Image.Image],
    views: list[View],
    merge: str = "fusion",
    top_k: int = TOP_K,
    nms: float | None = None,
) -> list[Detections]:
    """The top_k best detections of each RGB picture, in its pixels and on the CPU. Those that come
    to have one size are seen at once. ValueError where merge is not in MERGES."""
    if merge not in MERGES:
        raise ValueError(f"merge must be one of {', '.join(MERGES)}, got {merge!r}")
    seen = [_detect_in(view, model, images, top_k) for view in views]
    merged = seen[0]
    if len(views) > 1:
        merged = [MERGES[merge](list(of_image)) for of_image in zip(*seen, strict=True)]
    if nms is not None:
        merged = [suppress([found], nms) for found in merged]
    return [found[:top_k] for found in merged]


def _detect_in(
    view: View, model: BaseDetector, images: list[Image.Image], top_k: int
) -> list[Detections]:
    """The detections of each picture in one view, in its pixels and on the CPU."""
    device = next(model.parameters()).device
    tensors = [view.of(image) for image in images]
    found: dict[int, Detections] = {}
    for places in batches_of_one_size([tensor.shape for tensor in tensors], len(images) or 1):
        batch = Batch.from_images([tensors[i] for i in places]).to(device)
        sizes = [(images[i].height, images[i].width) for i in places]
        with evaluating(model):
            detected = postprocess(model(batch), sizes, top_k)
        for i, each in zip(places, detected, strict=True):
            found[i] = view.back(each.to("cpu"), images[i].width)
    return [found[i] for i in range(len(images))]


def _check(
    threshold: float, nms: float | None, batch_size: int, top_k: int | None, tiles: int | None
) -> None:
    """ValueError where one of these is out of range."""
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}")
    if nms is not None and not 0 <= nms <= 1:
        raise ValueError(f"nms must be in [0, 1], or None for all boxes, got {nms}")
    if min(batch_size, 1 if top_k is None else top_k) < 1:
        raise ValueError(f"batch_size and top_k must be at least 1, got {batch_size}, {top_k}")
    if tiles is not None and tiles < SMALLEST_SIDE:
        raise ValueError(f"tiles must have {SMALLEST_SIDE} pixels or more, got {tiles}")


def _batches(sources: list[Source], batch_size: int, remarks: Remarks) -> Iterator[list[int]]:
    """The places of images that are seen at once, among AHEAD batches those of one size; of these
    many the headers are read before the first."""
    for start in range(0, len(sources), AHEAD * batch_size):
        headers = [source.header() for source in sources[start : start + AHEAD * batch_size]]
        for i, (_, frames) in enumerate(headers):
            remarks.note_frames(sources[start + i], frames)
        for batch in batches_of_one_size([size for size, _ in headers], batch_size):
            yield [start + i for i in batch]


def _read(
    source: Source, remarks: Remarks, on_skip: OnLine, skip_named: bool
) -> Image.Image | None:
    """A picture; None where it cannot be read or is too large, of which `on_skip` hears."""
    try:
        image = source.read()
        remarks.note_size(source, image.size)
        return image
    except (ValueError, FileNotFoundError) as error:  # the latter of a link to nowhere
        if source.named and not skip_named:
            raise
        on_skip(str(error))
        return None


def _as_detector(
    model: Detector | BaseDetector | Path | str, categories: list[dict] | None
) -> Detector:
    """ValueError where categories are not the model's, by name, or by number of a bare one."""
    if isinstance(model, Path | str):
        model = load_detector(model)
    if isinstance(model, Detector):
        return model.for_categories(categories) if categories else model
    classes = model.config.num_classes
    categories = categories or plain_categories(classes)
    if len(categories) != classes:
        raise ValueError(
            f"the model has {counted(classes, 'class')}, got {counted(len(categories), 'category')}"
        )
    return Detector(model, categories, transforms=preparation_of(model.config.backbone))
