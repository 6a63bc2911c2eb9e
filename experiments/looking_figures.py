"""What `looking.py` says of what it gathered: figures beside controls, with intervals."""

import numpy as np
from digits import CHECKPOINTS, DATA, PACKAGES
from scipy.ndimage import gaussian_gradient_magnitude

from deformable_detr.layers.attention import MSDeformAttn
from deformable_detr.look.gradients import ITEMS
from deformable_detr.look.measures import regions
from deformable_detr.provenance import checksum, provenance

COMMAND, SEED = "python experiments/looking.py", 0
SIDE, STRIDE = 128, 4  # pixels, of the images and of a cell of the finest map
AREAS = {"small": (0, 16**2), "medium": (16**2, 36**2), "large": (36**2, np.inf)}  # the data's own
BORDER, EDGE = 0.2, 0.3  # half-sides, to both sides of an edge: of points, and of gradients
RESAMPLES = 1000  # of images, for the intervals
RINGS = np.linspace(0, 2, 21)  # distances from a box's centre, 1 at its edges

Groups = dict[str, np.ndarray]  # of rows, bool
Kind = tuple[np.ndarray, np.ndarray]  # points (N, P, 2) in pixels, weights (N, P), summing to one


class Gathered:
    """Rows of several arrays, gathered batch by batch."""

    def __init__(self) -> None:
        self.parts: dict[str, list[np.ndarray]] = {}

    def add(self, **arrays: np.ndarray) -> None:
        """One part of each."""
        for name, array in arrays.items():
            self.parts.setdefault(name, []).append(array)

    def __getitem__(self, name: str) -> np.ndarray:
        return np.concatenate(self.parts[name])


def measure(found: Gathered, tokens: Gathered, gradients: Gathered, ranks: np.ndarray) -> dict:
    """All figures, with what they mean."""
    about = provenance(COMMAND, PACKAGES, SEED, DATA)
    about |= {"weights": checksum(CHECKPOINTS / "digits.safetensors")}
    return about | {
        "figures": "mean, and bounds of its 95 % interval over images drawn again",
        "border": BORDER,
        "edge": EDGE,
        "areas": {
            name: [low, None if high == np.inf else high] for name, (low, high) in AREAS.items()
        },
        "distances": RINGS.round(2).tolist(),
        "decoder": decoder(found, ranks),
        "encoder": encoder(tokens, ranks),
        "gradient": gradient(gradients),
    }


def edge_ranks(dataset: object) -> np.ndarray:
    """(images, SIDE, SIDE): the rank of each pixel among its image's, in [0, 1], by the size of the
    brightness's slope; 0.5 in the mean."""
    ranks = []
    for image_id in dataset.image_ids:
        grey = np.asarray(dataset.load_image(image_id), float).mean(-1)
        slope = gaussian_gradient_magnitude(grey, 1).ravel()
        rank = np.empty(len(slope))
        rank[slope.argsort(kind="stable")] = np.arange(len(slope)) / (len(slope) - 1)
        ranks.append(rank.reshape(grey.shape))
    return np.stack(ranks)


def mean_rank(
    ranks: np.ndarray, images: np.ndarray, points: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """(N,), weighted, of points (N, P, 2) that lie in the picture; NaN where none does."""
    x, y = np.floor(points).astype(int).transpose(2, 0, 1)
    there = (x >= 0) & (x < SIDE) & (y >= 0) & (y < SIDE)
    found = ranks[images[:, None], y.clip(0, SIDE - 1), x.clip(0, SIDE - 1)]
    weights = weights * there
    with np.errstate(invalid="ignore"):
        return (found * weights).sum(1) / weights.sum(1)


def distance(points: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """(N, P): of points (N, P, 2) from the centres of boxes (N, 4), 1 at the edges."""
    centre, half = middles(boxes)
    return np.abs((points - centre) / half).max(-1)


def middles(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centres and half-sides of boxes (N, 4), (N, 1, 2) each."""
    low, high = boxes[:, None, :2], boxes[:, None, 2:]
    return (low + high) / 2, (high - low) / 2


def sizes_of(boxes: np.ndarray) -> Groups:
    """Which of the boxes (N, 4) are small, medium and large, and all of those with a size."""
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return {"all": area > 0} | {
        name: (area > 0) & (area >= low) & (area < high) for name, (low, high) in AREAS.items()
    }


def interval(values: np.ndarray, images: np.ndarray) -> list[float] | None:
    """The mean, and the bounds of its 95 % interval when images are drawn again."""
    known = np.isfinite(values)
    if not known.any():
        return None
    _, index = np.unique(images[known], return_inverse=True)
    sums, counts = np.bincount(index, values[known]), np.bincount(index)
    drawn = np.random.default_rng(SEED).multinomial(
        len(counts), np.full(len(counts), 1 / len(counts)), RESAMPLES
    )
    means = drawn @ sums / (drawn @ counts)
    low, high = np.quantile(means, (0.025, 0.975))
    return [round(float(x), 4) for x in (values[known].mean(), low, high)]


def borrowed(groups: Groups, images: np.ndarray) -> np.ndarray:
    """(N,), for each row another one of its group, of another image where there is one."""
    rng, lender = np.random.default_rng(SEED), np.arange(len(images))
    for name in (name for name in groups if name != "all"):
        rows = np.flatnonzero(groups[name])
        lender[rows] = rng.permutation(rows)
        for _ in range(100):
            same = rows[images[lender[rows]] == images[rows]]
            if not len(same):
                break
            lender[same] = rng.choice(rows, len(same))
    return lender


def summarise(measured: dict[str, np.ndarray], images: np.ndarray, groups: Groups) -> dict:
    """For each group of rows: the mean of each kind with its interval, and by how much "own"
    exceeds the others, pair by pair."""
    return {
        group: {name: interval(values[rows], images[rows]) for name, values in measured.items()}
        | {
            f"own minus {name}": interval((measured["own"] - values)[rows], images[rows])
            for name, values in measured.items()
            if name != "own"
        }
        for group, rows in groups.items()
    }


def star(heads: int, levels: int, points: int) -> np.ndarray:
    """(M, L, K, 2): the offsets of attention that has learned nothing, in cells or, divided by K,
    in half-sides of a box."""
    fresh = MSDeformAttn(8 * heads, levels, heads, points)
    return fresh.sampling_offsets.bias.detach().view(heads, levels, points, 2).numpy()


def decoder(found: Gathered, ranks: np.ndarray) -> dict:
    """Of each layer: weight inside the box that was found, at its border, and on edges of the
    picture, beside that of controls."""
    groups = sizes_of(found["box"])
    layers = range(found["weights"].shape[1])
    return {
        "detections": counts(groups),
        "layers": [decoder_layer(found, ranks, groups, layer) for layer in layers],
    }


def decoder_layer(found: Gathered, ranks: np.ndarray, groups: Groups, layer: int) -> dict:
    """One of them."""
    images, boxes, weights = found["image"], found["box"], found["weights"][:, layer]
    kinds = decoder_kinds(found, groups, layer)
    inside, border, edges = {}, {}, {}
    for name, (where, weight) in kinds.items():
        far = distance(where, boxes)
        inside[name] = (weight * (far <= 1)).sum(1)
        border[name] = (weight * (np.abs(far - 1) <= BORDER)).sum(1)
        edges[name] = mean_rank(ranks, images, where, weight)
    centre, half = middles(boxes)
    grid = np.stack(np.meshgrid(*[np.linspace(-0.95, 0.95, 12)] * 2), -1).reshape(1, -1, 2)
    everywhere = grid * half + centre
    edges["all of the box"] = mean_rank(ranks, images, everywhere, np.ones(everywhere.shape[:2]))
    rings = {}
    for name, kind in (("weight", "own"), ("points", "unweighted")):
        where, weight = kinds[kind]
        rings[name] = np.histogram(distance(where, boxes), RINGS, weights=weight)[0] / len(boxes)
    return {
        "inside": summarise(inside, images, groups),
        "border": summarise(border, images, groups),
        "edge rank": summarise(edges, images, groups),
        **{f"{name} by distance": rounded(ring) for name, ring in rings.items()},
        **at_border(distance(kinds["own"][0], boxes).reshape(weights.shape), weights),
    }


def decoder_kinds(found: Gathered, groups: Groups, layer: int) -> dict[str, Kind]:
    """A layer's points and weights, and those of controls: equal weights; the pattern of another
    detection of this size around the own reference; that of a layer that has learned nothing."""
    N, _, M, L, K = found["weights"].shape
    reference = found["reference"][:, layer]
    centre, half = reference[:, None, :2], reference[:, None, 2:] / 2
    points = found["points"][:, layer].reshape(N, -1, 2)
    weights = found["weights"][:, layer].reshape(N, -1) / M
    equal = np.full_like(weights, 1 / weights.shape[1])
    lender = borrowed(groups, found["image"])
    first = star(M, L, K).reshape(1, -1, 2) / K
    return {
        "own": (points, weights),
        "unweighted": (points, equal),
        "borrowed": (((points - centre) / half)[lender] * half + centre, weights[lender]),
        "untrained": (first * half + centre, equal),
    }


def at_border(far: np.ndarray, weights: np.ndarray) -> dict:
    """By head and by level, distances and weights (N, M, L, K): the part of the weight that each
    has, and the part of this that lies at the border."""
    at = weights * (np.abs(far - 1) <= BORDER)
    result = {}
    for name, other in (("heads", (2, 3)), ("levels", (1, 3))):
        whole = weights.sum(other).mean(0)  # of each head or level
        part = at.sum(other).mean(0) / whole
        result[f"weight of {name}"] = rounded(whole / whole.sum())
        result[f"border of {name}"] = rounded(part)
    return result


def encoder(tokens: Gathered, ranks: np.ndarray) -> dict:
    """Of each layer: weight that stays in the object on which a token lies, and on edges of the
    picture; how far it reaches; beside that of controls."""
    images, boxes, groups = tokens["image"], tokens["box"], sizes_of(tokens["box"])
    objects = dict(groups)
    groups["background"] = ~groups["all"]
    result = []
    for layer in range(tokens["weights"].shape[1]):
        kinds = encoder_kinds(tokens, groups, layer)
        stays, edges = {}, {}
        for name, (where, weight) in kinds.items():
            with np.errstate(divide="ignore", invalid="ignore"):  # of boxes without a size
                stays[name] = (weight * (distance(where, boxes) <= 1)).sum(1)
            edges[name] = mean_rank(ranks, images, where, weight)
        points, weights = kinds["own"]
        arrows = points - tokens["reference"][:, layer, None]
        reach = {"own": (weights * np.hypot(*arrows.transpose(2, 0, 1))).sum(1)}
        result.append(
            {
                "stays in the object": summarise(stays, images, objects),
                "edge rank": summarise(edges, images, groups),
                "mean distance in pixels": summarise(reach, images, groups),
            }
        )
    return {"tokens": counts(groups), "layers": result}


def encoder_kinds(tokens: Gathered, groups: Groups, layer: int) -> dict[str, Kind]:
    """A layer's points and weights, and those of controls: equal weights; all turned by a random
    angle around the token; the pattern of another token on an object of this size; that of a layer
    that has learned nothing."""
    N, _, M, L, K = tokens["weights"].shape
    centre = tokens["reference"][:, layer, None]
    points = tokens["points"][:, layer].reshape(N, -1, 2)
    weights = tokens["weights"][:, layer].reshape(N, -1) / M
    arrows, equal = points - centre, np.full_like(weights, 1 / weights.shape[1])
    angle = np.random.default_rng(SEED).uniform(0, 2 * np.pi, N)
    turn = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], -1)
    turned = np.einsum("nij,npj->npi", turn.reshape(N, 2, 2), arrows)
    lender = borrowed(groups, tokens["image"])
    first = star(M, L, K) * STRIDE * 2 ** np.arange(L)[:, None, None]  # from cells to pixels
    return {
        "own": (points, weights),
        "unweighted": (points, equal),
        "turned": (turned + centre, weights),
        "borrowed": (arrows[lender] + centre, weights[lender]),
        "untrained": (first.reshape(1, -1, 2) + centre, equal),
    }


def gradient(gradients: Gathered) -> dict:
    """For each item: the share of its gradient's energy in each region of the box that was found,
    beside the region's share of the picture and that of another detection's energy; and how much
    denser it is at the sides than at the ends."""
    images, groups = gradients["image"], sizes_of(gradients["box"])
    parts = box_parts(gradients["box"])
    items = {}
    for i, item in enumerate(ITEMS):
        energy = gradients["energy"][:, i]
        energy = energy / energy.sum((1, 2), keepdims=True)
        items[item] = {}
        for name, part in parts.items():
            measured = {
                "own": (energy * part).sum((1, 2)),
                "area": part.mean((1, 2)),
                "another's": (np.roll(energy, 1, 0) * part).sum((1, 2)),
            }
            items[item][name] = summarise(measured, images, groups)
        with np.errstate(divide="ignore", invalid="ignore"):  # a region may be empty
            sides, ends = (
                (energy * parts[name]).sum((1, 2)) / parts[name].sum((1, 2))
                for name in ("sides", "ends")
            )
            ratio = np.log(sides / ends)
        bounds = {name: interval(ratio[rows], images[rows]) for name, rows in groups.items()}
        items[item]["sides to ends"] = {
            name: known and rounded(np.exp(known)) for name, known in bounds.items()
        }
    return {"detections": counts(groups), "items": items}


def box_parts(boxes: np.ndarray) -> dict[str, np.ndarray]:
    """Which pixels lie in each region of boxes (N, 4), (N, SIDE, SIDE): inside, the sides and the
    ends, both of these as the border, and what is farther in or out than this."""
    place = np.arange(SIDE) + 0.5
    x, y, box = place[None, None, :], place[None, :, None], boxes.T[:, :, None, None]
    parts = regions(x, y, box, EDGE)
    parts["border"] = parts["sides"] | parts["ends"]
    parts["middle"] = parts["inside"] & ~parts["border"]
    return parts | {"farther": ~parts["inside"] & ~parts["border"]}


def rounded(values: np.ndarray) -> list[float]:
    """To four digits."""
    return np.asarray(values, float).round(4).tolist()


def counts(groups: Groups) -> dict[str, int]:
    """How many rows a group has."""
    return {name: int(rows.sum()) for name, rows in groups.items()}
