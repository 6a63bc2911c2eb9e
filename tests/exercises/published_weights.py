"""Checkers of chapter published_weights, "Published weights"."""

import math
from collections import Counter

import torch

from deformable_detr.exercises import checks, expect

NAMES = {
    "transformer.encoder.layers.3.linear1.bias": "encoder.layers.3.ffn.linear1.bias",
    "transformer.encoder.layers.0.linear2.weight": "encoder.layers.0.ffn.linear2.weight",
    "transformer.encoder.layers.12.norm1.weight": "encoder.layers.12.norm.weight",
    "transformer.encoder.layers.5.norm2.bias": "encoder.layers.5.ffn.norm.bias",
    "transformer.encoder.layers.1.self_attn.value_proj.weight": (
        "encoder.layers.1.attention.value_proj.weight"
    ),
}
STRANGERS = (
    "transformer.decoder.layers.0.norm1.weight",
    "transformer.encoder.layers.0.linear3.weight",
    "encoder.layers.0.norm1.weight",
    "transformer.encoder.layers.0.norm10.weight",
    "transformer.level_embed",
)


@checks("published_weights.1")
def check_our_name(our_name):
    yield "the five parts of a layer"
    for official, ours in NAMES.items():
        expect(our_name(official), ours, "norm2 belongs to the feed-forward part")
    yield "strangers are refused"
    for name in STRANGERS:
        try:
            given = our_name(name)
        except ValueError:
            continue
        raise AssertionError(f"{name} is no tensor of an encoder layer, and became {given}")


@checks("published_weights.2")
def check_first_difference(first_difference):
    names = ("stem", "layer1", "layer2", "head")
    one = {name: torch.randn(3, 4) for name in names}
    other = {name: tensor + 1e-7 for name, tensor in one.items()}
    yield "equal, and different from a layer on"
    expect(first_difference(one, other), None, "a difference of 1e-7 is rounding")
    for name in names[2:]:
        other[name] = other[name] + 1
    expect(first_difference(one, other), "layer2", "the first, not the largest")
    yield "the same numbers in another order, and another tolerance"
    flipped = one | {"layer1": one["layer1"].flip(0)}
    expect(first_difference(one, flipped), "layer1", "compare number by number")
    one_off = one["layer1"].clone()
    one_off[1, 2] += 1e-3
    expect(first_difference(one, one | {"layer1": one_off}), "layer1", "one number is enough")
    near = {name: tensor + 1e-2 for name, tensor in one.items()}
    expect(first_difference(one, near, tolerance=0.1), None, "the tolerance is an argument")
    large = {"stem": torch.tensor([1000.0])}
    expect(first_difference(large, {"stem": torch.tensor([1000.01])}), "stem", "not relative")
    yield "not a number"
    other["layer1"] = torch.full((3, 4), torch.nan)
    expect(first_difference(one, other), "layer1", "a comparison with NaN is False")


@checks("published_weights.3")
def check_survivors(survivors):
    published = {"b": torch.zeros(3), "a": torch.zeros(4, 6), "gone": torch.zeros(2)}
    yield "names and shapes"
    wanted = {"b": torch.zeros(3), "a": torch.zeros(4, 6), "new": torch.zeros(2)}
    expect(survivors(published, wanted), ["a", "b"], "the same name, sorted")
    yield "as many numbers in another shape"
    expect(survivors(published, {"a": torch.zeros(6, 4), "b": torch.zeros(1, 3)}), [])
    yield "every axis counts"
    for other in (torch.zeros(5, 6), torch.zeros(4, 7)):
        expect(survivors(published, {"a": other}), [], "compare whole shapes")


def _replaced(official):
    name = official.removeprefix("transformer.").replace("self_attn", "attention")
    for theirs, ours in (("norm1", "norm"), ("norm2", "ffn.norm"), ("linear", "ffn.linear")):
        name = name.replace(theirs, ours)
    return name


def _first(mine, theirs, tolerance=1e-4):
    differences = ((name, (x - theirs[name]).abs().max()) for name, x in mine.items())
    return next((name for name, difference in differences if difference > tolerance), None)


def _means(mine, theirs, tolerance=1e-4):
    pairs = ((name, (x - theirs[name]).abs().mean()) for name, x in mine.items())
    return next((name for name, difference in pairs if not difference <= tolerance), None)


def _relative(mine, theirs, tolerance=1e-4):
    close = {n: torch.allclose(x, theirs[n], atol=tolerance, rtol=1e-4) for n, x in mine.items()}
    return next((name for name, same in close.items() if not same), None)


def _sums(mine, theirs, tolerance=1e-4):
    pairs = ((name, (x.sum() - theirs[name].sum()).abs()) for name, x in mine.items())
    return next((name for name, difference in pairs if not difference <= tolerance), None)


def _largest(mine, theirs, tolerance=1e-4):
    worst = max(mine, key=lambda name: (mine[name] - theirs[name]).abs().max())
    return worst if (mine[worst] - theirs[worst]).abs().max() > tolerance else None


def _prefix_checked(official):
    if not official.startswith("transformer.encoder.layers") or "linear3" in official:
        raise ValueError(official)
    return _replaced(official)


def _state():
    """A state dict with a part of each kind."""
    return {
        "head.weight": torch.ones(3, 4),
        "head.bias": torch.zeros(3),
        "backbone.conv.weight": torch.randn(5, 2, 3, 3),
        "backbone.norm.batches": torch.tensor(7),
    }


@checks("published_weights.4")
def check_card_of(card_of):
    yield "a sound file"
    card = card_of(_state())
    expect(card["parameters"], 3 * 4 + 3 + 5 * 2 * 9, "floating-point tensors only")
    expect(list(card["parts"].items()), [("backbone", 90), ("head", 15)], "the largest first")
    expect(card["odd"], [], "a bias of zeros is usual")
    yield "what is not a number, not finite, or zero everywhere"
    state = _state() | {"neck.weight": torch.zeros(2, 2), "a.bias": torch.tensor([0.0, math.nan])}
    state["head.weight"] = torch.tensor([[1.0, math.inf]])
    expect(card_of(state)["odd"], ["a.bias", "head.weight", "neck.weight"])


def _card(integers=False, biases=False, infinite=True, largest=True):
    def card_of(state):
        chosen = {n: x for n, x in state.items() if integers or x.is_floating_point()}
        parts = Counter()
        for name, tensor in chosen.items():
            parts[name.split(".")[0]] += tensor.numel()
        bad = {n for n, x in chosen.items() if x.isnan().any() or (infinite and x.isinf().any())}
        bad |= {n for n, x in chosen.items() if (biases or x.dim() > 1) and not x.any()}
        order = parts.most_common() if largest else sorted(parts.items(), reverse=True)
        return {"parameters": parts.total(), "parts": dict(order), "odd": sorted(bad)}

    return card_of


WRONG = {
    "published_weights.1": [
        ("only the start is looked at", _prefix_checked),
        ("a chain of replace", _replaced),
        (
            "norm2 outside the feed-forward part",
            lambda n: _replaced(n).replace("ffn.norm", "norm2"),
        ),
    ],
    "published_weights.2": [
        ("blind to NaN", _first),
        ("the largest difference", _largest),
        ("sums compared", _sums),
        ("means of differences compared", _means),
        ("a relative tolerance", _relative),
    ],
    "published_weights.3": [
        (
            "as many elements",
            lambda a, b: sorted(n for n in b if n in a and a[n].numel() == b[n].numel()),
        ),
        (
            "the first axis not compared",
            lambda a, b: sorted(n for n in b if n in a and a[n].shape[1:] == b[n].shape[1:]),
        ),
        (
            "not sorted",
            lambda a, b: [n for n in a if n in b and a[n].shape == b[n].shape],
        ),
        ("names only", lambda a, b: sorted(set(a) & set(b))),
    ],
    "published_weights.4": [
        ("integers count", _card(integers=True)),
        ("zero biases are odd", _card(biases=True)),
        ("infinities pass", _card(infinite=False)),
        ("ordered by name", _card(largest=False)),
    ],
}
