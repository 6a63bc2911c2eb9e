"""What does training do to the points? Their offsets, and where they lie, six times on the way.

    python experiments/points.py     # about a minute for each seed

The trainings are those of "two maps, two stages" in experiments/convergence.py, which has their AP;
looking.py asks the same of the shipped detector at its end. Looked at is the last layer: in the
decoder the queries that are matched to an object, in the encoder the tokens of the finer map whose
middles lie in one.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from convergence import STUDY as CONVERGENCE
from detectors import DATA, SIDE, Detector, Draws, describe, first_images, matches
from looking_figures import AREAS, BORDER
from study import Row, Study, row
from study import main as run
from torch import Tensor

from deformable_detr.data.coco import find_split
from deformable_detr.evaluation_mode import evaluating
from deformable_detr.files import write_json
from deformable_detr.layers.attention import Sampling, star
from deformable_detr.look.trace import trace
from deformable_detr.models import BaseDetector
from deformable_detr.structures import Batch, Target
from deformable_detr.training.loop import train

CONFIGURATION = "two maps, two stages"
Rows = tuple[Tensor, Tensor, Tensor]  # image (N,), query or token (N,), box of an object (N, 4)


def follow(detector: Detector, seed: int, folder: Path) -> list[Row]:
    """The rows of one training, which resumes where a killed one was saved; step 0 is before it."""
    recipe, per_epoch = detector.resolved(seed), detector.steps // detector.evaluations
    draws = Draws(*find_split(DATA, "train"), recipe.train_transform())
    draws.length = per_epoch * recipe.train.batch_size
    model, probe = (
        detector.build(seed, len(draws.categories)),
        first_images(recipe.eval_transform()),
    )
    path = folder / "points.json"
    seen = json.loads(path.read_text()) if path.exists() else {"0": look(model, probe)}

    def on_step(step: int, losses: dict[str, float]) -> None:
        if step % per_epoch == 0:
            seen[str(step)] = look(model, probe)
            write_json(path, seen)

    train(model, draws, None, folder, recipe.train, on_step=on_step, progress=False)
    (folder / "checkpoint.pt").unlink()
    return [
        row("val", int(step), name, value)
        for step, values in seen.items()
        for name, value in values.items()
    ]


@torch.no_grad()
def look(model: BaseDetector, batch: Batch) -> dict[str, float]:
    """The figures of both parts' last layers, for objects of each size and for all."""
    with evaluating(model):
        seen = trace(model, batch)
    (height, width), *_ = seen.shapes
    rows = {
        "encoder": tokens_inside(batch.targets, height, width),
        "decoder": matched(matches(model, batch), batch.targets),
    }
    found = {}
    for part, (image, query, boxes) in rows.items():
        name = [name for name in seen.record if part in name.split(".")][-1]
        references = seen.references[name][image, query, 0]
        sampling = seen.record[name]
        each = figures(sampling, image, query, references, boxes)
        area = boxes[:, 2] * boxes[:, 3] * SIDE**2
        for size, (low, high) in (AREAS | {"all": (0, torch.inf)}).items():
            mine = (area >= low) & (area < high)
            if mine.any():
                found |= {f"{part}_{size}_{n}": x[mine].mean().item() for n, x in each.items()}
    return found


def tokens_inside(targets: list[Target], height: int, width: int) -> Rows:
    """The tokens of the first map, (height, width), whose middles lie in one object's box."""
    y, x = ((torch.arange(n) + 0.5) / n for n in (height, width))
    middles = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)
    rows = []
    for i, target in enumerate(targets):
        centre, size = target.boxes[:, None].chunk(2, -1)
        inside = ((middles - centre).abs() <= size / 2).all(-1)  # (objects, tokens)
        objects, tokens = (inside & (inside.sum(0) == 1)).nonzero(as_tuple=True)
        rows.append((torch.full_like(tokens, i), tokens, target.boxes[objects]))
    return tuple(torch.cat(part) for part in zip(*rows, strict=True))


def matched(queries: list[list[int]], targets: list[Target]) -> Rows:
    """Each object's query."""
    image = [i for i, found in enumerate(queries) for _ in found]
    query = [q for found in queries for q in found]
    return torch.tensor(image), torch.tensor(query), torch.cat([t.boxes for t in targets])


def figures(
    sampling: Sampling, image: Tensor, query: Tensor, references: Tensor, boxes: Tensor
) -> dict[str, Tensor]:
    """For each of N rows, references (N, 2 or 4), means over heads, weighted as the points are:

    length: of the offsets, in pixels. direction: the cosine of the angle between them and those
    that training starts from. own: the squared length, in cells or boxes, of what an offset differs
    by from that of the mean row, as a share of the squared length of all. inside: the weight in the
    object's box. edge: the distance from the box's edge, in half-sides. border: the weight near it.
    level_0 ...: the weight on each map.
    """
    points, weights = sampling.locations[image, query], sampling.weights[image, query]
    _, M, L, K = weights.shape
    weights = weights / M
    arrows = points - references[:, None, None, None, :2]
    if references.shape[-1] == 4:
        unit = references[:, None, None, None, 2:] / (2 * K)
    else:
        unit = 1 / torch.tensor(sampling.spatial_shapes).flip(-1).view(L, 1, 2)
    offsets = arrows / unit  # as the layer has them: see MSDeformAttn
    own = (offsets - offsets.mean(0)).square().sum(-1)
    centre, size = boxes[:, None, None, None].chunk(2, -1)
    distance = ((points - centre) / (size / 2)).abs().amax(-1)  # 1 at the edges
    measured = {
        "length": (arrows * SIDE).norm(dim=-1),
        "direction": F.cosine_similarity(offsets, star(M, L, K).to(offsets), dim=-1),
        "inside": (distance <= 1).to(weights),
        "edge": (distance - 1).abs(),
        "border": ((distance - 1).abs() <= BORDER).to(weights),
    }
    means = {name: (weights * each).sum((1, 2, 3)) for name, each in measured.items()}
    means["own"] = own.mean((1, 2, 3)) / offsets.square().sum(-1).mean()
    levels = weights.sum((1, 3)).unbind(-1)
    return means | {f"level_{level}": share for level, share in enumerate(levels)}


STUDY = Study(
    name="points",
    question="what training does to sampling points: offsets, weights and where they lie",
    configurations={CONFIGURATION: CONVERGENCE.configurations[CONFIGURATION]},
    seeds=(0, 1, 2),
    trial=follow,
    usual=80,
    describe=describe,
    data=DATA,
)


def main() -> None:
    """The command."""
    run(("points",))


if __name__ == "__main__":
    main()
