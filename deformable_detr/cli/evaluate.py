"""deformable-detr evaluate"""

import argparse
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
    add_precision,
    add_top_k,
)
from deformable_detr.cli.views import add_views, choose_views

if TYPE_CHECKING:
    from accelerate import Accelerator

    from deformable_detr.data.coco import CocoDataset
    from deformable_detr.evaluation.report import Report
    from deformable_detr.inference.detector import Detector


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
        "On several GPUs: accelerate launch -m deformable_detr.cli evaluate ...",
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
    command.add_argument(
        "--class-agnostic",
        action="store_true",
        help="take all objects for one class: how well are they found, whatever they are called? "
        "Also for a model with other classes than the data",
    )
    add_views(command)
    add_precision(command)
    add_device(command)


def run(args: argparse.Namespace) -> int:
    """Print a report, and write it where asked. Of several processes, which share the images, the
    main one does so."""
    from deformable_detr.cli.beforehand import choose_device, refuse_targets
    from deformable_detr.evaluation.report import check_threshold
    from deformable_detr.inference.detector import load_detector, update_card
    from deformable_detr.training.processes import make_accelerator

    refuse_targets(args.json, args.report)
    check_threshold(args.threshold)
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")
    if args.keep_threshold and Path(args.model).suffix != ".safetensors":
        raise ValueError(
            f"--keep-threshold needs a .safetensors file that train wrote: {args.model}"
        )
    accelerator = make_accelerator()
    detector = load_detector(args.model)
    dataset = load_data(args, detector)
    if not args.class_agnostic:
        detector, dataset = with_same_classes(detector, dataset, accelerator.is_main_process)
    several = accelerator.num_processes > 1 and not args.device
    device = accelerator.device if several else choose_device(args.device)
    detector = detector.in_precision(args.precision, device)
    results = detect_all(args, detector, dataset, accelerator)
    if not accelerator.is_main_process:
        return 0
    found = analyse_all(args, detector, dataset, results)
    print(found.table())
    write_report(found, args)
    if args.keep_threshold:
        update_card(args.model, threshold=found.threshold)
        print(f"{args.model} now has the threshold {found.threshold:.3f}")
    return 0


def load_data(args: argparse.Namespace, detector: "Detector") -> "CocoDataset":
    """The split as the detector sees images; ValueError on fatal faults in its annotations."""
    from deformable_detr.cli.beforehand import pointing_to_check, print_fatal, refuse_any
    from deformable_detr.data.checks import check_annotations
    from deformable_detr.data.coco import CocoDataset, find_split

    with pointing_to_check(args.data):
        dataset = CocoDataset(*find_split(args.data, args.split), detector.eval_transform())
    faults = check_annotations(dataset.coco.dataset)
    refuse_any(print_fatal(args.split, faults), args.data)
    return dataset


def with_same_classes(
    detector: "Detector", dataset: "CocoDataset", say: bool
) -> "tuple[Detector, CocoDataset]":
    """Both with the classes of the data, of which empty ones that the detector has not do not
    count, which is said; ValueError where it lacks others."""
    import sys

    from deformable_detr.data.names import listed
    from deformable_detr.evaluation.agnostic import without_empty

    dataset, left_out = without_empty(dataset, [c["name"] for c in detector.categories])
    if left_out and say:
        print(f"left out, as no box has them: {listed(left_out)}", file=sys.stderr)
    try:
        return detector.for_categories(dataset.categories), dataset
    except ValueError as error:
        raise ValueError(f"{error}; --class-agnostic leaves classes aside") from None


def detect_all(
    args: argparse.Namespace,
    detector: "Detector",
    dataset: "CocoDataset",
    accelerator: "Accelerator",
) -> list[dict]:
    """COCO results of all images, each seen once or, with --tta, in several views, by all processes
    together."""
    from accelerate.utils import gather_object

    from deformable_detr.evaluation.agnostic import with_categories
    from deformable_detr.evaluation.detections import (
        in_order_of,
        predict_dataset,
        predict_in_views,
    )

    dataset = with_categories(dataset, detector.categories)
    options = {
        "batch_size": args.batch_size,
        "top_k": args.top_k,
        "progress": accelerator.is_main_process,
        "share": (accelerator.process_index, accelerator.num_processes),
    }
    if views := choose_views(args, detector):
        merge = args.merge or "fusion"
        results = predict_in_views(detector.model, dataset, views, merge, **options)
    else:
        results = predict_dataset(detector.model, dataset, **options)
    return in_order_of(dataset, gather_object(results))


def analyse_all(
    args: argparse.Namespace, detector: "Detector", dataset: "CocoDataset", results: list[dict]
) -> "Report":
    """The report on detections of a data set."""
    from datetime import datetime

    from deformable_detr.evaluation.agnostic import without_classes
    from deformable_detr.evaluation.report import analyse_results

    threshold = detector.threshold if args.threshold is None else args.threshold
    about = {
        "model": args.model,
        "data": str(args.data),
        "split": args.split,
        "date": datetime.now().astimezone().isoformat(" ", "minutes"),
    }
    if args.class_agnostic:
        results, dataset = without_classes(results, dataset)
        about["classes"] = "left aside: all objects are one class"
    return analyse_results(
        results,
        dataset,
        None if args.keep_threshold else threshold,
        num_queries=detector.model.config.num_queries,
        top_k=args.top_k,
        about=about,
    )


def write_report(found: "Report", args: argparse.Namespace) -> None:
    """--json and --report."""
    from deformable_detr.evaluation.report_page import write_html

    if args.json:
        found.write_json(args.json)
    if args.report:
        write_html(found, args.report)
        print(f"report: {args.report}")
