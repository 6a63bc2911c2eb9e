"""The CPU's kernel against the pure-PyTorch forms on random inputs, for as long as one likes:

    python -m tests.fuzz --seconds 600

A few seconds of it are part of the suite. A failure prints the case; check(Case(...)) repeats it.
"""

import argparse
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deformable_detr.ops import cpu, ms_deform_attn, reference

# (dtype of the kernel, D, L, K): a library each, so few; odd, one, vectors of several widths
SPECIFICATIONS = (
    (torch.float32, 1, 1, 1),
    (torch.float32, 4, 3, 2),
    (torch.float32, 7, 2, 3),
    (torch.float32, 32, 4, 4),
    (torch.float64, 6, 2, 3),
    (torch.float64, 33, 1, 2),
)
NOWHERE = (math.nan, math.inf, -math.inf, 1e30, -1e30, 3.4e38, -3.4e38, 50.0, -50.0)


@dataclass(frozen=True)
class Case:
    """Everything that decides the inputs. hostile: the share of points at no place; edges: of
    points exactly on a pixel's centre or a map's border; half: value's dtype if not the kernel's.
    """

    specification: tuple[torch.dtype, int, int, int]
    B: int
    Q: int
    M: int
    shapes: tuple[tuple[int, int], ...]
    seed: int
    hostile: float = 0.1
    edges: float = 0.1
    strided: bool = False
    half: torch.dtype | None = None
    threads: int = 1


def random_case(rng: random.Random) -> Case:
    """One case; small sizes are likelier, all are small enough for some hundred cases a second."""
    specification = rng.choice(SPECIFICATIONS)
    dtype, _, L, _ = specification
    size = lambda limit: min(rng.randint(1, limit), rng.randint(1, limit))  # noqa: E731
    return Case(
        specification,
        B=rng.choice((0, 1, 1, 2, 3)),
        Q=rng.choice((0, 1, 2, 5, 20, 60)),
        M=size(4),
        shapes=tuple((size(12), size(12)) for _ in range(L)),
        seed=rng.randrange(2**31),
        hostile=rng.choice((0, 0.1, 1)),
        edges=rng.choice((0, 0.2)),
        strided=rng.random() < 0.3,
        half=rng.choice((None, torch.float16, torch.bfloat16)) if dtype == torch.float32 else None,
        threads=rng.choice((1, 2, 3)),
    )


def make(case: Case) -> tuple[list[Tensor], Tensor, Tensor]:
    """Value, locations and weights; grad_output; and which points have no slope: those on edges.

    Other points keep a twentieth of a pixel from where the slope jumps, so that rounding does not
    decide which slope is right.
    """
    generator = torch.Generator().manual_seed(case.seed)
    dtype, D, L, K = case.specification
    S = sum(height * width for height, width in case.shapes)
    rand = lambda *size: torch.rand(*size, generator=generator, dtype=dtype)  # noqa: E731
    value = (2 * rand(case.B, S, case.M, D) - 1).to(case.half or dtype)
    size = (case.B, case.Q, case.M, L, K)
    sizes = torch.tensor(case.shapes, dtype=dtype).flip(-1).reshape(L, 1, 2)  # (W, H)
    pixels = ((sizes + 3) * rand(*size, 2)).floor() - 2
    edge = rand(*size) < case.edges
    pixels += torch.where(edge, 0.0, 0.05 + 0.9 * rand(*size)).unsqueeze(-1)
    locations = (pixels + 0.5) / sizes
    nowhere = torch.tensor(NOWHERE, dtype=dtype)
    chosen = nowhere[torch.randint(len(NOWHERE), (*size, 2), generator=generator)]
    locations = torch.where(rand(*size, 2) < case.hostile, chosen, locations)
    weights = 2 * rand(*size) - 1
    grad_output = (2 * rand(case.B, case.Q, case.M * D) - 1).to(value.dtype)
    inputs = [value, locations, weights]
    if case.strided:
        inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
        grad_output = grad_output.mT.contiguous().mT
    return inputs, grad_output, edge


def run(function: Callable, inputs: list[Tensor], grad_output: Tensor) -> list[Tensor]:
    """The output of function(value, locations, weights) and its gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output)]


def check(case: Case, backends: tuple[str, ...] = ("cpu", "gather"), device: str = "cpu") -> None:
    """Backends against `reference` in float64; AssertionError naming the case and the tensor.

    Allowed: 32 roundings of the result's dtype, in units of the largest number expected.
    """
    inputs, grad_output, edge = make(case)
    exact = run(
        lambda *x: reference.ms_deform_attn(x[0], list(case.shapes), *x[1:]),
        [x.double() for x in inputs],
        grad_output.double(),
    )
    inputs, grad_output = [x.to(device) for x in inputs], grad_output.to(device)
    before, small = torch.get_num_threads(), cpu.SMALL
    torch.set_num_threads(case.threads)
    cpu.SMALL = 0  # so that small cases run in several threads, too
    try:
        for name in backends:
            function = lambda v, p, w, name=name: ms_deform_attn(v, case.shapes, p, w, name)  # noqa: E731
            given = [x.cpu() for x in run(function, inputs, grad_output)]
            _compare(name, case, given, exact, edge)
    finally:
        cpu.SMALL = small
        torch.set_num_threads(before)


def _compare(name: str, case: Case, given: list, exact: list, edge: Tensor) -> None:
    names = "output", "grad_value", "grad_locations", "grad_weights"
    for what, x, expected in zip(names, given, exact, strict=True):
        assert x.shape == expected.shape and x.isfinite().all(), f"{name}, {what}: {case}"
        difference = (x.double() - expected).abs()
        if what == "grad_locations":
            difference[edge] = 0
        if difference.numel():
            unit = max(1.0, expected.abs().max().item()) * torch.finfo(x.dtype).eps
            worst = difference.max().item() / unit
            assert worst < 32, f"{name}, {what}: off by {worst:.0f} roundings: {case}"


def fuzz(seconds: float, seed: int) -> int:
    """Checks random cases for so long; returns how many."""
    rng, end, count = random.Random(seed), time.monotonic() + seconds, 0
    while time.monotonic() < end:
        check(random_case(rng))
        count += 1
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    print(f"{fuzz(options.seconds, options.seed)} cases, none wrong")


if __name__ == "__main__":
    main()
