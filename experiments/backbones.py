"""What do DAT, Swin and PVT cost, and their attention alone? By count, beside the paper's figures.

    python experiments/backbones.py    # a minute or two

"Vision Transformer with Deformable Attention": Table 2, its ablations of stages (Tables 6 and 7),
what DAT costs in detectors and in segmentation (Tables 3 and 5), and formula (10). Counted on
tensors without data: no time is measured, and nothing is trained. Writes
data/results/backbones.json.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.models import SwinTransformer, swin_b, swin_s, swin_t

from deformable_detr.backbones.dat import CONFIGS, DAT, KERNELS, REDUCTIONS, DATBackbone, Patches
from deformable_detr.evaluation.complexity import LiveTensors, count
from deformable_detr.files import write_json
from deformable_detr.layers import dat_attention
from deformable_detr.layers.dat_attention import DAttention
from deformable_detr.layers.spatial_reduction import SpatialReductionAttention
from deformable_detr.layers.window_attention import WindowAttention
from deformable_detr.models.semantic_fpn import SemanticFPN
from deformable_detr.models.upernet import UPerNet
from deformable_detr.provenance import provenance
from deformable_detr.structures import Batch

RESULTS = Path(__file__).parents[1] / "data" / "results"
CLASSIFIED, DETECTED, PAPERS = (224, 224), (800, 1066), (800, 1280)  # PAPERS: of Table 3
WIDE = (512, 2048)  # of Table 5
DEPTHS = {
    "pvt_tiny": (2, 2, 2, 2),
    "pvt_small": (3, 4, 6, 3),
    "pvt_medium": (3, 4, 18, 3),
    "pvt_large": (3, 8, 27, 3),
}
TINY = CONFIGS["dat_tiny"]
# Tables 2, 6 and 7: millions of parameters, G multiply-adds. None: the paper has no such row
PAPER = {
    "dat_tiny": (29, 4.6),
    "dat_small": (50, 9.0),
    "dat_base": (88, 15.8),
    "dat_base_384": (88, 49.8),
    "swin_tiny": (29, 4.5),
    "swin_small": (50, 8.8),
    "swin_base": (88, 15.5),
    "swin_base_384": (88, 47.2),
    "pvt_tiny": None,
    "pvt_small": (25, 3.8),
    "pvt_medium": (46, 6.9),
    "pvt_large": (61, 9.8),
    "keys that move in stages 1 to 4": (28.39, 4.64),
    "keys that move in stages 2 to 4": (28.34, 4.60),
    "keys that move in stages 3 and 4": (28.32, 4.59),
    "keys that move in stage 4": (28.29, 4.51),
    "spatial reduction in stages 1 and 2": (30.68, 4.48),
}
# Table 3, RetinaNet with DAT minus RetinaNet with Swin, whose other parts are the same: G
ADDED = {"tiny": 253 - 248, "small": 359 - 339}
# Table 5, by head; the parameters of UPerNet's rows are with the auxiliary head of the training
SEGMENTED = {
    "Semantic FPN": {"tiny": (32, 198), "small": (53, 320), "base": (92, 481)},
    "UPerNet": {"tiny": (60, 957), "small": (81, 1079), "base": (121, 1212)},
}
SEGMENTERS = {"Semantic FPN": SemanticFPN, "UPerNet": UPerNet}


class PVT(nn.Module):
    """PVT (first version) with ImageNet's head, as its authors' code has it; only to be counted.

    Of a size that its squares do not divide it counts what `Patches` pads, where the authors' code
    leaves out what is over.
    """

    def __init__(self, depths: tuple[int, ...], image_size: int = 224) -> None:
        super().__init__()
        widths, heads, expansions = (64, 128, 320, 512), (1, 2, 5, 8), (8, 8, 4, 4)
        inputs, sides = (3, *widths), (4, 2, 2, 2)
        self.patches = nn.ModuleList(map(Patches, inputs, widths, sides, [True] * 4))
        grid = [image_size // 2 ** (i + 2) for i in range(4)]
        self.positions = nn.ParameterList(
            torch.zeros(1, width, n, n) for width, n in zip(widths, grid, strict=True)
        )
        self.token, self.token_position = (nn.Parameter(torch.zeros(1, 1, 512)) for _ in range(2))
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(PVTBlock(widths[i], heads[i], REDUCTIONS[i], expansions[i]) for _ in range(depth))
            )
            for i, depth in enumerate(depths)
        )
        self.norm, self.head = nn.LayerNorm(512), nn.Linear(512, 1000)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, 1000)."""
        x = images.permute(0, 2, 3, 1)
        for i, (patches, stage) in enumerate(zip(self.patches, self.stages, strict=True)):
            x = patches(x)
            positions = F.interpolate(self.positions[i], x.shape[1:3], mode="bilinear")
            x = x + positions.permute(0, 2, 3, 1)
            if i == 3:  # the token of the class stands before the map, as if it were one row
                token = (self.token + self.token_position).expand(len(x), -1, -1)
                x = torch.cat([token, x.flatten(1, 2)], 1)[:, None]
            x = stage(x)
        return self.head(self.norm(x[:, 0, 0]))


class PVTBlock(nn.Module):
    """Attention and two linear layers, each normalised before and added after."""

    def __init__(self, width: int, heads: int, reduction: int, expansion: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = SpatialReductionAttention(width, heads, reduction)
        inner = expansion * width
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class OfImages(nn.Module):
    """A network that takes images, as the instrument calls it: with a batch."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: Batch) -> Tensor:
        """What the network makes of the batch's images."""
        return self.network(batch.images)


class OfMap(OfImages):
    """A layer of some width, on a map of the batch's size."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__(layer)
        self.width = width

    def forward(self, batch: Batch) -> Tensor:
        """(B, H, W, width)."""
        return self.network(batch.images[:, :1].permute(0, 2, 3, 1).expand(-1, -1, -1, self.width))


# The networks


def swin_base_384() -> SwinTransformer:
    """Swin-B with windows of 12, which torchvision has no name for."""
    return SwinTransformer([4, 4], 128, [2, 2, 18, 2], [4, 8, 16, 32], [12, 12])


def networks() -> dict[str, Callable[[], nn.Module]]:
    """By name, what makes each."""
    made = {name: lambda config=config: DAT(config) for name, config in CONFIGS.items()}
    made |= {"swin_tiny": swin_t, "swin_small": swin_s, "swin_base": swin_b}
    made["swin_base_384"] = swin_base_384
    return made | {n: lambda depths=depths: PVT(depths) for n, depths in DEPTHS.items()}


def with_moved_keys(first: int) -> DAT:
    """DAT-T with keys that move from that stage on. Table 7 does not say how many keys the first
    two stages have; its multiply-adds are those of r = 4 and 2, with 196 keys as in the third."""
    blocks = ["W" + "DS"[stage < first] for stage in (1, 2, 3, 4)]
    blocks[2] *= 3
    model = DAT(replace(TINY, blocks=tuple(blocks)))
    for module, stride in (model.body.stage1, 4), (model.body.stage2, 2):
        attention = module.blocks[1].attention
        if isinstance(attention, DAttention):
            attention.places.stride = stride
            attention.places.convolution.stride = (stride, stride)
    return model


def ablations() -> dict[str, Callable[[], nn.Module]]:
    """DAT-T with other stages."""
    names = [n for n in PAPER if n.startswith("keys")]
    made = {n: lambda first=first: with_moved_keys(first) for first, n in enumerate(names, 1)}
    pooled = replace(TINY, blocks=("PP", "PP", *TINY.blocks[2:]))
    return made | {"spatial reduction in stages 1 and 2": lambda: DAT(pooled)}


def count_network(name: str, network: nn.Module, size: tuple[int, int]) -> dict:
    """Parameters, multiply-adds, numbers that layer norms normalise, and what the paper says.

    The paper's multiply-adds of DAT and Swin are ours and five for each of these numbers, as some
    counters have it, to the last decimal that it gives.
    """
    normalised = []
    hooks = [
        module.register_forward_hook(lambda *given: normalised.append(given[-1].numel()))
        for module in network.modules()
        if isinstance(module, nn.LayerNorm)
    ]
    total, _ = count(OfImages(network.eval()), size)
    for hook in hooks:
        hook.remove()
    paper = PAPER[name] if size[0] == size[1] else None
    return {
        "name": name,
        "size": size,
        "parameters": sum(p.numel() for p in network.parameters()),
        "multiply_adds": total,
        "normalised": sum(normalised),
        "paper": paper and {"parameters_m": paper[0], "multiply_adds_g": paper[1]},
    }


def count_networks() -> Iterator[dict]:
    """A row for each network and size; those made for 384 pixels at that size alone."""
    for name, make in (networks() | ablations()).items():
        square = (384, 384) if name.endswith("384") else CLASSIFIED
        more = () if name.endswith("384") or name in ablations() else (DETECTED,)
        network = make()
        yield from (count_network(name, network, size) for size in (square, *more))


def count_detectors() -> Iterator[dict]:
    """What DAT adds to a detector in Swin's place, at the size of Table 3, by r."""
    for name, swin in (("tiny", swin_t), ("small", swin_s)):
        before, _ = count(OfImages(swin().eval()), PAPERS)
        for stride in (1, 2):
            dat = DAT(replace(CONFIGS[f"dat_{name}"], stride=stride)).eval()
            after, _ = count(OfImages(dat), PAPERS)
            row = {"name": name, "size": PAPERS, "stride": stride}
            yield row | {"added": after - before, "paper_added_g": ADDED[name]}


def count_segmentation() -> Iterator[dict]:
    """DAT under both heads with the 150 classes of ADE20K, at the size of Table 5, by r."""
    for head, (name, (parameters, total)) in (
        (head, item) for head, rows in SEGMENTED.items() for item in rows.items()
    ):
        for stride in (1, 2):
            config = replace(CONFIGS[f"dat_{name}"], stride=stride)
            network = SEGMENTERS[head](DATBackbone(config, stages=4), 150).eval()
            counted, _ = count(OfImages(network), WIDE)
            yield {
                "name": name,
                "head": head,
                "size": WIDE,
                "stride": stride,
                "parameters": sum(p.numel() for p in network.parameters()),
                "multiply_adds": counted,
                "paper": {"parameters_m": parameters, "multiply_adds_g": total},
            }


# The layers


def stage(number: int, size: tuple[int, int]) -> tuple[int, int, int, int, int]:
    """A stage of DAT-T, numbered from 0: width, heads, groups, and its map's H and W."""
    side = 2 ** (number + 2)
    height, width = (-(-n // side) for n in size)
    return TINY.embed_dim * 2**number, TINY.heads[number], TINY.groups[number], height, width


def layers(number: int) -> dict[str, tuple[nn.Module, int]]:
    """The kinds of attention that a stage could have, and r of each."""
    C, M, G, H, W = stage(number, CLASSIFIED)
    r, rest = REDUCTIONS[number], (C, M, G, (H, W), KERNELS[number])
    found = {
        "dense": (SpatialReductionAttention(C, M), 1),
        "windows": (WindowAttention(C, M, TINY.window), 1),
        "spatial reduction": (SpatialReductionAttention(C, M, r), r),
        "deformable": (DAttention(*rest), 1),
    }
    return found if r == 1 else found | {"deformable, fewer keys": (DAttention(*rest, r), r)}


def formula(kind: str, r: int, number: int, size: tuple[int, int]) -> int:
    """Multiply-adds of products: for DAT formula (10), for others its parts that they have."""
    C, _, _, H, W = stage(number, size)
    pixels, keys = H * W, -(-H // r) * -(-W // r)
    if kind == "windows":  # of whole windows, where padding is none
        return 4 * pixels * C * C + 2 * pixels * TINY.window**2 * C
    attention = 2 * pixels * keys * C + 2 * pixels * C * C + 2 * keys * C * C
    if kind == "spatial reduction" and r > 1:
        return attention + keys * r * r * C * C  # one linear layer of each square
    if kind.startswith("deformable"):
        return attention + (KERNELS[number] ** 2 + 2) * keys * C
    return attention


def count_layers(size: tuple[int, int]) -> Iterator[dict]:
    """A row for each stage and kind."""
    for number in range(4):
        C, _, _, H, W = stage(number, size)
        for kind, (layer, r) in layers(number).items():
            total, _ = count(OfMap(layer, C), (H, W))
            yield {
                "kind": kind,
                "size": size,
                "stage": number + 1,
                "map": (H, W),
                "r": r,
                "parameters": sum(p.numel() for p in layer.parameters()),
                "multiply_adds": total,
                "formula": formula(kind, r, number, size),
            }


def peak_bytes(layer: nn.Module, shape: tuple[int, ...], training: bool, at_once: bool) -> int:
    """Of all tensors at the worst moment, the layer's own and the map left out. at_once: all pairs
    of query and key stand in memory; without it torch's attention, or ours, takes them by turns."""
    backends = [SDPBackend.MATH] if at_once else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    usual = dat_attention.PAIRS_AT_ONCE
    dat_attention.PAIRS_AT_ONCE = 1 << 62 if at_once else usual
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(backends):
            x = torch.empty(shape, requires_grad=training)
            with torch.set_grad_enabled(training), LiveTensors([x]) as live:
                before, y = live.now, layer(x)
                if training:
                    y.sum().backward()
                return live.peak - before
    finally:
        dat_attention.PAIRS_AT_ONCE = usual
        layer.zero_grad(set_to_none=True)


def count_memory(size: tuple[int, int]) -> Iterator[dict]:
    """A row for each kind of attention in stage 3, and each way to run it."""
    C, _, _, H, W = stage(2, size)
    for kind, (layer, r) in layers(2).items():
        for training in (False, True):
            for at_once in (True, False):
                peak = peak_bytes(layer, (1, H, W, C), training, at_once)
                way = {"training": training, "at_once": at_once, "peak_bytes": peak}
                yield {"kind": kind, "r": r, "map": (H, W)} | way


def main() -> None:
    """The command."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    result = provenance("python experiments/backbones.py", ("torchvision",))
    result["networks"] = list(count_networks())
    result["in_detectors"] = list(count_detectors())
    result["in_segmentation"] = list(count_segmentation())
    result["layers"] = [row for size in (CLASSIFIED, DETECTED) for row in count_layers(size)]
    result["memory_of_stage_3"] = list(count_memory(DETECTED))
    write_json(RESULTS / "backbones.json", result)
    for name in ("networks", "in_detectors", "in_segmentation", "layers", "memory_of_stage_3"):
        print(*result[name], sep="\n")


if __name__ == "__main__":
    main()
