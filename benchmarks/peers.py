"""Who takes part in the operator's benchmark, on which inputs."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from deformable_detr import ms_deform_attn

M, D, L, K = 8, 32, 4, 4
OURS, OFFICIAL, HUGGING_FACE = "ours", "official, pure PyTorch", "Hugging Face"
PACKAGE, COMPILED = "torch-ms-deform-attn", "torch.compile of our reference"
MODES = ("forward", "forward + backward")

Operator = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A shape: images, the levels' sizes, and queries, one per token where None."""

    batch: int
    levels: tuple[tuple[int, int], ...]
    queries: int | None
    rounds: int


IMAGE = ((100, 134), (50, 67), (25, 34), (13, 17))  # of 800 x 1066 pixels
CASES = {
    "encoder": Case(1, IMAGE, None, 5),
    "decoder": Case(1, IMAGE, 300, 41),
    "training": Case(4, ((32, 32), (16, 16), (8, 8), (4, 4)), None, 15),
}


def inputs(case: Case, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """value (B, S, M, D), locations (B, Q, M, L, K, 2) and weights (B, Q, M, L, K), as a model has
    them early in training: around each query's centre (the tokens' own, or random ones) the initial
    star of 1 to K pixels (Appendix A.4), and a normal error of one pixel."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(height * width for height, width in case.levels)
    B, Q = case.batch, case.queries or tokens
    if case.queries:
        centres = torch.rand(B, Q, 2, generator=generator)
    else:
        grids = (
            torch.meshgrid(
                (torch.arange(width) + 0.5) / width,
                (torch.arange(height) + 0.5) / height,
                indexing="xy",
            )
            for height, width in case.levels
        )
        centres = torch.cat([torch.stack(grid, -1).flatten(0, 1) for grid in grids])
        centres = centres.expand(B, -1, -1)
    angle = torch.arange(M) * (2 * math.pi / M)
    star = torch.stack([angle.cos(), angle.sin()], -1)
    star = star / star.abs().amax(-1, keepdim=True)  # (M, 2)
    pixels = star[:, None, None] * torch.arange(1, K + 1)[:, None]  # (M, 1, K, 2)
    pixels = pixels + torch.randn(B, Q, M, L, K, 2, generator=generator)
    sizes = torch.tensor([(width, height) for height, width in case.levels])
    locations = centres[:, :, None, None, None] + pixels / sizes[:, None]
    logits = torch.randn(B, Q, M, L * K, generator=generator)
    weights = logits.softmax(-1).view(B, Q, M, L, K)
    value = torch.randn(B, tokens, M, D, generator=generator)
    return value.to(device), locations.to(device), weights.to(device)


def official(levels: tuple, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """The official pure-PyTorch form, as its authors describe it: all levels' samples are stacked,
    multiplied by the weights, and summed."""
    B, _, M, D = value.shape
    Q = locations.shape[1]
    maps = value.split([height * width for height, width in levels], dim=1)
    grids = 2 * locations - 1
    samples = []
    for level, (height, width) in enumerate(levels):
        features = maps[level].flatten(2).transpose(1, 2).reshape(B * M, D, height, width)
        points = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)  # (B*M, Q, K, 2)
        samples.append(F.grid_sample(features, points, align_corners=False))  # (B*M, D, Q, K)
    weights = weights.transpose(1, 2).reshape(B * M, 1, Q, -1)
    output = (torch.stack(samples, -2).flatten(-2) * weights).sum(-1)  # (B*M, D, Q)
    return output.view(B, M * D, Q).transpose(1, 2).contiguous()


def peers(levels: tuple, device: str = "cpu", compiled: bool = False) -> dict[str, Operator]:
    """The operators that can be imported, by name, for value, locations and weights."""
    shapes = torch.tensor(levels, device=device)
    starts = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])

    def ours(value: Tensor, locations: Tensor, weights: Tensor, backend: str = device) -> Tensor:
        return ms_deform_attn(value, levels, locations, weights, backend=backend)

    found: dict[str, Operator] = {OURS: ours, OFFICIAL: partial(official, levels)}
    try:
        from transformers.models.deformable_detr import modeling_deformable_detr
    except ImportError:
        progress(f"{HUGGING_FACE} is left out: pip install transformers")
    else:
        module = modeling_deformable_detr.MultiScaleDeformableAttention()
        found[HUGGING_FACE] = lambda value, locations, weights: module(
            value, shapes, list(levels), starts, locations, weights, 64
        )
    try:
        import torch_ms_deform_attn as package
    except ImportError:
        progress(f"{PACKAGE} is left out: it cannot be imported; this file's start says how")
    else:
        found[PACKAGE] = lambda value, locations, weights: package.ms_deform_attn(
            value, shapes, starts, locations, weights
        )
    if compiled:
        torch.compiler.reset()
        found[COMPILED] = torch.compile(partial(ours, backend="reference"), dynamic=False)
    return found


def progress(line: str) -> None:
    """Progress goes to the screen, not into results."""
    print(line, file=sys.stderr, flush=True)


def call(operator: Operator, tensors: tuple[Tensor, ...], mode: str) -> Callable[[], object]:
    """One run of it, forward alone or with the gradients of all three inputs."""
    value, locations, weights = tensors
    if mode == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return operator(value, locations, weights)

        return forward
    leaves = [x.detach().requires_grad_() for x in tensors]
    grad_output = torch.ones(*locations.shape[:2], M * D, dtype=value.dtype, device=value.device)
    return lambda: torch.autograd.grad(operator(*leaves), leaves, grad_output)
