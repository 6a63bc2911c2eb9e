"""deformable-detr predict"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from deformable_detr.cli.arguments import (
    WEIGHTS_HELP,
    add_batch_size,
    add_command,
    add_device,
    add_model,
    add_top_k,
)
from deformable_detr.cli.views import add_views, choose_views

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
        "--json", type=Path, metavar="FILE", help="write what is found as COCO results"
    )
    add_batch_size(command)
    add_top_k(command)
    command.add_argument(
        "--nms",
        type=float,
        metavar="OVERLAP",
        help="of two boxes of a class that overlap more (IoU), show the better one only "
        "(default: show all; a DETR rarely needs this)",
    )
    add_views(command)
    add_device(command)


def run(args: argparse.Namespace) -> int:
    """Print what is found, and save pictures and COCO results of it; also of what there is when it
    ends early. The exit code is 1 where a file was passed over."""
    from tqdm import tqdm

    from deformable_detr.cli.beforehand import choose_device, refuse_targets
    from deformable_detr.inference.detector import load_detector
    from deformable_detr.inference.predict import predict_each

    pictures = args.pictures or (None if args.json else Path("found"))
    refuse_same_names(args.images, pictures, args.json)
    refuse_targets(args.json)
    detector = load_detector(args.model)
    results, seen, passed_over = [], 0, []

    def pass_over(line: str) -> None:
        passed_over.append(line)
        tqdm.write(f"passed over: {line}", sys.stderr)

    try:
        for found in predict_each(
            detector,
            args.images,
            args.threshold,
            args.batch_size,
            choose_device(args.device),
            top_k=args.top_k,
            views=choose_views(args, detector),
            merge=args.merge or "fusion",
            nms=args.nms,
            on_skip=pass_over,
            progress=len(args.images) >= 5,
            skip_named=True,
        ):
            results += found.to_coco()
            seen += 1
            for line in describe(found, pictures):
                tqdm.write(line)
    finally:
        if args.json and (seen or passed_over):  # what was there stays where nothing was done
            write_results(results, args.json)
    return 1 if passed_over else 0


def write_results(results: list[dict], path: Path) -> None:
    """--json."""
    from deformable_detr.files import write_atomically

    text = json.dumps(results) + "\n"
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, "utf-8"))
    print(f"{len(results)} detections: {path}")


def describe(found: "Prediction", pictures: Path | None) -> Iterator[str]:
    """Lines on one image; its picture is saved."""
    from deformable_detr.data.names import printable

    where = ""
    if pictures:
        pictures.mkdir(parents=True, exist_ok=True)
        saved = pictures / f"{found.path.stem}.png"
        found.draw().save(saved)
        where = f", picture in {printable(saved)}"
    yield f"{printable(found.path)}: {len(found)} found{where}"
    for name, score, box in zip(
        found.names, found.scores.tolist(), found.boxes.tolist(), strict=True
    ):
        corners = "  ".join(f"{axis} {x:6.1f}" for axis, x in zip("xyxy", box, strict=True))
        yield f"  {printable(name):12} {score:.2f}  {corners}"


def refuse_same_names(images: list[Path], pictures: Path | None, results: Path | None) -> None:
    """ValueError where a picture would be saved over another or over an image, or where the results
    would have one id for two images."""
    from deformable_detr.data.images import find_images
    from deformable_detr.inference.prediction import file_id

    paths = [Path(path) for path, _ in find_images(images)]
    for path in paths if pictures else ():
        if (pictures / f"{path.stem}.png").resolve() == path.resolve():
            raise ValueError(f"the picture of {path} would replace it: give another --pictures")
    pictures_of, ids = (f"{path.stem}.png" for path in paths), map(file_id, paths)
    for where, names in ((pictures, pictures_of), (results, ids)):
        name, count = Counter(names).most_common(1)[0]
        if where and count > 1:
            raise ValueError(
                f"{count} images would be {name} in {where}; give them in separate runs"
            )
