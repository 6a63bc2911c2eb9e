"""deformable-detr export"""

import argparse
import sys
import time
from pathlib import Path

from deformable_detr.cli.arguments import WEIGHTS_HELP, add_command

FILE_HELP = """\
The file takes images, (B, 3, H, W) float32, RGB from 0 to 1, and sizes, (B, 2) int64, the height
and width of each without what pads it. It gives logits, (B, Q, classes), and boxes, (B, Q, 4), of
all queries; with --top-k also scores, labels and pixel_boxes of the best. What else is known, such
as the classes' names, is in its metadata. It is put in place after onnxruntime, at other sizes too,
has said what PyTorch says. Needs the extra: pip install 'deformable-detr[export]'."""


def add(commands: argparse.Action) -> None:
    """Its arguments."""
    command = add_command(
        commands,
        "export",
        run,
        "write a detector as an ONNX file",
        "runs/mine/best.safetensors --output model.onnx --top-k 100",
        WEIGHTS_HELP.replace("WEIGHTS is", "MODEL is"),
        FILE_HELP,
    )
    command.add_argument("model", metavar="MODEL", help="the trained detector")
    command.add_argument("--output", type=Path, required=True, metavar="FILE", help="to be written")
    command.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=(480, 640),
        metavar=("HEIGHT", "WIDTH"),
        help="of the images, in pixels, with which it is written and compared (default: 480 640)",
    )
    command.add_argument(
        "--fixed", action="store_true", help="for one image of this size, rather than for any"
    )
    command.add_argument(
        "--top-k", type=int, metavar="N", help="also give the N best detections of each image"
    )


def print_step(line: str) -> None:
    """What is being done now, and since when: minutes pass."""
    print(f"{time.strftime('%H:%M:%S')}  {line}", file=sys.stderr, flush=True)


def run(args: argparse.Namespace) -> int:
    """Write the file, and print how far it is from PyTorch."""
    from deformable_detr.cli.beforehand import refuse_targets
    from deformable_detr.export.onnx import to_onnx
    from deformable_detr.inference.detector import load_detector

    refuse_targets(args.output)
    detector = load_detector(args.model)
    options = {"dynamic": not args.fixed, "top_k": args.top_k, "on_step": print_step}
    try:
        checks = to_onnx(detector, args.output, tuple(args.size), **options)
    except ImportError as error:
        raise ValueError(str(error)) from None
    for check in checks:
        print(check)
    print(f"written: {args.output}")
    return 0
