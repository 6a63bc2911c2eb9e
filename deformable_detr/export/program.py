"""A detector as a program of torch.export, for AOTInductor, for torch.export.save, and for ONNX."""

import copy

import torch
from torch import Tensor, nn
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
    graph: nn.Module, size: tuple[int, int] = (480, 640), dynamic: bool = True
) -> ExportedProgram:
    """The program of a `DetectorGraph`; it calls the operator by its name.

    size: (height, width) of the images. dynamic: any batch and any size will do; else one image of
    this size. Raises ValueError, in one line, where the model cannot be exported so.
    """
    if min(size) < 1:
        raise ValueError(f"size must be (height, width) of at least 1, got {tuple(size)}")
    shapes = {name: dict.fromkeys(axes, Dim.DYNAMIC) for name, axes in DYNAMIC.items()}
    try:
        return torch.export.export(
            graph,
            example(2 if dynamic else 1, *size),
            dynamic_shapes=shapes if dynamic else None,
        )
    except Exception as error:
        raise ValueError(f"torch.export does not take this model: {first_line(error)}") from error


def example(batch: int, height: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Arguments of a `DetectorGraph`: noise, the first image of full size, the others smaller."""
    images = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))
    sizes = torch.tensor([(height, width)] * batch)
    return images, sizes - sizes // 8 * torch.arange(batch).unsqueeze(1)
