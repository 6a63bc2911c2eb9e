"""What detecting in bfloat16, and with weights of eight bits, costs and saves.

    python benchmarks/precision.py          # some minutes of a core; needs data/digits

Two trained detectors, of digits and of trees, as they are, in bfloat16 as `predict` has it, and
with torch's dynamic quantisation of the linear layers: AP on test, how far boxes move, time of
one image (in pairs), megabytes of weights. Writes data/results/precision.json.
"""

import os
import sys

if __name__ == "__main__":  # this file's folder would hide Python's own module called operator
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    sys.path[:1] = [root, os.path.join(root, "experiments")]

import argparse
import dataclasses
import io
import warnings
from pathlib import Path

import torch
from digits import DATA as DIGITS
from torch import nn
from torchvision.ops import box_iou
from trees import make_tiles

from benchmarks import timing
from deformable_detr.data.coco import CocoDataset
from deformable_detr.data.places import find_split
from deformable_detr.evaluation.coco import score
from deformable_detr.evaluation.detections import predict_dataset
from deformable_detr.files import write_json
from deformable_detr.inference.detector import Detector, load_detector
from deformable_detr.inference.predict import predict
from deformable_detr.models import BaseDetector
from deformable_detr.provenance import provenance

COMMAND = "python benchmarks/precision.py"
CHECKPOINTS = timing.ROOT / "data" / "checkpoints"
MODELS = {"digits": lambda: DIGITS, "trees": make_tiles}
PLAIN, NARROW, EIGHT_BITS = "float32", "bfloat16", "int8"


def with_int8(model: BaseDetector) -> BaseDetector:
    """A copy whose linear layers have weights of eight bits, by torch's own tools."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are to move to another package
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)


def forms(detector: Detector) -> dict[str, Detector]:
    """The detector in each precision."""
    return {
        PLAIN: detector,
        NARROW: detector.in_precision("bf16"),
        EIGHT_BITS: dataclasses.replace(detector, model=with_int8(detector.model)),
    }


def megabytes(model: nn.Module) -> float:
    """Of the weights as a file keeps them."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return round(buffer.tell() / 1e6, 2)


def moves(paths: list[Path], plain: Detector, other: Detector) -> dict[str, float]:
    """Of the boxes that the detector shows: the largest and the usual move of an edge, in pixels,
    and how many have no box of their class any more that shares half with them."""
    found, lost = [], 0
    pairs = zip(
        predict(plain, paths),
        predict(other, paths, threshold=plain.threshold / 2),
        strict=True,
    )
    for before, after in pairs:
        for label, box in zip(before.labels, before.boxes, strict=True):
            same = after.boxes[after.labels == label]
            overlap = box_iou(box[None], same)[0]
            if len(same) and overlap.max() > 0.5:
                found.append((same[overlap.argmax()] - box).abs().max().item())
            else:
                lost += 1
    middle = sorted(found)[len(found) // 2]
    return {"boxes": len(found), "largest": max(found), "median": middle, "lost": lost}


def measure(name: str, images: int, rounds: int) -> list[dict]:
    """A row for each precision of one detector."""
    detector = load_detector(CHECKPOINTS / f"{name}.safetensors")
    places = find_split(MODELS[name](), "test")
    dataset = CocoDataset(*places, detector.eval_transform())
    dataset.image_ids = dataset.image_ids[:images]
    paths = [dataset.pictures.path(dataset.coco.imgs[i]["file_name"]) for i in dataset.image_ids]
    made = forms(detector)
    calls = {form: lambda each=each: predict(each, paths[0]) for form, each in made.items()}
    times = timing.side_by_side(calls, dict.fromkeys(calls, rounds))
    rows = []
    for form, each in made.items():
        figures = score(predict_dataset(each.model, dataset, progress=False), dataset).to_dict()
        moved = {k: round(v, 3) for k, v in moves(paths[:200], detector, each).items()}
        row = {"model": name, "precision": form, "images": len(paths)}
        row |= {key: round(figures[key], 4) for key in ("ap", "ap50", "ap_small")}
        rows.append(row | {"moved": moved, "megabytes": megabytes(each.model)} | times[form])
        print({k: row[k] for k in ("model", "precision", "ap")}, moved, times[form]["median_ms"])
    return rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1000, help="of test, at most")
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for name in MODELS for row in measure(name, arguments.images, arguments.rounds)]
    write_json(
        timing.RESULTS / "precision.json", provenance(COMMAND, ("torchvision",)) | {"rows": rows}
    )


if __name__ == "__main__":
    main()
