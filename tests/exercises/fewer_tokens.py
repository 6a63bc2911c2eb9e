"""Checkers of chapter fewer_tokens, "Fewer tokens"."""

import torch

from deformable_detr import ms_deform_attn
from deformable_detr.exercises import checks, expect
from deformable_detr.ops.reference import sample_levels


def _target(
    read, absent, rho, of_all=False, one_more=True, padding_too=False, relative=False, blank=-1
):
    """The target with one thing wrong, or none."""
    wanted = torch.zeros_like(read)
    for row, was_read, padding in zip(wanted, read, absent, strict=True):
        n = len(row) if of_all else int((~padding).sum())
        keep = min(int(n * rho) + one_more, int((~padding).sum()))
        was_read = was_read if padding_too else was_read.masked_fill(padding, blank)
        if relative:
            row[was_read > rho * was_read.max()] = 1
        else:
            row[was_read.topk(keep).indices] = 1
    return wanted


@checks("fewer_tokens.1")
def check_target(target):
    read, nobody = torch.rand(2, 20), torch.zeros(2, 20, dtype=torch.bool)
    yield "pictures without padding"
    given = target(read, nobody, 0.3)
    expect(tuple(given.shape), (2, 20))
    expect(given.sum(1), torch.tensor([7, 7]), "int(20 * 0.3) + 1 of 20")
    expect(given, _target(read, nobody, 0.3), "those that are read most")
    yield "padding"
    absent = nobody.clone()
    absent[1, 10:] = True
    read[1, 12] = 5.0  # no decoder reads padding, but the function must not rely on it
    given = target(read, absent, 0.3)
    expect(given.sum(1), torch.tensor([7, 4]), "a share of the tokens that are not padding")
    expect(given, _target(read, absent, 0.3), "padding is never kept")
    yield "all of them"
    expect(target(read, absent, 1.0), (~absent).float(), "not more than there are")
    yield "padding comes after tokens that nobody read"
    absent[1] = torch.arange(20) % 2 == 0
    expect(target(0 * read, absent, 1.0), (~absent).float(), "a token may have been read 0")


def _updates(sizes, layers, block, fine_levels, first=False, last=True, one_fine=False):
    everyone, coarse = sum(sizes), sum(sizes[1 if one_fine else fine_levels :])
    start = 0 if first else 1
    whole = [(i + start) % block == 0 or (last and i + 1 == layers) for i in range(layers)]
    return sum(everyone if w else coarse for w in whole) / (layers * everyone)


@checks("fewer_tokens.2")
def check_updates(updates):
    yield "the dense encoder"
    expect(updates([12, 3, 1], 6, 1, 1), 1.0, "blocks of one layer")
    yield "blocks of two, and of six"
    expect(updates([12, 3, 1], 6, 2, 1), (3 * 4 + 3 * 16) / 96, "three layers update 4 of 16")
    expect(updates([12, 3, 1], 6, 6, 1), (5 * 4 + 16) / 96, "the last of six layers updates all")
    yield "two fine levels"
    expect(updates([12, 3, 1], 6, 3, 2), (4 * 1 + 2 * 16) / 96, "sizes[fine_levels:] are coarse")
    yield "a last block that is shorter"
    expect(updates([12, 3, 1], 5, 2, 1), (2 * 4 + 3 * 16) / 80, "the last layer is always whole")


def _weights(scale=None, axes=3, stretch=1.0, ignore_outside=False):
    """Key-aware weights from a tensor of samples, with one thing wrong, or none."""

    def key_aware_weights(asked, value, shapes, places):
        samples = sample_levels(value, shapes, places)
        B, Q, M, D = asked.shape
        products = (samples * asked.reshape(B, Q, M, 1, 1, D)).sum(-1)
        products = products / ((scale or (lambda m, d: d))(M, D) ** 0.5) * stretch
        if ignore_outside:
            products = products.masked_fill((samples == 0).all(-1), -1e9)
        return products.flatten(axes).softmax(-1).view_as(products)

    return key_aware_weights


@checks("fewer_tokens.3")
def check_key_aware_weights(key_aware_weights):
    def both(shapes, low, high):
        S, L = sum(h * w for h, w in shapes), len(shapes)
        arguments = (
            torch.randn(2, 5, 3, 4),
            torch.randn(2, S, 3, 4),
            shapes,
            torch.rand(2, 5, 3, L, 2, 2) * (high - low) + low,
        )
        return key_aware_weights(*arguments), _weights()(*arguments)

    yield "one level, samples inside"
    given, expected = both([(4, 6)], 0.2, 0.8)
    expect(tuple(given.shape), (2, 5, 3, 1, 2))
    expect(given, expected, "products with the samples, over the root of D", atol=1e-4)
    yield "several levels"
    given, expected = both([(4, 6), (2, 3)], 0.2, 0.8)
    expect(given.sum((-2, -1)), torch.ones(2, 5, 3), "one softmax over levels and points")
    expect(given, expected, atol=1e-4)
    yield "samples outside"
    given, expected = both([(4, 6), (2, 3)], -1.0, 2.0)
    expect(given, expected, "a key of zeros has the product 0, and takes part", atol=1e-4)


def _products(asked, value, shapes, places):
    weights = torch.zeros(places.shape[:-1], requires_grad=True)
    result = ms_deform_attn(value, shapes, places, weights)
    return torch.autograd.grad(result, weights, asked.flatten(2) / value.shape[-1] ** 0.5)[0]


WRONG = {
    "fewer_tokens.1": [
        ("a share of all tokens", lambda r, a, rho: _target(r, a, rho, of_all=True)),
        ("one too few", lambda r, a, rho: _target(r, a, rho, one_more=False)),
        ("padding kept", lambda r, a, rho: _target(r, a, rho, padding_too=True)),
        ("padding as if it were read 0", lambda r, a, rho: _target(r, a, rho, blank=0)),
        ("a threshold in place of a number", lambda r, a, rho: _target(r, a, rho, relative=True)),
    ],
    "fewer_tokens.2": [
        ("the first layer of a block, and the last of all", lambda *a: _updates(*a, first=True)),
        ("a last layer that is not whole", lambda *a: _updates(*a, last=False)),
        ("always one fine level", lambda *a: _updates(*a, one_fine=True)),
        ("the number of updates", lambda s, n, *a: _updates(s, n, *a) * n * sum(s)),
    ],
    "fewer_tokens.3": [
        ("products without a softmax", _products),
        ("over the root of C", _weights(lambda m, d: m * d)),
        ("not divided", _weights(lambda m, d: 1)),
        ("a softmax per level", _weights(axes=4)),
        ("samples outside left out", _weights(ignore_outside=True)),
    ],
}
