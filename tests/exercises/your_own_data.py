"""Checkers of chapter your_own_data, "Your own data"."""

import random

import numpy as np

from deformable_detr import DeformableDETR, DeformableDETRConfig
from deformable_detr.exercises import checks, expect

SMALL = DeformableDETRConfig(
    num_classes=3,
    num_queries=4,
    backbone="small",
    num_levels=2,
    embed_dim=32,
    num_heads=2,
    num_points=2,
    encoder_layers=1,
    decoder_layers=2,
    ffn_dim=32,
    refine=True,
)


def _split(groups, share=0.2, seed=0, images=False, count_groups=False, ordered=True, val=True):
    """As the text asks; the switches make wrong answers."""
    order = sorted(set(groups)) if ordered else list(dict.fromkeys(groups))
    if images:
        order = list(range(len(groups)))
    random.Random(seed).shuffle(order)
    parts = {"test": [], "val": [], "train": []}
    used = {"test": 0, "val": 0}
    for group in order:
        found = [group] if images else [i for i, own in enumerate(groups) if own == group]
        whole = len(order) if count_groups else len(groups)
        size = {n: used[n] if count_groups else len(parts[n]) for n in used}
        wanting = [n for n in ("test", "val")[: 1 + val] if size[n] < share * whole]
        name = wanting[0] if wanting else "train"
        parts[name] += found
        if name in used:
            used[name] += 1
    return tuple(sorted(parts[name]) for name in ("train", "val", "test"))


@checks("your_own_data.1")
def check_split_by_group(split_by_group):
    groups = ["b", "a", "c", "a", "d", "b", "e", "f", "g", "h"]
    yield "every image is in exactly one split"
    parts = split_by_group(groups)
    expect(sorted(i for part in parts for i in part), list(range(10)))
    yield "no group is in two splits"
    for seed in range(5):
        parts = split_by_group(groups, seed=seed)
        names = [{groups[i] for i in part} for part in parts]
        shared = names[0] & names[1] | names[0] & names[2] | names[1] & names[2]
        expect(shared, set(), f"seed {seed}: deal out groups, not images")
    yield "test and val have at least their share, and train the rest"
    crowd = ["large"] * 30 + [f"small {i}" for i in range(20)]
    for seed in range(6):
        for share in (0.1, 0.3):
            given = [list(part) for part in split_by_group(crowd, share, seed)]
            hint = "sorted groups, Random(seed).shuffle, then test, val and train; count images"
            expect(given, [list(part) for part in _split(crowd, share, seed)], hint)
    yield "the order in which images come does not matter for groups"
    given = [list(part) for part in split_by_group(groups[::-1], 0.2, 3)]
    expect(given, [list(part) for part in _split(groups[::-1], 0.2, 3)], "sort the groups first")


@checks("your_own_data.2")
def check_looks_like_corners(looks_like_corners):
    corners = np.array([[10, 20, 60, 50], [70, 5, 95, 30], [40, 40, 90, 60]])
    sizes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
    yield "corners, and sizes"
    expect(looks_like_corners(corners, 100, 64), True, "40 + 90 is more than the width")
    expect(looks_like_corners(sizes, 100, 64), False, "right must be more than left")
    yield "boxes that fit both readings"
    expect(
        looks_like_corners(np.array([[2, 3, 10, 12]]), 100, 64), False, "sizes unless impossible"
    )
    yield "heights, one box of many, and the order of corners"
    many = np.array([[5, 40, 20, 60], [2, 3, 10, 12]])
    expect(looks_like_corners(many, 100, 64), True, "40 + 60 is above the height; one is enough")
    expect(looks_like_corners(np.array([[60, 20, 45, 30]]), 100, 64), False, "right > left")
    expect(looks_like_corners(np.array([[10, 50, 45, 30]]), 100, 64), False, "bottom > top")
    yield "boxes that touch the border, and boxes without width"
    expect(looks_like_corners(np.array([[40, 10, 60, 50]]), 100, 64), False, "40 + 60 is 100")
    expect(looks_like_corners(np.array([[60, 20, 60, 30]]), 100, 64), False, "right > left")
    expect(looks_like_corners(np.array([[40, 10, 100, 64]]), 100, 64), True, "right may be 100")
    yield "boxes that fit neither"
    outside = np.array([[10, 20, 60, 50], [90, 50, 120, 80]])
    expect(looks_like_corners(outside, 100, 64), False, "corners must lie inside, all of them")


@checks("your_own_data.3")
def check_train_heads_only(train_heads_only):
    model = DeformableDETR(SMALL)
    names = [name for name, _ in model.named_parameters()]
    learning = lambda: [name for name, p in model.named_parameters() if p.requires_grad]  # noqa: E731
    yield "the class heads"
    wanted = sorted(name for name in names if name.startswith("class_heads"))
    expect(sorted(train_heads_only(model)), wanted)
    hint = "the number that learn; requires_grad of all others must be off"
    expect(len(learning()), len(wanted), hint)
    expect(sorted(learning()), wanted)
    yield "box heads too, called again"
    wanted = sorted(name for name in names if name.startswith(("class_heads", "box_heads")))
    expect(sorted(train_heads_only(model, boxes=True)), wanted)
    hint = "the number that learn; a parameter that was off must be switched on again"
    expect(len(learning()), len(wanted), hint)
    expect(sorted(learning()), wanted)


@checks("your_own_data.4")
def check_kind_of_error(kind_of_error):
    def kind(overlaps, label, labels):
        return kind_of_error(np.array(overlaps, float), label, np.array(labels, int))

    yield "one object"
    for overlap, label, wanted in (
        (0.8, 1, "found"),
        (0.8, 2, "class"),
        (0.5, 1, "found"),
        (0.5, 2, "class"),
        (0.3, 1, "place"),
        (0.1, 1, "place"),
        (0.3, 2, "background"),
        (0.05, 1, "background"),
    ):
        expect(kind([overlap], label, [1]), wanted, f"overlap {overlap}")
    yield "several objects"
    expect(kind([0.7, 0.55], 1, [2, 1]), "found", "the best overlap may be another class's")
    expect(kind([0.6, 0.2], 1, [2, 1]), "class", "class comes before place")
    expect(kind([0.3, 0.2], 1, [2, 1]), "place", "look at all objects of the class")
    yield "an image without objects"
    expect(kind([], 1, []), "background")


def _heads(reset):
    def train_heads_only(model, boxes=False):
        wanted = ("class_heads", "box_heads") if boxes else ("class_heads",)
        for name, parameter in model.named_parameters():
            if reset and not name.startswith(wanted):
                parameter.requires_grad_(False)
        return sorted(name for name, _ in model.named_parameters() if name.startswith(wanted))

    return train_heads_only


def _best_object_only(overlaps, label, labels):
    if len(overlaps) == 0:
        return "background"
    best = int(np.argmax(overlaps))
    same, overlap = labels[best] == label, overlaps[best]
    if overlap >= 0.5:
        return "found" if same else "class"
    return "place" if overlap >= 0.1 and same else "background"


def _best_object_for_place(overlaps, label, labels):
    overlaps, labels = np.asarray(overlaps, float), np.asarray(labels)
    if (overlaps[labels == label] >= 0.5).any():
        return "found"
    if (overlaps[labels != label] >= 0.5).any():
        return "class"
    if len(overlaps) and overlaps.max() >= 0.1 and labels[overlaps.argmax()] == label:
        return "place"
    return "background"


def _corners(boxes, width, height, beyond=np.greater, ordered=np.greater):
    left, top, third, fourth = boxes.T
    inside = (third <= width).all() and (fourth <= height).all()
    as_corners = inside and ordered(third, left).all() and ordered(fourth, top).all()
    too_large = beyond(left + third, width).any() or beyond(top + fourth, height).any()
    return bool(as_corners and too_large)


WRONG = {
    "your_own_data.1": [
        ("images dealt out", lambda g, share=0.2, seed=0: _split(g, share, seed, images=True)),
        ("groups counted", lambda g, share=0.2, seed=0: _split(g, share, seed, count_groups=True)),
        ("no val", lambda g, share=0.2, seed=0: _split(g, share, seed, val=False)),
        ("groups as they come", lambda g, share=0.2, seed=0: _split(g, share, seed, ordered=False)),
    ],
    "your_own_data.2": [
        ("no size may touch the border", lambda *a: _corners(*a, beyond=np.greater_equal)),
        ("corners without width", lambda *a: _corners(*a, ordered=np.greater_equal)),
        (
            "any box that leaves the image as a size",
            lambda b, w, h: bool((b[:, 0] + b[:, 2] > w).any() or (b[:, 1] + b[:, 3] > h).any()),
        ),
        ("corners whenever right > left", lambda b, w, h: bool((b[:, 2] > b[:, 0]).all())),
    ],
    "your_own_data.3": [
        ("nothing is frozen", _heads(reset=False)),
        ("never switched on again", _heads(reset=True)),
    ],
    "your_own_data.4": [
        ("only the object that overlaps most", _best_object_only),
        ("the same for place alone", _best_object_for_place),
        ("never background", lambda o, label, labels: "place" if len(o) else "background"),
    ],
}
