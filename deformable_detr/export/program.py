"""A detector as a program of torch.export, for AOTInductor, for torch.export.save, and for ONNX."""

import copy

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from deformable_detr.export.graph import DetectorGraph
from deformable_detr.files import first_line
from deformable_detr.models import BaseDetector

DYNAMIC = {"images": {0: "batch", 2: "height", 3: "width"}, "sizes": {0: "batch"}}


def make_graph(model: BaseDetector, top_k: int | None = None) -> DetectorGraph:
    """The detector as a function, on the CPU, in float32 and for evaluation; the model stays as it
    is."""
    graph = DetectorGraph(copy.deepcopy(model), top_k)
    return graph.cpu().float().eval().requires_grad_(False)


def to_program(
    graph: DetectorGraph, size: tuple[int, int] = (480, 640), dynamic: bool = True
) -> ExportedProgram:
    """The program of a detector; it calls the operator by its name.

    size: (height, width) of the images. dynamic: any batch and any size will do; else one image of
    this size. Raises ValueError, in one line, where the model cannot be exported so.
    """
    if min(size) < 1:
        raise ValueError(f"size must be (height, width) of at least 1, got {tuple(size)}")
    inputs = example(2 if dynamic else 1, *size)
    if dynamic:
        _refuse_single_rows(graph, inputs)
    shapes = {name: dict.fromkeys(axes, Dim.DYNAMIC) for name, axes in DYNAMIC.items()}
    try:
        return torch.export.export(graph, inputs, dynamic_shapes=shapes if dynamic else None)
    except Exception as error:
        what = "this model for any size" if dynamic else "this model"
        raise ValueError(f"torch.export does not take {what}: {first_line(error)}") from error


def _refuse_single_rows(graph: DetectorGraph, inputs: tuple[Tensor, Tensor]) -> None:
    """ValueError where a map has one row or one column: torch.export would take that for a rule."""
    with torch.no_grad():
        shapes = graph.model.tokens(graph.batch(*inputs)).spatial_shapes
    if any(1 in shape for shape in shapes):
        height, width = inputs[0].shape[2:]
        raise ValueError(
            f"a program for any size cannot start from {height} x {width}, of which the coarsest "
            f"map is {min(shapes)}: give a larger size, or have it fixed"
        )


def example(batch: int, height: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Arguments of a `DetectorGraph`: noise, the first image of full size, the others smaller."""
    images = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))
    sizes = torch.tensor([(height, width)] * batch)
    return images, sizes - sizes // 8 * torch.arange(batch).unsqueeze(1)
