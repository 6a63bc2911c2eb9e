"""How much of attention and of gradients lies in a box and at its edges. Chapter looking."""

import numpy as np

from deformable_detr.look.explanation import Explanation

EDGE = 0.3  # half-sides of a box, to both sides of an edge: what counts as at it
REGIONS = ("inside", "sides", "ends")


def regions(
    x: np.ndarray, y: np.ndarray, box: np.ndarray, edge: float = EDGE
) -> dict[str, np.ndarray]:
    """Which places lie in a box, at its left and right edges (sides) and at its top and bottom
    (ends), all bool; x, y: any shape, in the units of the box, (4,) xyxy.

    edge: half-sides, to both sides of an edge. So half of that band is inside too. A corner is
    parted along its diagonal.
    """
    x0, y0, x1, y1 = box
    u = np.abs(x - (x0 + x1) / 2) / ((x1 - x0) / 2)  # 1 at the left and the right edge
    v = np.abs(y - (y0 + y1) / 2) / ((y1 - y0) / 2)
    farthest = np.maximum(u, v)
    at_edge = np.abs(farthest - 1) <= edge
    return {"inside": farthest <= 1, "sides": at_edge & (u >= v), "ends": at_edge & (u < v)}


def weight_shares(seen: Explanation, layer: int = -1) -> dict[str, float]:
    """The share of a layer's attention weight, over all heads, in each of REGIONS of its box."""
    weights = seen.weights[layer]
    found = regions(seen.points[layer, ..., 0], seen.points[layer, ..., 1], seen.box)
    return {name: share(weights, region) for name, region in found.items()}


def energy_shares(seen: Explanation) -> dict[str, dict[str, float]]:
    """For each item the share of its gradient's energy, the squared norm, in each of REGIONS; and
    as "area" those of the picture itself."""
    h, w = seen.gradients["score"].shape
    x, y = (np.arange(w) + 0.5) * seen.image.width / w, (np.arange(h) + 0.5) * seen.image.height / h
    found = regions(*np.meshgrid(x, y), seen.box)
    energies = {name: np.square(norm) for name, norm in seen.gradients.items()}
    energies["area"] = np.ones((h, w))
    return {
        item: {name: share(energy, region) for name, region in found.items()}
        for item, energy in energies.items()
    }


def share(amounts: np.ndarray, region: np.ndarray) -> float:
    """The part of the amounts that lies in a region, in [0, 1]; NaN where all are zero."""
    total = amounts.sum()
    return float((amounts * region).sum() / total) if total else float("nan")
