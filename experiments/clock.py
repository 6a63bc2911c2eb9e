"""What attention takes by the clock: seconds of one core and bytes held, at 64 to 20,000 tokens.

    python experiments/clock.py     # about 6 minutes

What `cost.py` counts on tensors without data, this runs, on one core. A time is the least of some
runs, in seconds of the core; seeds repeat it in a process of its own.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from cost import SIDES, WINDOW, C, K, M
from study import Study, row
from study import main as run
from torch import Tensor, nn

from deformable_detr import use_backend
from deformable_detr.evaluation.complexity import LiveTensors
from deformable_detr.layers.attention import MSDeformAttn
from deformable_detr.layers.dense_attention import DenseAttention
from deformable_detr.layers.window_attention import WindowAttention
from deformable_detr.models.encoder import Encoder, EncoderLayer
from deformable_detr.models.tokens import token_centres
from deformable_detr.structures import Queries, Tokens

FFN, LAYERS = 1024, 6
RUNS, ENOUGH = (
    5,
    1.0,
)  # runs of which the least counts; fewer where these took so many seconds


class Windowed(WindowAttention):
    """Windows of one map, as an encoder's layer calls them."""

    def attend(self, queries: Queries, memory: Tokens) -> Tensor:
        """(B, S, C)."""
        return self(queries.content.unflatten(1, memory.spatial_shapes[0])).flatten(1, 2)


class Kept(DenseAttention):
    """Dense attention that holds its weights, one matrix per head, and returns their mean too."""

    def attend(self, queries: Queries, memory: Tokens) -> Tensor:
        """(B, S, C)."""
        located = queries.content + queries.position
        return self(located, located, memory.features)[0]


@dataclass(frozen=True)
class Clocked:
    """An attention layer of width 256 among tokens, or an encoder of several layers of it.

    levels: a square map, and smaller ones of half the side. layers: 0 is the attention alone.
    largest: the largest side of the finest map that is tried.
    """

    kind: str
    levels: int = 1
    layers: int = 0
    backend: str = "cpu"
    largest: int = SIDES[-1]

    def attention(self) -> nn.Module:
        """Untrained, but the points of deformable attention depend on the query."""
        if self.kind == "deformable":
            layer = MSDeformAttn(C, self.levels, M, K)
            nn.init.normal_(layer.sampling_offsets.weight, std=0.05)
            nn.init.normal_(layer.attention_weights.weight, std=0.05)
            return layer
        if self.kind == "windowed":
            return Windowed(C, M, WINDOW)
        return (DenseAttention if self.kind == "dense" else Kept)(C, M)

    def call(self, side: int) -> tuple[Callable[[], object], int]:
        """What is timed, and the number of its tokens."""
        shapes = [(side >> level,) * 2 for level in range(self.levels)]
        S = sum(height * width for height, width in shapes)
        no_padding, whole = torch.zeros(1, S, dtype=torch.bool), torch.ones(1, self.levels, 2)
        features = torch.randn(1, S, C)
        tokens = Tokens(features, torch.randn(1, S, C), no_padding, shapes, whole)
        if self.layers:
            layers = [EncoderLayer(self.attention(), C, FFN, 0.0) for _ in range(self.layers)]
            encoder = Encoder(layers).eval()
            return (lambda: encoder(tokens)), S
        attention = self.attention().eval()
        queries = Queries(features, tokens.position, token_centres(shapes, whole))
        return (lambda: attention.attend(queries, tokens)), S


@torch.no_grad()
def measure(clocked: Clocked, seed: int, folder: Path) -> list[dict]:
    """The rows of one configuration, by the number of tokens."""
    torch.manual_seed(seed)
    rows = []
    with use_backend(clocked.backend):
        for side in (side for side in SIDES if side <= clocked.largest):
            call, S = clocked.call(side)
            with LiveTensors([]) as live:  # and warms up
                call()
            rows.append(row("clock", S, "milliseconds", 1e3 * least(call)))
            rows.append(row("clock", S, "peak_bytes", live.peak))
    return rows


def least(call: Callable[[], object]) -> float:
    """Seconds of this process, of the run that took fewest."""
    times = []
    while len(times) < RUNS and sum(times) < ENOUGH:
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


STUDY = Study(
    name="clock",
    question="milliseconds of one core, and bytes held at once, of one attention layer or "
    "an encoder of six, at so many tokens",
    configurations={
        "dense": Clocked("dense"),
        "dense, weights kept": Clocked("kept", largest=64),
        "windowed": Clocked("windowed"),
        "deformable": Clocked("deformable"),
        "deformable of 4 levels": Clocked("deformable", levels=4),
        "deformable, plain PyTorch": Clocked("deformable", backend="reference"),
        "dense, encoder": Clocked("dense", layers=LAYERS, largest=104),
        "windowed, encoder": Clocked("windowed", layers=LAYERS, largest=104),
        "deformable, encoder": Clocked("deformable", layers=LAYERS, largest=104),
        "deformable of 4 levels, encoder": Clocked("deformable", 4, LAYERS, largest=104),
    },
    seeds=(0, 1, 2),
    trial=measure,
    usual=10,
    seconds={"dense": 20, "dense, encoder": 30},
)


def main() -> None:
    """The command."""
    run(("clock",))


if __name__ == "__main__":
    main()
