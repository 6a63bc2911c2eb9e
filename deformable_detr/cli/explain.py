"""deformable-detr explain"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from deformable_detr.cli.arguments import (
    WEIGHTS_HELP,
    add_command,
    add_device,
    add_model,
    add_precision,
)

if TYPE_CHECKING:
    from deformable_detr.look.asking import Look
    from deformable_detr.look.explanation import Explanation

KINDS = (".html", ".png")
SHOWN = 3  # detections, where none is named


def add(commands: argparse.Action) -> None:
    """Its arguments."""
    command = add_command(
        commands,
        "explain",
        run,
        "show what a detector looked at: sampling points and gradients, on one page",
        "data/samples/000012.png --output explained.html",
        WEIGHTS_HELP,
        "Layers, heads and levels are counted from 0; -1 is the last one.",
    )
    command.add_argument("image", type=Path, metavar="IMAGE", help="an image file")
    add_model(command)
    command.add_argument(
        "--output",
        type=Path,
        default=Path("explained.html"),
        metavar="FILE",
        help="a page, .html, or a picture, .png (default: %(default)s)",
    )
    what = command.add_mutually_exclusive_group()
    what.add_argument(
        "--detection",
        type=int,
        nargs="+",
        metavar="N",
        help=f"which, counted from 0, best first (default: the {SHOWN} best)",
    )
    what.add_argument("--query", type=int, metavar="N", help="a query of the decoder instead")
    what.add_argument(
        "--token",
        type=float,
        nargs=2,
        metavar=("X", "Y"),
        help="instead, the encoder's token whose cell holds this point, in pixels",
    )
    command.add_argument(
        "--token-level", type=int, default=0, metavar="N", help="its level (default: %(default)s)"
    )
    command.add_argument("--layer", type=int, metavar="N", help="only this layer (default: all)")
    command.add_argument("--head", type=int, metavar="N", help="only this head (default: all)")
    command.add_argument("--level", type=int, metavar="N", help="only this level (default: all)")
    command.add_argument(
        "--noise",
        type=float,
        default=0.0,
        metavar="X",
        help="gradients as means over noisy copies: smoother pictures, 16 times as slow. Of how "
        "many standard deviations of colour, such as 0.2 (default: none)",
    )
    command.add_argument(
        "--threshold", type=float, help="least score, from 0 to 1 (default: the model's own)"
    )
    add_precision(command)
    add_device(command)


def run(args: argparse.Namespace) -> int:
    """Write the page or the picture."""
    from deformable_detr.cli.beforehand import choose_device, refuse_targets
    from deformable_detr.data.names import printable
    from deformable_detr.files import write_atomically
    from deformable_detr.inference.detector import load_detector
    from deformable_detr.look import page
    from deformable_detr.look.asking import Look

    if args.output.suffix.lower() not in KINDS:
        raise ValueError(f"--output must end in {' or '.join(KINDS)}, got {args.output}")
    refuse_targets(args.output)
    device = choose_device(args.device)
    detector = load_detector(args.model).in_precision(args.precision, device)
    look = Look(detector, args.image, args.threshold, gradients=args.token is None)
    found, tokens = choose(args, look)
    which = {"layer": args.layer, "head": args.head, "level": args.level}
    if args.output.suffix.lower() == ".html":
        content = page.page(f"{args.image}, seen by {detector}", found, tokens, which)
        content = content.encode("utf-8", "backslashreplace")
    else:
        content = page.png(page.picture([*found.values()] or tokens, which)).getvalue()
    write_atomically(args.output, lambda temporary: Path(temporary).write_bytes(content))
    for name, seen in found.items():
        print(f"{name}: {printable(seen.title)}")
    print(f"explained in {printable(args.output)}")
    return 0


def choose(
    args: argparse.Namespace, look: "Look"
) -> "tuple[dict[str, Explanation], list[Explanation | None]]":
    """What was asked for, by name: detections or a query; and tokens of the encoder."""
    if args.token:
        return {}, [look.at_token(tuple(args.token), args.token_level)]
    if args.query is not None:
        found = {f"query {args.query}": look.at_query(args.query, args.noise)}
    else:
        numbers = args.detection or range(min(SHOWN, len(look)) or 1)
        found = {f"detection {n}": look.at_detection(n, args.noise) for n in numbers}
    return found, [look.at_middle_of(seen, args.token_level) for seen in found.values()]
