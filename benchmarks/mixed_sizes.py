"""What padding costs: AP on images of mixed widths, by how they share batches.

    python benchmarks/mixed_sizes.py        # two minutes of a core; needs data/digits

The shipped detector on the validation digits, each cut to a width of 56 to 128 pixels. Three
ways to batch them: one by one; eight as they come, padded to one size, as the official code does
it; eight of one size at most, as `evaluate` does it. And each of them with the model as it was
trained, and with `exact_padding`. Writes data/results/mixed_sizes.json.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from PIL import Image

from deformable_detr.data.coco import CocoDataset, collate
from deformable_detr.data.places import find_split
from deformable_detr.evaluation.coco import score
from deformable_detr.evaluation.detections import predict_dataset
from deformable_detr.evaluation_mode import evaluating
from deformable_detr.files import write_json
from deformable_detr.inference.detector import Detector, load_detector
from deformable_detr.inference.postprocess import as_results, postprocess
from deformable_detr.provenance import provenance
from deformable_detr.weights.published import load_pretrained

ROOT = Path(__file__).resolve().parents[1]
DETECTOR = ROOT / "data" / "checkpoints" / "digits.safetensors"
RESULTS = ROOT / "data" / "results" / "mixed_sizes.json"
WIDTHS = 56, 128  # pixels
BATCH, SEED = 8, 0


def cut(source: CocoDataset, folder: Path, images: int) -> tuple[Path, Path]:
    """The first images of a data set, each cut on the right; what keeps less than half goes."""
    generator = torch.Generator().manual_seed(SEED)
    content = {"images": [], "annotations": [], "categories": source.categories}
    for image_id in source.image_ids[:images]:
        width = int(torch.randint(WIDTHS[0], WIDTHS[1] + 1, (), generator=generator))
        picture: Image.Image = source.load_image(image_id)
        entry = source.coco.imgs[image_id] | {"width": width}
        picture.crop((0, 0, width, picture.height)).save(folder / entry["file_name"])
        content["images"].append(entry)
        for annotation in source.coco.imgToAnns[image_id]:
            x, y, w, h = annotation["bbox"]
            left = min(x + w, width) - x
            if left >= w / 2:
                box = {"bbox": [x, y, left, h], "area": left * h}
                content["annotations"].append(annotation | box)
    content["info"] = source.info
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder, folder / "annotations.json"


@torch.no_grad()
def padded(detector: Detector, dataset: CocoDataset) -> list[dict]:
    """COCO results of batches as they come, padded to one size."""
    results = []
    for start in range(0, len(dataset), BATCH):
        samples = [dataset[i] for i in range(start, min(start + BATCH, len(dataset)))]
        batch = collate(samples)
        with evaluating(detector.model):
            output = detector.model(batch)
        found = postprocess(output, [target.original_size for target in batch.targets])
        for target, each in zip(batch.targets, found, strict=True):
            ids = [dataset.categories[label]["id"] for label in each.labels.tolist()]
            results += as_results(each, target.image_id, ids)
    return results


def measure(detector: Detector, dataset: CocoDataset) -> dict[str, float]:
    """AP by how images share batches."""
    found = {
        "one by one": predict_dataset(detector.model, dataset, 1, progress=False),
        f"{BATCH} as they come, padded": padded(detector, dataset),
        f"{BATCH} of one size": predict_dataset(detector.model, dataset, BATCH, progress=False),
    }
    return {name: round(score(results, dataset).ap, 4) for name, results in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=500, help="default: %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(1)
    detector = load_detector(DETECTOR)
    exact = load_pretrained(DETECTOR, exact_padding=True).model
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        whole = CocoDataset(*find_split(ROOT / "data" / "digits", "val"))
        place = cut(whole, Path(folder), args.images)
        dataset = CocoDataset(*place, detector.eval_transform())
        for name, model in (("as trained", detector.model), ("exact_padding", exact)):
            rows[name] = measure(Detector(model, detector.categories), dataset)
            print(name, rows[name], flush=True)
    about = provenance(
        "python benchmarks/mixed_sizes.py", ("torchvision",), SEED, ROOT / "data" / "digits"
    )
    write_json(RESULTS, about | {"images": args.images, "widths": list(WIDTHS), "ap": rows})


if __name__ == "__main__":
    main()
