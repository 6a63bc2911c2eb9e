"""What does attention cost? Multiply-adds, bytes moved and bytes held, from 64 to 20,000 tokens.

    python experiments/cost.py     # about a minute

Appendix A.1 of "Deformable DETR", counted by an instrument beside the paper's formulas, on tensors
without data: no time is measured here.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from study import Study, row
from study import main as run
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from deformable_detr.evaluation.complexity import PER_SAMPLE, LiveTensors
from deformable_detr.layers.attention import MSDeformAttn
from deformable_detr.layers.dense_attention import DenseAttention
from deformable_detr.layers.window_attention import WindowAttention

C, M, WINDOW, K = 256, 8, 8, 4
SIDES = (8, 16, 32, 64, 104, 144)  # of the finest map: 64 to 20,736 tokens
QUERIES = 300


@dataclass(frozen=True)
class Attention:
    """One attention layer of width 256. queries: None, the tokens ask themselves. levels: of
    deformable attention, a square map and smaller ones, each of half the side."""

    kind: str
    queries: int | None = None
    levels: int = 1

    def build(self, shapes: list[tuple[int, int]], S: int, Q: int) -> tuple[nn.Module, tuple]:
        """The layer, and what it is called with."""
        query, tokens = torch.empty(1, Q, C), torch.empty(1, S, C)
        if self.kind == "dense":
            return DenseAttention(C, M), (query, tokens, tokens)
        if self.kind == "windowed":
            return WindowAttention(C, M, WINDOW), (torch.empty(1, *shapes[0], C),)
        layer = MSDeformAttn(C, self.levels, M, K)
        return layer, (query, torch.empty(1, Q, 1, 2), tokens, shapes)

    def formula(self, S: int, Q: int) -> int:
        """Multiply-adds by A.1: projections, and what each query does with its keys."""
        if self.kind == "dense":
            return 2 * Q * C * C + 2 * S * C * C + 2 * Q * S * C
        if self.kind == "windowed":
            return 4 * S * C * C + 2 * S * WINDOW**2 * C
        points = M * self.levels * K
        return Q * C * C + S * C * C + Q * points * 3 * C + PER_SAMPLE * Q * self.levels * K * C


class Traffic(TorchDispatchMode):
    """While open, adds up the bytes that every operator reads and writes; views move none."""

    moved = 0

    def __torch_dispatch__(
        self, function: object, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        """Run an operator and count."""
        result = function(*args, **(kwargs or {}))
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        written = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        storages = {id(x.untyped_storage()) for x in read}
        if any(id(x.untyped_storage()) not in storages for x in written):
            self.moved += sum(x.numel() * x.element_size() for x in read + written)
        return result


@torch.no_grad()
def measure(attention: Attention, seed: int, folder: Path) -> list[dict]:
    """The rows of one layer, by the number of tokens."""
    rows = []
    for side in SIDES:
        shapes = [(side >> level,) * 2 for level in range(attention.levels)]
        S = sum(height * width for height, width in shapes)
        Q = attention.queries or S
        values = count(*attention.build(shapes, S, Q)) | {"formula": attention.formula(S, Q)}
        if attention.kind == "deformable":
            samples, rest = Q * attention.levels * K, values["formula"] - S * C * C
            # project what was sampled instead of all tokens, as A.1 reckons
            values["formula_sampled_first"] = rest + samples * C * C
            # or the weighted sums: linear, too, but each head then samples all channels, not C / M
            summed = Q * C * C + PER_SAMPLE * samples * (M - 1) * C
            values["formula_summed_first"] = rest + summed
        rows += [row("count", S, name, value) for name, value in values.items()]
    return rows


def count(layer: nn.Module, arguments: tuple) -> dict[str, int]:
    """What one call of a layer costs."""
    with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            layer(*arguments)
        with Traffic() as traffic:
            layer(*arguments)
        with LiveTensors([*layer.parameters(), *arguments[:3:2]]) as live:
            layer(*arguments)
    return {
        "multiply_adds": counter.get_total_flops() // 2,
        "bytes_moved": traffic.moved,
        "peak_bytes": live.peak,
    }


STUDY = Study(
    name="cost",
    question="multiply-adds, bytes moved and bytes held of one attention layer, at so many tokens",
    configurations={
        "dense, encoder": Attention("dense"),
        "windowed, encoder": Attention("windowed"),
        "deformable, encoder": Attention("deformable"),
        "deformable of 4 levels, encoder": Attention("deformable", levels=4),
        "dense, decoder": Attention("dense", QUERIES),
        "deformable, decoder": Attention("deformable", QUERIES),
        "deformable of 4 levels, decoder": Attention("deformable", QUERIES, 4),
    },
    seeds=(0,),
    trial=measure,
    usual=8,
)


def main() -> None:
    """The command."""
    run(("cost",))


if __name__ == "__main__":
    main()
