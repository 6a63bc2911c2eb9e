"""deformable-detr evaluate"""

import argparse
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from deformable_detr.cli.arguments import (
    DATA_HELP,
    WEIGHTS_HELP,
    add_batch_size,
    add_command,
    add_data,
    add_device,
    add_model,
    add_top_k,
)
from deformable_detr.cli.views import add_views, choose_views

if TYPE_CHECKING:
    from deformable_detr.data.coco import CocoDataset
    from deformable_detr.evaluation.report import Report
    from deformable_detr.inference.detector import Detector
    from deformable_detr.inference.views import View


def add(commands: argparse.Action) -> None:
    """Its arguments."""
    command = add_command(
        commands,
        "evaluate",
        run,
        "compute COCO metrics of a detector, and say what it gets wrong",
        "data/digits --split val --report report.html",
        DATA_HELP,
        WEIGHTS_HELP,
    )
    add_data(command, "val")
    add_model(command)
    add_batch_size(command)
    add_top_k(command)
    command.add_argument("--json", type=Path, metavar="FILE", help="write all figures to a file")
    command.add_argument(
        "--report", type=Path, metavar="FILE", help="write a page with curves and pictures (HTML)"
    )
    threshold = command.add_mutually_exclusive_group()
    threshold.add_argument(
        "--threshold", type=float, help="score from which errors are counted (default: the model's)"
    )
    threshold.add_argument(
        "--keep-threshold",
        action="store_true",
        help="find the threshold with the best F1 on this split, and store it in the model's file",
    )
    add_views(command)
    add_device(command)


def run(args: argparse.Namespace) -> int:
    """Print a report, and write it where asked."""
    from deformable_detr.cli.beforehand import choose_device, refuse_targets
    from deformable_detr.inference.detector import load_detector, update_card

    refuse_targets(args.json, args.report)
    if args.keep_threshold and Path(args.model).suffix != ".safetensors":
        raise ValueError(
            f"--keep-threshold needs a .safetensors file that train wrote: {args.model}"
        )
    detector = load_detector(args.model)
    dataset = load_data(args, detector)
    detector = detector.for_categories(dataset.categories)
    detector.model.to(choose_device(args.device))
    found = analyse_data(args, detector, dataset)
    print(found.table())
    write_report(found, args)
    if args.keep_threshold:
        update_card(args.model, threshold=found.threshold)
        print(f"{args.model} now has the threshold {found.threshold:.3f}")
    return 0


def load_data(args: argparse.Namespace, detector: "Detector") -> "CocoDataset":
    """The split as the detector sees images; ValueError on fatal faults in its annotations."""
    from deformable_detr.cli.beforehand import print_fatal, refuse_any
    from deformable_detr.data.checks import check_annotations
    from deformable_detr.data.coco import CocoDataset, find_split

    dataset = CocoDataset(*find_split(args.data, args.split), detector.eval_transform())
    faults = check_annotations(dataset.coco.dataset)
    refuse_any(print_fatal(args.split, faults), args.data)
    return dataset


def analyse_data(
    args: argparse.Namespace, detector: "Detector", dataset: "CocoDataset"
) -> "Report":
    """The report on a detector, which sees each image once or, with --tta, in several views."""
    from deformable_detr.evaluation.report import analyse, analyse_results

    threshold = detector.threshold if args.threshold is None else args.threshold
    threshold = None if args.keep_threshold else threshold
    if views := choose_views(args, detector):
        return analyse_results(detect_all(args, detector, dataset, views), dataset, threshold)
    return analyse(detector.model, dataset, args.batch_size, threshold=threshold, top_k=args.top_k)


def detect_all(
    args: argparse.Namespace, detector: "Detector", dataset: "CocoDataset", views: "list[View]"
) -> list[dict]:
    """COCO results of a data set, in several views of each image."""
    from tqdm import tqdm

    from deformable_detr.inference.predict import detect
    from deformable_detr.inference.prediction import Prediction

    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")
    results = []
    ids = iter(tqdm(dataset.image_ids, "evaluate", unit="image", leave=False))
    while batch := list(islice(ids, args.batch_size)):
        images = [dataset.load_image(image_id) for image_id in batch]
        all_found = detect(detector.model, images, views, args.merge or "fusion", args.top_k)
        for image_id, image, found in zip(batch, images, all_found, strict=True):
            results += Prediction.of(found, detector.categories, image).to_coco(image_id)
    return results


def write_report(found: "Report", args: argparse.Namespace) -> None:
    """--json and --report."""
    from deformable_detr.evaluation.report_page import write_html

    if args.json:
        found.write_json(args.json)
    if args.report:
        write_html(found, args.report)
        print(f"report: {args.report}")
