"""Before the first step: over how many tokens do attention and its gradient spread?

    python experiments/initialisation.py     # about 2 minutes

The paper's explanation of DETR's slow start (section 3), measured: dense weights are nearly uniform
over all tokens, so that the gradient says little about where to look; deformable attention starts
with a few samples. Seeds are of weights and noise images.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from detectors import Detector, effective_keys
from study import Study, row
from study import main as run
from torch import Tensor

from deformable_detr.models import BaseDetector
from deformable_detr.models.tokens import token_centres
from deformable_detr.structures import Batch, Queries

IMAGES, QUERIES = 2, 8
SIDES = (128, 256, 512)


@dataclass(frozen=True)
class Start:
    """An untrained detector."""

    recipe: str
    settings: tuple[str, ...]


def spread(start: Start, seed: int, folder: Path) -> list[dict]:
    """The rows of one configuration, by the side of its images in pixels."""
    model, rows = Detector(start.recipe, start.settings).build(seed).eval(), []
    for side in SIDES:
        batch = Batch.from_images([torch.randn(3, side, side) for _ in range(IMAGES)])
        with torch.no_grad():
            tokens = model.tokens(batch).features.shape[1]
        values = effective_keys(model, batch) | {
            "tokens": tokens,
            "encoder_gradient_tokens": round(gradient_tokens(model, batch), 4),
        }
        rows += [row("start", side, name, value) for name, value in values.items()]
    return rows


def gradient_tokens(model: BaseDetector, batch: Batch) -> float:
    """Over how many tokens the gradient of one query's output spreads, in the encoder's first
    layer: the exponential of the entropy of the norms' shares, as the mean over queries."""
    tokens = model.tokens(batch)
    features = tokens.features.detach().requires_grad_()
    memory = dataclasses.replace(tokens, features=features)
    places = token_centres(tokens.spatial_shapes, tokens.valid_ratios)
    queries = Queries(tokens.features.detach(), tokens.position, places)
    output = model.encoder.layers[0].attention.attend(queries, memory)
    found = []
    for chosen in torch.randperm(output.shape[1])[:QUERIES]:
        scalar = (output[:, chosen] * torch.randn(output.shape[-1])).sum()
        (gradient,) = torch.autograd.grad(scalar, features, retain_graph=True)
        found.append(effective(gradient.norm(dim=-1)))
    return torch.cat(found).mean().item()


def effective(sizes: Tensor) -> Tensor:
    """(B, S) to (B): how many equal parts would be spread as widely."""
    return torch.special.entr(sizes / sizes.sum(-1, keepdim=True)).sum(-1).exp()


ONE_MAP = ("model.num_levels=1", "model.refine=false", "model.two_stage=false")
TWO_MAPS = ("model.num_levels=2", "model.refine=false", "model.two_stage=false")
STUDY = Study(
    name="initialisation",
    question="over how many tokens attention and its gradient spread before training, at so many "
    "pixels of the image's side",
    configurations={
        "dense": Start("digits-detr", ()),
        "deformable, one map": Start("digits", ONE_MAP),
        "deformable, two maps": Start("digits", TWO_MAPS),
    },
    seeds=(0, 1, 2, 3, 4),
    trial=spread,
    usual=8,
)


def main() -> None:
    """The command."""
    run(("initialisation",))


if __name__ == "__main__":
    main()
