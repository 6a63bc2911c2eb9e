"""What the shipped detector looks at, over the whole test split: Figs. 5 and 6, measured.

    python experiments/looking.py        # about three minutes of one core

Sampling points and gradients of the detections that find an object of their class, each figure
beside controls, with intervals. Writes data/results/looking.json.
"""

import argparse
from collections.abc import Iterable

import numpy as np
import torch
from digits import CHECKPOINTS, RESULTS, load_split
from looking_figures import SEED, SIDE, STRIDE, Gathered, edge_ranks, measure
from torch import Tensor, nn
from torchvision.ops import box_iou
from tqdm import tqdm

from deformable_detr.boxes import cxcywh_to_xyxy
from deformable_detr.data.transforms import digits_eval_transform
from deformable_detr.files import write_json
from deformable_detr.inference.detector import load_detector
from deformable_detr.inference.postprocess import postprocess
from deformable_detr.look.gradients import FollowReferences
from deformable_detr.look.trace import trace
from deformable_detr.structures import Batch

TOKENS = 4  # of an object, at most; twice as many of an image's background


def gather(model: nn.Module, dataset: object, size: int, every: int) -> tuple[Gathered, ...]:
    """Detections, tokens of the encoder and gradients, of images in batches of that size.

    every: only each so many-th image.
    """
    found, tokens, gradients = Gathered(), Gathered(), Gathered()
    numbers = range(0, len(dataset), every)
    rng = np.random.default_rng(SEED)
    for start in tqdm(range(0, len(numbers), size)):
        places = numbers[start : start + size]
        images, targets = zip(*(dataset[i] for i in places), strict=True)
        batch = Batch.from_images(list(images))
        with torch.no_grad():
            seen = trace(model, batch)
        rows = matched(seen.output, targets, SIDE)
        add_detections(found, seen, rows, places)
        add_tokens(tokens, seen, targets, places, rng)
        add_gradients(gradients, model, batch, one_each(rows, rng), places)
    return found, tokens, gradients


def matched(output: object, targets: Iterable, side: int) -> list[tuple[int, int, int]]:
    """(image, query, label) of each detection with an object of its class, IoU 0.5 or more; an
    object has one, the best."""
    detections = postprocess(output, [(side, side)] * len(targets), threshold=0.5)
    rows = []
    for i, (each, target) in enumerate(zip(detections, targets, strict=True)):
        overlap = box_iou(each.boxes, cxcywh_to_xyxy(target.boxes) * side)
        overlap = overlap * (each.labels[:, None] == target.labels)
        for query, label, row in zip(each.queries, each.labels, overlap, strict=True):
            if len(row) and row.max() >= 0.5:
                overlap[:, row.argmax()] = 0
                rows.append((i, int(query), int(label)))
    return rows


def add_detections(found: Gathered, seen: object, rows: list, places: range) -> None:
    """Points, weights and references of every decoder layer, (N, layers, M, L, K, ...), in pixels,
    and the boxes that were found."""
    image, query, _ = (torch.tensor(x) for x in zip(*rows, strict=True))
    layers = [name for name in seen.record if "decoder" in name.split(".")]
    samplings = [seen.record[name] for name in layers]
    references = [seen.references[name][image, query, 0] for name in layers]
    found.add(
        image=np.array(places)[image],
        points=stack(s.locations[image, query] * SIDE for s in samplings),
        weights=stack(s.weights[image, query] for s in samplings),
        reference=stack(x * SIDE for x in references),
        box=(cxcywh_to_xyxy(seen.output.boxes[image, query]) * SIDE).numpy(),
    )


def add_tokens(
    tokens: Gathered, seen: object, targets: tuple, places: range, rng: np.random.Generator
) -> None:
    """Points and weights, (N, layers, M, L, K, ...), of some of the finest tokens whose middles lie
    in a box, with that box; and of some in none, with a box of no size."""
    side = SIDE // STRIDE
    y, x = np.divmod(np.arange(side**2), side)
    middles = np.stack([x, y], -1) * STRIDE + STRIDE / 2
    chosen = []
    for i, target in enumerate(targets):
        boxes = (cxcywh_to_xyxy(target.boxes) * SIDE).numpy()
        inside = np.all(
            (middles >= boxes[:, None, :2]) & (middles <= boxes[:, None, 2:]), -1
        )  # (objects, tokens)
        for box, mine in zip(boxes, inside & (inside.sum(0) == 1), strict=True):
            picked = rng.permutation(np.flatnonzero(mine))[:TOKENS]
            chosen += [(i, token, box) for token in picked]
        ground = rng.permutation(np.flatnonzero(~inside.any(0)))[: 2 * TOKENS]
        chosen += [(i, token, np.zeros(4)) for token in ground]
    image, token = (torch.tensor([row[i] for row in chosen]) for i in (0, 1))
    samplings = [s for name, s in seen.record.items() if "encoder" in name.split(".")]
    tokens.add(
        image=np.array(places)[image],
        points=stack(s.locations[image, token] * SIDE for s in samplings),
        weights=stack(s.weights[image, token] for s in samplings),
        reference=middles[token][:, None].repeat(len(samplings), 1),
        box=np.stack([row[2] for row in chosen]),
    )


def one_each(rows: list, rng: np.random.Generator) -> list[tuple[int, int, int]]:
    """One detection of each image that has any, at random."""
    shuffled = [rows[i] for i in rng.permutation(len(rows))]
    return sorted({row[0]: row for row in shuffled}.values())


def add_gradients(
    gradients: Gathered, model: nn.Module, batch: Batch, rows: list, places: range
) -> None:
    """The energy of each item's gradient, (N, 5, SIDE, SIDE), of one detection of each image.

    Images of one size do not touch: the gradient of a sum over images is each one's own.
    """
    pixels = batch.images.clone().requires_grad_(True)
    with FollowReferences():
        output = model(Batch(pixels, batch.mask, batch.sizes))
    image, query, label = (torch.tensor(x) for x in zip(*rows, strict=True))
    boxes, scores = output.boxes[image, query], output.logits[image, query, label].sigmoid()
    items = [*boxes.unbind(-1), scores]
    energy = []
    for item in items:
        (gradient,) = torch.autograd.grad(item.sum(), pixels, retain_graph=True)
        energy.append(gradient[image].square().sum(1))
    gradients.add(
        image=np.array(places)[image],
        energy=torch.stack(energy, 1).numpy(),
        box=(cxcywh_to_xyxy(boxes.detach()) * SIDE).numpy(),
    )


def stack(tensors: Iterable[Tensor]) -> np.ndarray:
    """One beside the other, behind the first axis."""
    return torch.stack(list(tensors), 1).numpy()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="each so many-th image, for a trial")
    parser.add_argument("--batch-size", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load_detector(CHECKPOINTS / "digits.safetensors").model.eval()
    dataset = load_split("test", digits_eval_transform())
    parts = gather(model, dataset, args.batch_size, args.every)
    write_json(RESULTS / "looking.json", measure(*parts, edge_ranks(dataset)))
    print(f"written: {RESULTS / 'looking.json'}")


if __name__ == "__main__":
    main()
