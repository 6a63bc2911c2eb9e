"""Whether an ONNX file says what PyTorch says: not where it was traced alone, but elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deformable_detr.export.graph import INPUTS, DetectorGraph, best
from deformable_detr.export.program import example
from deformable_detr.files import first_line

TOLERANCE = 1e-3  # of logits, and of boxes relative to the image; rounding alone is 1e-6 to 1e-4
ATTEMPTS = 3


@dataclass(frozen=True)
class Check:
    """What came of one run of so many images of a size: the largest difference from PyTorch."""

    batch: int
    height: int
    width: int
    difference: float

    def __str__(self) -> str:
        images = f"{self.batch} of {self.height} x {self.width}"
        return f"{images}: PyTorch and onnxruntime are {self.difference:.1g} apart"


def check_file(
    path: Path | str, graph: DetectorGraph, size: tuple[int, int], dynamic: bool
) -> list[Check]:
    """Run a file at the size at which it was traced and, if it is dynamic, at others."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    height, width = size
    runs = [(1, height, width)]
    if dynamic:
        runs += [(2, height * 3 // 4 + 1, width * 9 // 8), (3, height * 9 // 8, width * 3 // 4 + 1)]
    return [Check(*run, _difference(session, graph, run)) for run in runs]


def _difference(session: object, graph: DetectorGraph, run: tuple[int, int, int]) -> float:
    """The smallest of some attempts: where the queries are chosen among tokens, two of which are as
    good as equal, PyTorch and onnxruntime may each choose the other."""
    found = float("inf")
    for seed in range(ATTEMPTS):
        images, sizes = example(*run, seed=seed)
        given = _outputs(session, graph, images, sizes)
        with torch.no_grad():
            expected = graph(images, sizes)
        found = min(found, difference(expected[:2], given[:2]))
        if graph.top_k:
            # of what the file itself says of its queries: others may have another order
            detections = best(*given[:2], sizes, graph.model.scoring, graph.top_k)
            found = max(found, difference(detections, given[2:]))
        if found <= TOLERANCE:
            break
    return found


def _outputs(session: object, graph: DetectorGraph, images: Tensor, sizes: Tensor) -> list[Tensor]:
    feed = dict(zip(INPUTS, (images.numpy(), sizes.numpy()), strict=True))
    try:
        return [torch.from_numpy(x) for x in session.run(list(graph.outputs), feed)]
    except Exception as error:  # onnxruntime's own
        batch, _, height, width = images.shape
        where = f"{batch} of {height} x {width}"
        raise ValueError(
            f"onnxruntime cannot run the file on {where}: {first_line(error)}"
        ) from None


def difference(expected: Sequence[Tensor], given: Sequence[Tensor]) -> float:
    """How far rows, of queries or detections, are from the nearest of the others, in any order.

    expected, given: tensors (B, N) or (B, N, n), of the same shapes. NaN where there is one.
    """
    if [x.shape for x in expected] != [x.shape for x in given]:
        return float("inf")
    rows, others = (
        torch.cat([x.float().reshape(*x.shape[:2], -1) for x in each], -1)  # (B, N, n)
        for each in (expected, given)
    )
    each = [_farthest(*pair) for pair in zip((*rows, *others), (*others, *rows), strict=True)]
    return torch.stack(each).max().item()


def _farthest(rows: Tensor, others: Tensor) -> Tensor:
    """Of these rows, (N, n), the largest distance to the nearest of the others."""
    return torch.stack([(others - row).abs().amax(-1).min() for row in rows]).max()
