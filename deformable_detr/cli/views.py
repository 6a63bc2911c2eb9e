"""Test-time augmentation, for the commands that detect."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deformable_detr.inference.detector import Detector
    from deformable_detr.inference.views import View

SCALES = (0.8, 1.0, 1.25)


def add_views(command: argparse.ArgumentParser) -> None:
    """--tta and what belongs to it."""
    views = command.add_argument_group("test-time augmentation: slower, and often better")
    views.add_argument(
        "--tta",
        action="store_true",
        help="look at each image in several sizes, and mirrored if the training did so",
    )
    scales = " ".join(f"{scale:g}" for scale in SCALES)
    views.add_argument(
        "--tta-scales", type=float, nargs="+", help=f"needs --tta; default: {scales}"
    )
    views.add_argument(
        "--merge",
        metavar="NAME",
        help="of what the views show: fusion (weighted boxes fusion, the default) or nms "
        "(non-maximum suppression)",
    )


def choose_views(args: argparse.Namespace, detector: "Detector") -> "list[View] | None":
    """For --tta. What was trained without mirroring, as digits are, is not mirrored."""
    from deformable_detr.data.preparation import PREPARATIONS
    from deformable_detr.inference.views import make_views

    if not args.tta:
        for option in ("tta_scales", "merge"):
            if getattr(args, option):
                raise ValueError(f"--{option.replace('_', '-')} needs --tta")
        return None
    return make_views(
        detector.transforms,
        tuple(args.tta_scales or SCALES),
        flip=PREPARATIONS[detector.transforms].mirrors,
        short_side=detector.short_side,
    )
