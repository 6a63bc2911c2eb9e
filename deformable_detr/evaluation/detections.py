"""Detections on a whole data set, as COCO results. Chapter training."""

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from deformable_detr.data.coco import CocoDataset, collate
from deformable_detr.evaluation_mode import evaluating
from deformable_detr.inference.postprocess import as_results, postprocess
from deformable_detr.inference.predict import detect
from deformable_detr.inference.sizes import batches_of_one_size
from deformable_detr.inference.views import View
from deformable_detr.interrupts import ignore_interrupt
from deformable_detr.models.base import BaseDetector
from deformable_detr.structures import Batch, Detections, Target

Share = tuple[int, int]  # the number of a process, and how many there are


def predict_dataset(
    model: BaseDetector,
    dataset: CocoDataset,
    batch_size: int = 8,
    num_workers: int = 0,
    progress: bool = True,
    top_k: int = 100,
    share: Share = (0, 1),
) -> list[dict]:
    """The best top_k detections of every image, as COCO results with the data's own ids, image by
    image in the data set's order.

    batch_size: images at once, at most: only those of one size share a batch, so that a detection
    does not depend on it. share: of several processes, which is this: it detects on its part of the
    batches.
    """
    device = next(model.parameters()).device
    loader = DataLoader(
        dataset,
        batch_sampler=batches_of(dataset, batch_size, share),
        collate_fn=_batches,
        num_workers=num_workers,
        generator=torch.Generator(),  # leaves the global random state alone
        worker_init_fn=ignore_interrupt,
    )
    results = []
    for loaded in tqdm(loader, "evaluate", unit="batch", disable=not progress, leave=False):
        for batch in loaded:
            sizes = [target.original_size for target in batch.targets]
            with evaluating(model), torch.no_grad():
                found = postprocess(model(batch.to(device)), sizes, top_k)
            for target, each in zip(batch.targets, found, strict=True):
                results += _results(each, target.image_id, dataset.categories)
    return in_order_of(dataset, results)


def predict_in_views(
    model: BaseDetector,
    dataset: CocoDataset,
    views: list[View],
    merge: str = "fusion",
    batch_size: int = 8,
    progress: bool = True,
    top_k: int = 100,
    share: Share = (0, 1),
) -> list[dict]:
    """The same with several views of each image, merged as `inference.predict.detect` says."""
    results = []
    batches = batches_of(dataset, batch_size, share)
    for batch in tqdm(batches, "evaluate", unit="batch", disable=not progress, leave=False):
        ids = [dataset.image_ids[i] for i in batch]
        images = [dataset.load_image(image_id) for image_id in ids]
        all_found = detect(model, images, views, merge, top_k)
        for image_id, found in zip(ids, all_found, strict=True):
            results += _results(found, image_id, dataset.categories)
    return in_order_of(dataset, results)


def in_order_of(dataset: CocoDataset, results: list[dict]) -> list[dict]:
    """COCO results image by image as a data set has them, those of one image as they are."""
    place = {image_id: i for i, image_id in enumerate(dataset.image_ids)}
    return sorted(results, key=lambda result: place[result["image_id"]])


def batches_of(dataset: CocoDataset, batch_size: int, share: Share = (0, 1)) -> list[list[int]]:
    """The places of images that are seen at once, by the sizes that the annotation file states."""
    images = (dataset.coco.imgs[image_id] for image_id in dataset.image_ids)
    sizes = [(image.get("height"), image.get("width")) for image in images]
    return batches_of_one_size(sizes, batch_size)[share[0] :: share[1]]


def _batches(samples: list[tuple[Tensor, Target]]) -> list[Batch]:
    """More than one where the annotation file is wrong about a size, or does not say it."""
    sizes = batches_of_one_size([image.shape for image, _ in samples], len(samples))
    return [collate([samples[i] for i in batch]) for batch in sizes]


def _results(found: Detections, image_id: int | str, categories: list[dict]) -> list[dict]:
    return as_results(found, image_id, [categories[i]["id"] for i in found.labels.tolist()])
