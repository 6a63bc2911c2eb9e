"""DAT-T, ours against the authors' form: time of a whole model, time and memory of one layer.

    python benchmarks/dat.py                 # all of it; some minutes
    python benchmarks/dat.py --rounds 5

The authors' form is written here from the paper's formulas as their first code arranges them: maps
with channels first, convolutions of 1 x 1, einsum, grid_sample for the features and for the bias of
all pairs, -100 between what a shift tears apart. Both models have the same weights; one thread, in
pairs. The layer, of the third stage for an image of 800 x 1066, is ours twice: with queries that
take turns, and with all pairs of query and key at once. Writes data/results/dat_cpu.json.
"""

import os
import sys

if __name__ == "__main__":  # this file's folder would hide Python's own module called operator
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import timing
from benchmarks.timing import RESULTS
from deformable_detr.backbones.dat import CONFIGS, DAT, DATConfig
from deformable_detr.evaluation.complexity import LiveTensors
from deformable_detr.files import write_json
from deformable_detr.layers import dat_attention
from deformable_detr.layers.dat_attention import DAttention
from deformable_detr.provenance import provenance
from deformable_detr.weights.dat import to_authors

COMMAND = "python benchmarks/dat.py"
OURS, AT_ONCE, AUTHORS = "ours", "ours, all pairs at once", "the authors' form"
MODES = ("forward", "forward + backward")
STAGE3 = (50, 67)  # of an image of 800 x 1066

State = dict[str, Tensor]


# The authors' form, on their tensors


class AuthorsForm(nn.Module):
    """The authors' v1 model of one image size: logits of images (B, 3, H, W)."""

    def __init__(self, model: DAT) -> None:
        super().__init__()
        self.config: DATConfig = model.config
        state = {name: tensor.detach().clone() for name, tensor in to_authors(model).items()}
        self.learned = nn.ParameterDict(
            {flat(n): nn.Parameter(x) for n, x in state.items() if x.is_floating_point()}
        )
        self.fixed = {n: x for n, x in state.items() if not x.is_floating_point()}
        for name in [n for n in self.learned if n.endswith("attn_mask")]:
            self.fixed[name.replace("/", ".")] = self.learned.pop(name).detach()

    def forward(self, images: Tensor) -> Tensor:
        """(B, classes)."""
        t = {name.replace("/", "."): x for name, x in self.learned.items()} | self.fixed
        x = channel_norm(F.conv2d(images, *pair(t, "patch_proj.0"), 4), t, "patch_proj.1")
        for s, blocks in enumerate(self.config.blocks):
            if s:
                x = F.conv2d(x, t[f"down_projs.{s - 1}.0.weight"], None, 2)
                x = channel_norm(x, t, f"down_projs.{s - 1}.1")
            for d, kind in enumerate(blocks):
                heads, groups = self.config.heads[s], self.config.groups[s]
                name = f"stages.{s}.attns.{d}"
                y = channel_norm(x, t, f"stages.{s}.layer_norms.{2 * d}")
                if kind == "D":
                    x = x + moved_keys(y, t, name, heads, groups)
                else:
                    x = x + windows(y, t, name, heads, self.config.window)
                y = channel_norm(x, t, f"stages.{s}.layer_norms.{2 * d + 1}")
                x = x + feed_forward(y, t, f"stages.{s}.mlps.{d}.chunk")
        x = channel_norm(x, t, "cls_norm").mean((2, 3))
        return F.linear(x, *pair(t, "cls_head"))


def flat(name: str) -> str:
    """A name without dots, which a ParameterDict does not take."""
    return name.replace(".", "/")


def pair(t: State, name: str) -> tuple[Tensor, Tensor]:
    """The weight and the bias of a layer."""
    return t[name + ".weight"], t[name + ".bias"]


def channel_norm(x: Tensor, t: State, name: str) -> Tensor:
    """A layer norm over the channels of (B, C, H, W)."""
    x = x.permute(0, 2, 3, 1)
    return F.layer_norm(x, x.shape[-1:], *pair(t, name + ".norm")).permute(0, 3, 1, 2)


def feed_forward(x: Tensor, t: State, name: str) -> Tensor:
    """Two linear layers on every pixel of (B, C, H, W)."""
    tokens = x.flatten(2).transpose(1, 2)
    tokens = F.gelu(F.linear(tokens, *pair(t, name + ".linear1")))
    return F.linear(tokens, *pair(t, name + ".linear2")).transpose(1, 2).reshape(x.shape)


def windows(x: Tensor, t: State, name: str, heads: int, w: int) -> Tensor:
    """Attention in windows of (B, C, H, W), in shifted ones where there is a mask."""
    B, C, H, W = x.shape
    mask = t.get(name + ".attn_mask")
    shift = 0 if mask is None else -(-w // 2)
    x = x.roll((-shift, -shift), (2, 3)) if shift else x
    tokens = x.reshape(B, C, H // w, w, W // w, w).permute(0, 2, 4, 3, 5, 1).reshape(-1, w * w, C)
    q, k, v = F.linear(tokens, *pair(t, name + ".proj_qkv")).chunk(3, -1)
    q, k, v = (y.reshape(len(y), w * w, heads, -1).transpose(1, 2) for y in (q, k, v))
    scores = torch.einsum("bhmc,bhnc->bhmn", q * q.shape[-1] ** -0.5, k)
    table, index = (t[f"{name}.relative_position_{n}"] for n in ("bias_table", "index"))
    scores = scores + table[index.flatten()].view(w * w, w * w, heads).permute(2, 0, 1)
    if shift:
        scores = (scores.unflatten(0, (B, -1)) + mask[:, None]).flatten(0, 1)
    tokens = torch.einsum("bhmn,bhnc->bhmc", scores.softmax(-1), v)
    tokens = F.linear(tokens.transpose(1, 2).flatten(2), *pair(t, name + ".proj_out"))
    tokens = tokens.view(B, H // w, W // w, w, w, C)
    x = tokens.permute(0, 5, 1, 3, 2, 4).reshape(B, C, H, W)
    return x.roll((shift, shift), (2, 3)) if shift else x


def moved_keys(x: Tensor, t: State, name: str, heads: int, groups: int) -> Tensor:
    """Eq. 6 to 9 on (B, C, H, W), with a key for every pixel, and the bias of all pairs at once."""
    B, C, H, W = x.shape
    query = F.conv2d(x, *pair(t, name + ".proj_q"))
    kernel, bias = pair(t, name + ".conv_offset.0")
    parts = query.reshape(B * groups, C // groups, H, W)
    offset = F.conv2d(parts, kernel, bias, 1, kernel.shape[-1] // 2, groups=len(kernel))
    offset = F.gelu(channel_norm(offset, t, name + ".conv_offset.1"))
    offset = F.conv2d(offset, t[name + ".conv_offset.3.weight"]).tanh()
    offset = 2 * offset * offset.new_tensor([1 / H, 1 / W]).view(2, 1, 1)
    place = offset.permute(0, 2, 3, 1) + reference(H, W)  # (B * G, H, W, 2) as (y, x)
    parts = x.reshape(B * groups, C // groups, H, W)
    sampled = F.grid_sample(parts, place.flip(-1), align_corners=True).view(B, C, 1, H * W)
    k, v = (F.conv2d(sampled, *pair(t, f"{name}.proj_{n}")) for n in "kv")
    q, k, v = (y.reshape(B * heads, -1, H * W) for y in (query, k, v))
    scores = torch.einsum("bcm,bcn->bmn", q, k) * q.shape[1] ** -0.5
    between = 0.5 * (reference(H, W).view(1, H * W, 1, 2) - place.view(B * groups, 1, H * W, 2))
    table = t[name + ".rpe_table"]
    table = table.expand(B, -1, -1, -1).reshape(B * groups, heads // groups, *table.shape[1:])
    bias = F.grid_sample(table, between.flip(-1), align_corners=True)
    scores = scores + bias.reshape(B * heads, H * W, H * W)
    mixed = torch.einsum("bmn,bcn->bcm", scores.softmax(-1), v).reshape(B, C, H, W)
    return F.conv2d(mixed, *pair(t, name + ".proj_out"))


def reference(height: int, width: int) -> Tensor:
    """(H, W, 2): the pixels' centres as (y, x) in [-1, 1]."""
    y, x = ((torch.arange(n) + 0.5) / n * 2 - 1 for n in (height, width))
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), -1)


# What is measured


def models() -> dict[str, nn.Module]:
    """Both, with the same random weights, under which keys move and the tables matter."""
    torch.manual_seed(0)
    ours = DAT(CONFIGS["dat_tiny"])
    for module in ours.modules():
        if isinstance(module, DAttention):
            nn.init.normal_(module.places.linear.weight, std=0.1)
            nn.init.normal_(module.bias.table, std=0.5)
    return {OURS: ours, AUTHORS: AuthorsForm(ours)}


def call(model: nn.Module, images: Tensor, mode: str) -> timing.Call:
    """One forward pass, or one with its gradients, which are made anew each time."""

    def forward() -> Tensor:
        with torch.no_grad():
            return model(images)

    def both() -> None:
        model.zero_grad(set_to_none=True)
        model(images).square().mean().backward()

    return forward if mode == "forward" else both


def measure_times(both: dict[str, nn.Module], batch: int, rounds: int) -> list[dict]:
    """A row for each mode and model."""
    images = torch.randn(batch, 3, 224, 224)
    rows = []
    for mode in MODES:
        calls = {name: call(model, images, mode) for name, model in both.items()}
        result = timing.side_by_side(calls, dict.fromkeys(calls, rounds))
        rows += [{"mode": mode, "batch": batch, "model": n, **r} for n, r in result.items()]
        print(mode, batch, {n: (r["median_ms"], r["cpu_median_ms"]) for n, r in result.items()})
    return rows


def layers(size: tuple[int, int]) -> dict[str, Callable[[Tensor], Tensor]]:
    """The third stage's attention, each way, on (B, *size, C); the table is made for this size,
    since theirs has one."""
    torch.manual_seed(0)
    ours = DAttention(384, 12, 3, size)
    nn.init.normal_(ours.places.linear.weight, std=0.1)
    nn.init.normal_(ours.bias.table, std=0.5)
    names = {"proj_q": ours.query, "proj_k": ours.key, "proj_v": ours.value, "proj_out": ours.out}
    t = {}
    for name, layer in names.items():
        t[f"a.{name}.weight"] = layer.weight[..., None, None]
        t[f"a.{name}.bias"] = layer.bias
    places = ours.places
    t["a.conv_offset.0.weight"], t["a.conv_offset.0.bias"] = places.convolution.parameters()
    t["a.conv_offset.1.norm.weight"], t["a.conv_offset.1.norm.bias"] = places.norm.parameters()
    t["a.conv_offset.3.weight"] = places.linear.weight[..., None, None]
    t["a.rpe_table"] = ours.bias.table

    def authors(x: Tensor) -> Tensor:
        return moved_keys(x.permute(0, 3, 1, 2), t, "a", 12, 3).permute(0, 2, 3, 1)

    def at_once(x: Tensor) -> Tensor:
        usual = dat_attention.PAIRS_AT_ONCE
        dat_attention.PAIRS_AT_ONCE = 1 << 62
        try:
            return ours(x)
        finally:
            dat_attention.PAIRS_AT_ONCE = usual

    return {OURS: ours, AT_ONCE: at_once, AUTHORS: authors}


def measure_layer(rounds: int, size: tuple[int, int] = STAGE3) -> list[dict]:
    """Times of the layer, and MiB at the worst moment above before: of tensors, counted, and of the
    process, measured."""
    x = torch.randn(1, *size, 384)
    rows = []
    for mode in MODES:

        def run(layer: Callable[[Tensor], Tensor], mode: str = mode) -> Tensor:
            with torch.set_grad_enabled(mode != MODES[0]):
                y = layer(x)
                if mode != MODES[0]:
                    y.square().mean().backward()
            return y

        calls = {name: partial(run, layer) for name, layer in layers(size).items()}
        counted = {}
        for name, call in calls.items():  # also warms them
            with LiveTensors([x]) as live:
                call()
            counted[name] = round((live.peak - x.nbytes) / 2**20, 1)
        every = dict.fromkeys(calls, rounds)
        result = timing.side_by_side(calls, every, attempts=1, warm=False, memory=True)
        for name, found in result.items():
            measured = {"counted_mib": counted[name], "measured_mib": found.pop("extra_mib")}
            rows.append({"mode": mode, "model": name} | measured | found)
            print(rows[-1])
    return rows


def summarise(rows: list[dict]) -> list[dict]:
    """How many times as long the authors' form takes."""
    found = []
    for mode, batch in dict.fromkeys((r["mode"], r["batch"]) for r in rows):
        same = [r for r in rows if (r["mode"], r["batch"]) == (mode, batch)]
        ours, theirs = (next(r for r in same if r["model"] == n) for n in (OURS, AUTHORS))
        keys = {
            "times": "median_ms",
            "times_of_minima": "minimum_ms",
            "times_of_cpu": "cpu_median_ms",
        }
        ratios = {name: round(theirs[key] / ours[key], 3) for name, key in keys.items()}
        found.append({"mode": mode, "batch": batch, **ratios})
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    both = models()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        difference = (both[OURS](images) - both[AUTHORS](images)).abs().max().item()
    rows = measure_times(both, 1, arguments.rounds)
    rows += measure_times(both, 4, max(2, arguments.rounds // 3))
    result = provenance(COMMAND, ("torchvision",), seed=0) | {
        "threads": 1,
        "largest_difference": difference,
        "times": rows,
        "ratios": summarise(rows),
        "third_stages_layer_at_800_x_1066": measure_layer(max(2, arguments.rounds // 5)),
    }
    write_json(RESULTS / "dat_cpu.json", result)
    print(result["ratios"])


if __name__ == "__main__":
    main()
