"""K of its own for each query? The shipped detector, with fewer points at inference.

    python experiments/thresholds.py     # about 5 minutes

No training: points whose weight is below a threshold are dropped, or all but the k heaviest of each
query and head, and what is left sums to one again. A threshold lets each query choose how many it
keeps; the k heaviest are the fair rival, with the same number for all. And, for what several maps
are worth to small objects and to large ones: all points but those on one map.
"""

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from detectors import DATA
from digits import CHECKPOINTS
from study import Study, row
from study import main as run
from torch import Tensor

from deformable_detr.data.coco import CocoDataset, find_split
from deformable_detr.data.transforms import digits_eval_transform
from deformable_detr.evaluation.coco import predict_dataset, score
from deformable_detr.layers.attention import MSDeformAttn, Sampling
from deformable_detr.look.sampling import replaced
from deformable_detr.provenance import checksum
from deformable_detr.weights.ours import load_model

DETECTOR = CHECKPOINTS / "digits.safetensors"
IMAGES, FOLDS = 500, 5  # of test, and fifths of it, to see how far images differ


@dataclass(frozen=True)
class Keep:
    """Which points are kept: the `heaviest` ones, or those of at least a weight."""

    heaviest: int | None = None
    at_least: float = 0.0

    def __call__(self, weights: Tensor) -> Tensor:
        """(..., L, K) of weights that sum to one, and again after the rest is zero. The heaviest is
        always kept."""
        flat = weights.flatten(-2)
        rank = flat.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        keep = (flat >= self.at_least) | (rank == 0)
        if self.heaviest:
            keep = rank < self.heaviest
        kept = flat * keep
        return (kept / kept.sum(-1, keepdim=True)).view(weights.shape)


@dataclass(frozen=True)
class Leave:
    """Points are kept on all levels but one."""

    level: int

    def __call__(self, weights: Tensor) -> Tensor:
        """As `Keep`."""
        kept = weights.clone()
        kept[..., self.level, :] = 0
        return kept / kept.sum((-1, -2), keepdim=True)


def evaluate(keep: Keep | Leave, seed: int, folder: Path) -> list[dict]:
    """AP on images of test and on each fifth of them, and the points kept per query and head."""
    model, _ = load_model(DETECTOR)
    dataset = CocoDataset(*find_split(DATA, "test"), digits_eval_transform())
    dataset.image_ids = dataset.image_ids[:IMAGES]
    counts = {"encoder": [], "decoder": []}
    with ExitStack() as undo:
        for name, module in model.named_modules():
            if isinstance(module, MSDeformAttn):
                fewer = keeping(module.sampling, keep, counts[name.split(".")[0]])
                undo.enter_context(replaced(module, "sampling", fewer))
        found = predict_dataset(model.eval(), dataset, progress=False)
    rows = [row("test", 0, name, value) for name, value in score(found, dataset).to_dict().items()]
    rows = [each for each in rows if each["metric"].startswith("ap")]
    ids = dataset.image_ids
    for fold in range(FOLDS):
        dataset.image_ids = ids[fold::FOLDS]
        chosen = set(dataset.image_ids)
        part = score([each for each in found if each["image_id"] in chosen], dataset)
        rows.append(row(f"test, part {fold}", 0, "ap", part.to_dict()["ap"]))
    means = {f"{part}_points": sum(each) / len(each) for part, each in counts.items()}
    return rows + [row("test", 0, name, round(mean, 3)) for name, mean in means.items()]


def describe(keep: Keep | Leave) -> dict:
    """What makes two trials the same, the detector's weights too."""
    return dataclasses.asdict(keep) | {"weights": checksum(DETECTOR)}


def keeping(sampling: Callable, keep: Keep | Leave, counts: list[float]) -> Callable:
    """A module's `sampling` with fewer points; their mean number is noted for each call."""

    def call(*arguments: object) -> Sampling:
        found = sampling(*arguments)
        found.weights = keep(found.weights)
        counts.append((found.weights > 0).sum((-1, -2)).double().mean().item())
        return found

    return call


STUDY = Study(
    name="thresholds",
    question="AP of the shipped detector against the points that are kept, of 12 of each query and "
    "head: by a threshold of their weight, or the k heaviest",
    configurations={
        "all": Keep(),
        **{f"weight at least {w}": Keep(at_least=w) for w in (0.02, 0.05, 0.1, 0.15, 0.2, 0.3)},
        **{f"{k} heaviest": Keep(heaviest=k) for k in (1, 2, 3, 4, 5, 6, 8)},
        **{f"none at stride {4 << level}": Leave(level) for level in range(3)},
    },
    seeds=(0,),
    describe=describe,
    trial=evaluate,
    data=DATA,
    usual=25,
)


def main() -> None:
    """The command."""
    run(("thresholds",))


if __name__ == "__main__":
    main()
