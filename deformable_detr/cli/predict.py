"""deformable-detr predict"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from deformable_detr.cli.arguments import (
    WEIGHTS_HELP,
    add_batch_size,
    add_command,
    add_device,
    add_model,
    add_precision,
)
from deformable_detr.cli.views import add_views, choose_views
from deformable_detr.data.crowding import TOP_K

if TYPE_CHECKING:
    from deformable_detr.inference.prediction import Prediction


def add(commands: argparse.Action) -> None:
    """Its arguments."""
    command = add_command(
        commands,
        "predict",
        run,
        "detect objects in images, and save pictures of them",
        "data/samples/000001.png --pictures found/ --json found.json",
        WEIGHTS_HELP,
        "Files that cannot be read are passed over; the exit code is then 1.",
    )
    command.add_argument(
        "images", type=Path, nargs="+", metavar="IMAGE", help="image files, or folders of them"
    )
    add_model(command)
    command.add_argument(
        "--threshold",
        type=float,
        help="least score shown, from 0 to 1 (default: the model's own, which evaluate "
        "--keep-threshold and train store, or 0.5)",
    )
    command.add_argument(
        "--pictures",
        "--output",
        type=Path,
        metavar="FOLDER",
        help="save pictures here (default: found, unless there is --json)",
    )
    command.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write what is found as COCO results; the id of an image is the number that its file "
        "is named after, if all are, or else its name",
    )
    add_batch_size(command)
    command.add_argument(
        "--top-k",
        type=int,
        metavar="N",
        help=f"detections of an image (default: {TOP_K}, or with --tiles {TOP_K} of each tile)",
    )
    command.add_argument(
        "--nms",
        type=float,
        metavar="OVERLAP",
        help="of two boxes of a class that overlap more (IoU), show the better one only "
        "(default: show all; a DETR rarely needs this)",
    )
    command.add_argument(
        "--tiles",
        type=int,
        metavar="SIDE",
        help="look at large images in pieces of SIDE x SIDE pixels, which overlap by a quarter: "
        "small objects keep their size, and memory is bounded. Of an object that several tiles "
        "show one box stays, with --nms or without",
    )
    add_views(command)
    add_precision(command)
    add_device(command)


def run(args: argparse.Namespace) -> int:
    """Print what is found, and save pictures and COCO results of it; also of what there is when it
    ends early. The exit code is 1 where a file was passed over."""
    from tqdm import tqdm

    from deformable_detr.cli.beforehand import choose_device, refuse_targets
    from deformable_detr.files import require_folder
    from deformable_detr.inference.detector import load_detector
    from deformable_detr.inference.predict import predict_each
    from deformable_detr.inference.sources import find_sources
    from deformable_detr.interrupts import end_by_exception

    pictures = args.pictures or (None if args.json else Path("found"))
    paths = list(dict.fromkeys(source.path for source in find_sources(args.images)))
    targets = picture_files(paths, pictures) if pictures else {}
    refuse_targets(args.json)
    if pictures:
        require_folder(pictures)
    device = choose_device(args.device)
    detector = load_detector(args.model).in_precision(args.precision, device)
    results, names, seen, passed_over = [], [], 0, []

    def pass_over(line: str) -> None:
        passed_over.append(line)
        tqdm.write(f"passed over: {line}", sys.stderr)

    end_by_exception()  # what was found before Ctrl-C is written
    try:
        for found in predict_each(
            detector,
            paths,
            args.threshold,
            args.batch_size,
            device,
            top_k=args.top_k,
            views=choose_views(args, detector),
            merge=args.merge or "fusion",
            nms=args.nms,
            tiles=args.tiles,
            on_skip=pass_over,
            on_note=lambda line: tqdm.write(f"note: {line}", sys.stderr),
            progress=len(paths) >= 5,
            skip_named=True,
        ):
            results += found.to_coco()
            names += found.names
            seen += 1
            tqdm.write(describe(found, targets.get(found.path)))
    finally:
        if args.json and (seen or passed_over):  # what was there stays where nothing was done
            write_results(results, args.json)
    if seen > 1:
        print(f"{seen} images: {counts_of(names)}")
    return 1 if passed_over else 0


def write_results(results: list[dict], path: Path) -> None:
    """--json."""
    from deformable_detr.data.names import counted
    from deformable_detr.files import write_atomically

    text = json.dumps(results) + "\n"
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, "utf-8"))
    print(f"{counted(len(results), 'detection')}: {path}")


def describe(found: "Prediction", saved: Path | None) -> str:
    """One line on an image: how many objects of which class, and how sure they are. Its picture is
    saved, if there is a path for it."""
    from deformable_detr.data.names import printable

    if saved:
        saved.parent.mkdir(parents=True, exist_ok=True)
        found.draw().save(saved)
    picture = f", picture in {printable(saved)}" if saved else ""
    scores = f"best score {found.highest:.2f}"
    if not len(found):
        scores = f"the best score, {found.highest:.3f}, is below the threshold"
    return f"{printable(found.path)}: {counts_of(found.names)}; {scores}{picture}"


def counts_of(names: Iterable[str]) -> str:
    """How many objects were found, and how many of each class, the most frequent first."""
    from deformable_detr.data.names import printable

    counts = Counter(names)
    of_class = ", ".join(f"{count} {printable(name)}" for name, count in counts.most_common())
    return f"{counts.total()} found{': ' * bool(counts)}{of_class}"


def picture_files(paths: list[Path], folder: Path) -> dict[Path, Path]:
    """Where the picture of each image is saved: under its stem, or where two have one, under names
    that tell all apart. ValueError where one would be saved over an image."""
    from deformable_detr.inference.sources import distinct_names

    names = {path: path.stem for path in paths}
    if len(set(names.values())) < len(names):
        whole = distinct_names(paths)
        names = {path: name.strip("/").replace("/", "_") for path, name in whole.items()}
    if len(set(names.values())) < len(names):  # of a/b_c.png and a_b/c.png
        names = {path: f"{i}_{path.name}" for i, path in enumerate(paths)}
    images = {path.resolve(): path for path in paths}
    files = {path: folder / f"{name}.png" for path, name in names.items()}
    for file in files.values():
        if image := images.get(file.resolve()):
            raise ValueError(f"a picture would replace {image}: give another --pictures")
    return files
