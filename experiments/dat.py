"""DAT against itself with parts taken out: the paper's Tables 6 and 7 in miniature.

python experiments/dat.py     # about 20 minutes of a core

Small networks tell digits apart, one per picture, of several sizes and places on darkened
photographs. They have DAT's stages 2 to 4, scaled down: as many windows on each map, and the last
map is one window. No handwriting and no piece of a photograph is in two splits. All have the same
steps and learning rate, which was chosen for the network of windows alone, by its accuracy on val.
The weights of two networks are kept, for the chapter on DAT to look at.
"""

import dataclasses
import importlib.util
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from study import RESULTS, ROOT, RUNS, Row, Study, row
from study import main as run
from torch import Tensor, nn

from deformable_detr import DeformAttn
from deformable_detr.backbones.dat import DAT, DATConfig, Patches
from deformable_detr.evaluation.complexity import count
from deformable_detr.files import write_atomically, write_json
from deformable_detr.layers.dat_attention import DAttention
from deformable_detr.layers.spatial_reduction import SpatialReductionAttention
from deformable_detr.look.shared_keys import record_shared_keys
from deformable_detr.provenance import provenance

SIDE = 48  # pixels; maps of 12, 6 and 3
SMALLEST, LARGEST = 24, 44  # height of a digit in pixels
PICTURES = {"train": 6000, "val": 500, "test": 1500}
STEPS, BATCH, WARMUP, DECAY, NOTED = 300, 32, 30, 0.05, 50
SHOWN = 48  # pictures of test that are kept for looking at


@dataclass(frozen=True)
class Network:
    """What a configuration is: letters of blocks, as `DATConfig` has them, of three stages. D may
    be without offsets, or without a position bias; or, in its place, `instead` stands."""

    blocks: tuple[str, str, str] = ("WS", "WD", "WD")
    offsets: bool = True
    bias: bool = True
    instead: str = ""
    learning_rate: float = 2e-3


MOVED, DENSE = Network(), Network(instead="dense")
KEPT = {MOVED: "dat_glyphs", DENSE: "dense_glyphs"}  # seed 0's weights, in data/checkpoints


class OwnPoints(nn.Module):
    """Deformable DETR's attention in a backbone: each pixel has points of its own, and no keys."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.attention = DeformAttn(embed_dim, num_heads, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        B, H, W, _ = x.shape
        y, z = ((torch.arange(n) + 0.5) / n for n in (H, W))
        centres = torch.stack(torch.meshgrid(z, y, indexing="xy"), -1).flatten(0, 1)
        tokens = x.flatten(1, 2)
        return self.attention(tokens, centres.expand(B, -1, -1), tokens, (H, W)).view(x.shape)


def make_network(network: Network) -> DAT:
    """A DAT without its first stage, whose stem has stride 2, so that its maps have strides 4, 8
    and 16."""
    config = DATConfig(
        embed_dim=12,
        blocks=("", *network.blocks),
        heads=(1, 2, 4, 8),
        groups=(1, 1, 2, 4),  # of 24 channels each
        window=3,
        image_size=2 * SIDE,  # what would have these maps with a stem of stride 4
        offset_range=2.0 if network.offsets else 0.0,
    )
    model = DAT(config, num_classes=10)
    model.body.stem = Patches(3, 12, 2, bias=True)
    for stage in (model.body.stage2, model.body.stage3, model.body.stage4):
        for block in stage.blocks:
            if isinstance(block.attention, DAttention):
                block.attention = changed(block.attention, network)
    return model


def changed(attention: DAttention, network: Network) -> nn.Module:
    """A block's moved keys, or what a configuration has for them."""
    width, heads = attention.query.in_features, attention.num_heads
    if network.instead == "dense":
        return SpatialReductionAttention(width, heads, 1)
    if network.instead == "own points":
        return OwnPoints(width, heads)
    if not network.bias:
        nn.init.zeros_(attention.bias.table).requires_grad_(False)
    if not network.offsets:
        attention.places.requires_grad_(False)
    return attention


# Pictures


@cache
def generator() -> object:
    """data/make_digits.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("make_digits", ROOT / "data" / "make_digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def draw_picture(index: int, split: str) -> tuple[np.ndarray, int, np.ndarray]:
    """One bright digit on a darkened piece of a photograph: (SIDE, SIDE, 3) uint8, its label, and
    where its ink is, (SIDE, SIDE) bool."""
    make = generator()
    key = [make.SEED, 16, list(PICTURES).index(split), index]
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))
    photograph = make.photographs(split)[make.pick(rng, len(make.PHOTOGRAPHS))]
    top, left = (make.pick(rng, length - SIDE + 1) for length in photograph.shape[:2])
    scene = photograph[top : top + SIDE, left : left + SIDE].astype(np.int64) // 2
    images, labels = make.glyphs(split)
    chosen = make.pick(rng, len(images))
    shape = images[chosen]
    height = SMALLEST + make.pick(rng, LARGEST - SMALLEST + 1)
    width = min(SIDE, max(3, int(height * shape.shape[1] / shape.shape[0] + 0.5)))
    alpha = ((make.resize(shape, height, width) / 16 - 0.3) / 0.3).clip(0, 1)
    alpha = np.floor(alpha * 256).astype(np.int64)[..., None]
    top, left = make.pick(rng, SIDE - height + 1), make.pick(rng, SIDE - width + 1)
    where = slice(top, top + height), slice(left, left + width)
    colour = np.array([128 + make.pick(rng, 128) for _ in range(3)])
    scene[where] = (scene[where] * (256 - alpha) + colour * alpha) >> 8
    ink = np.zeros((SIDE, SIDE), dtype=bool)
    ink[where] = alpha[..., 0] >= 128
    return scene.astype(np.uint8), labels[chosen], ink


def load_pictures(split: str) -> tuple[Tensor, Tensor]:
    """A split's pictures, (N, 3, SIDE, SIDE) uint8, and labels; drawn once, and kept in runs."""
    path = RUNS / f"glyphs-{split}-{SIDE}-{PICTURES[split]}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_pictures(path, split, PICTURES[split])
    with np.load(path) as kept:
        pictures = torch.from_numpy(kept["pictures"]).permute(0, 3, 1, 2)
        return pictures, torch.from_numpy(kept["labels"])


def load_ink(split: str) -> Tensor:
    """Where the ink of a split's pictures is, (N, SIDE, SIDE) bool; after `load_pictures`."""
    with np.load(RUNS / f"glyphs-{split}-{SIDE}-{PICTURES[split]}.npz") as kept:
        return torch.from_numpy(kept["ink"])


def save_pictures(path: Path, split: str, count: int) -> None:
    """The first pictures of a split, their labels and ink, as npz."""
    made = [draw_picture(index, split) for index in range(count)]
    arrays = dict(
        zip(("pictures", "labels", "ink"), map(np.stack, zip(*made, strict=True)), strict=True)
    )

    def write(place: Path) -> None:
        with Path(place).open("wb") as file:  # numpy would add ".npz" to a temporary name
            np.savez_compressed(file, **arrays)

    write_atomically(path, write)


def normalised(pictures: Tensor) -> Tensor:
    """uint8 to float32 of about zero mean and unit spread."""
    return (pictures.float() / 255 - 0.5) / 0.25


# A trial


def train_network(network: Network, seed: int, folder: Path) -> list[Row]:
    """Train, test, and leave the weights in the folder."""
    splits = {split: load_pictures(split) for split in PICTURES}
    torch.manual_seed(seed)
    model = make_network(network)
    started = time.process_time()
    rows = list(fit(model, network.learning_rate, splits["train"], splits["val"]))
    spent = time.process_time() - started
    for split in ("val", "test"):
        accuracy, loss = test(model, *splits[split])
        rows += [row(split, STEPS, "accuracy", accuracy), row(split, STEPS, "loss", loss)]
    values = {
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "multiply_adds": multiply_adds(model),
        "cpu_seconds": round(spent, 1),
    }
    rows += [row("train", STEPS, name, value) for name, value in values.items()]
    found = alike(model, splits["val"][0]) | foreground(model, splits["val"][0], load_ink("val"))
    rows += [row("val", STEPS, name, x) for name, x in found.items()]
    save_file(model.state_dict(), folder / "weights.safetensors")
    if seed == 0 and network in KEPT:
        keep(model, KEPT[network], round(accuracy, 4))
    return rows


def keep(model: DAT, name: str, accuracy: float) -> None:
    """Weights for the chapter to look at, with their card, and some pictures of test."""
    card = provenance("python experiments/dat.py", seed=0)
    path = ROOT / "data" / "checkpoints" / f"{name}.safetensors"
    write_atomically(path, lambda place: save_file(model.state_dict(), place))
    write_json(path.with_suffix(".json"), card | {"steps": STEPS, "test_accuracy": accuracy})
    save_pictures(RESULTS / "dat_pictures.npz", "test", SHOWN)


def fit(model: DAT, learning_rate: float, train: tuple, val: tuple) -> list[Row]:
    """STEPS steps of AdamW, whose rate rises and then falls as a cosine. Colours change places
    and are inverted at random."""
    pictures, labels = train
    optimizer = torch.optim.AdamW(groups_of(model), learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, STEPS, pct_start=WARMUP / STEPS, cycle_momentum=False
    )
    losses = []
    for step in range(STEPS + 1):
        if step % NOTED == 0:
            if losses:
                yield row("train", step, "loss", sum(losses) / len(losses))
                losses.clear()
            for name, length in offset_lengths(model, normalised(val[0][:32])).items():
                yield row("val", step, name, length)
        if step == STEPS:
            return
        chosen = torch.randint(len(pictures), (BATCH,))
        images = normalised(pictures[chosen])[:, torch.randperm(3)]
        loss = F.cross_entropy(model(images), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())


def groups_of(model: nn.Module) -> list[dict]:
    """Parameters with decay, and without: vectors and the tables of position bias."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    decayed = [p for n, p in named if p.ndim > 1 and "table" not in n]
    rest = [p for n, p in named if p.ndim < 2 or "table" in n]
    return [{"params": decayed, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}]


@torch.no_grad()
def test(model: DAT, pictures: Tensor, labels: Tensor) -> tuple[float, float]:
    """Share of pictures whose digit is told, and the mean loss."""
    logits = torch.cat([model.eval()(normalised(part)) for part in pictures.split(250)])
    loss = F.cross_entropy(logits, labels).item()
    return (logits.argmax(1) == labels).float().mean().item(), loss


def multiply_adds(model: DAT) -> int:
    """Of one picture."""
    return count(OfBatch(model), (SIDE, SIDE))[0]


class OfBatch(nn.Module):
    """A network as the instrument calls it: with a batch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: object) -> Tensor:
        """Logits of the batch's images."""
        return self.model(batch.images)


def moved_keys(model: nn.Module) -> dict[str, DAttention]:
    """The layers whose keys move, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, DAttention)}


@torch.no_grad()
def offset_lengths(model: DAT, images: Tensor) -> dict[str, float]:
    """How far keys are from their grid, on average, in pixels of their map, for each layer."""
    found, handles = {}, []
    for name, layer in moved_keys(model).items():
        if not layer.places.offset_range:
            continue

        def note(places: nn.Module, given: tuple, moved: Tensor, name: str = name) -> None:
            found[f"offset {name.removesuffix('.attention')}"] = length_of(places, given[0], moved)

        handles.append(layer.places.register_forward_hook(note))
    model.eval()(images)
    model.train()
    for handle in handles:
        handle.remove()
    return found


def length_of(places: nn.Module, query: Tensor, moved: Tensor) -> float:
    """Mean length of the offsets of `KeyPlaces`, in pixels of its map."""
    kept, places.offset_range = places.offset_range, 0.0
    grid = places.forward(query)
    places.offset_range = kept
    size = torch.tensor([query.shape[2] - 1, query.shape[1] - 1])
    return ((moved - grid) * size).norm(dim=-1).mean().item()


def foreground(model: DAT, pictures: Tensor, ink: Tensor) -> dict[str, float]:
    """Of stage 3, where its keys are shared: the part of them that stands on ink, before and after
    they move, and the part of the attention that falls on those, of all groups together."""
    name = "body.stage3.blocks.1.attention"
    if name not in moved_keys(model):
        return {}
    layer = moved_keys(model)[name]
    looked = record_shared_keys(model.eval(), normalised(pictures))[name]
    kept, layer.places.offset_range = layer.places.offset_range, 0.0
    still = record_shared_keys(model, normalised(pictures))[name]
    layer.places.offset_range = kept
    groups = looked.places.shape[1]
    attention = looked.attention.unflatten(1, (groups, -1)).mean(2)  # (B, G, N)
    moved = on_ink(looked.places, ink)
    return {
        "unmoved keys on ink": on_ink(still.places, ink).mean().item(),
        "keys on ink": moved.mean().item(),
        "attention on ink": (attention * moved).sum(-1).mean().item(),
    }


def on_ink(places: Tensor, ink: Tensor) -> Tensor:
    """Whether places (B, G, N, 2) lie on ink (B, SIDE, SIDE): (B, G, N), 0 or 1."""
    x, y = (places * SIDE).long().clamp(0, SIDE - 1).unbind(-1)
    return ink[torch.arange(len(ink))[:, None, None], y, x].float()


# How much queries attend alike


@torch.no_grad()
def alike(model: DAT, pictures: Tensor) -> dict[str, float]:
    """Of the layers that compare all pixels of a map with all keys: see `shared` and `cosine`."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, SpatialReductionAttention) and layer.reduction == 1:
            scores = scores_of(model, layer, normalised(pictures[:64]))
            short = name.removesuffix(".attention")
            found[f"shared {short}"] = shared(scores)
            found[f"cosine {short}"] = cosine(scores.softmax(-1))
            found[f"keys {short}"] = effective_keys(scores.softmax(-1))
    return found


def scores_of(model: DAT, layer: SpatialReductionAttention, images: Tensor) -> Tensor:
    """(B, M, Q, N): what the layer's softmax is given."""
    kept = []
    handle = layer.register_forward_pre_hook(lambda _, given: kept.append(given[0]))
    model.eval()(images)
    handle.remove()
    query, key = layer.query(kept[0]), layer.key_value(kept[0]).chunk(2, -1)[0]
    query, key = (x.flatten(1, 2).unflatten(-1, (layer.num_heads, -1)) for x in (query, key))
    return torch.einsum("bqmd,bnmd->bmqn", query, key) * query.shape[-1] ** -0.5


def shared(scores: Tensor) -> float:
    """The part of the scores' variance over keys that all queries have in common: 1 where all
    attend alike, 1 / Q where each goes its own way."""
    scores = scores - scores.mean(-1, keepdim=True)  # a query's own level, which softmax ignores
    return (scores.mean(-2).square().mean() / scores.square().mean()).item()


def cosine(weights: Tensor) -> float:
    """Mean cosine of two queries' attention maps, of one picture and head."""
    unit = weights / weights.norm(dim=-1, keepdim=True)
    count = unit.shape[-2]
    pairs = unit.sum(-2).square().sum(-1) - count  # sum over pairs of two different queries
    return (pairs / (count * (count - 1))).mean().item()


def effective_keys(weights: Tensor) -> float:
    """exp of the entropy: how many keys share the attention, on average."""
    return (-(weights * weights.clamp(min=1e-12).log()).sum(-1)).exp().mean().item()


STUDY = Study(
    name="dat",
    question="accuracy of a small DAT on digits in pictures, against itself with parts taken out",
    configurations={
        "DAT": MOVED,
        "dense attention": DENSE,
        "windows only": Network(("WS", "WS", "WS")),
        "no offsets": dataclasses.replace(MOVED, offsets=False),
        "no position bias": dataclasses.replace(MOVED, bias=False),
        "neither": dataclasses.replace(MOVED, offsets=False, bias=False),
        "spatial reduction": Network(("WS", "WP", "WP")),
        "moved keys in all stages": Network(("WD", "WD", "WD")),
        "moved keys in the last stage": Network(("WS", "WS", "WD")),
        "points of one's own": dataclasses.replace(MOVED, instead="own points"),
    },
    seeds=(0, 1, 2, 3, 4),
    trial=train_network,
    usual=25,
    headline=("test", "accuracy"),
)


def main() -> None:
    """The command."""
    run(("dat",))


if __name__ == "__main__":
    main()
