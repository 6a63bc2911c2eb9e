"""Checkers of chapter linear_really, "Linear, really?"."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deformable_detr.exercises import checks, expect


@checks("linear_really.1")
def check_bends_at(bends_at):
    yield "attention alone"
    for width in (64, 256):
        expect(float(bends_at(width, 0)), 2.0 * width, "four projections, of C x C each")
    yield "with a feed-forward network"
    expect(float(bends_at(64, 100)), 228.0, "its two matrices are C x F and F x C")
    expect(float(bends_at(256, 2048)), 2560.0)


@checks("linear_really.2")
def check_traffic(Traffic):
    def moved(call):
        with Traffic() as traffic:
            call()
        return traffic.moved

    a, b = torch.randn(3, 5), torch.randn(5, 7)
    yield "a product of two matrices"
    bytes_of_all = 4 * (3 * 5 + 5 * 7 + 3 * 7)
    expect(moved(lambda: a @ b), bytes_of_all, "two are read and one is written, 4 bytes each")
    yield "elements of other sizes, lists, and several results"
    expect(moved(lambda: a.double()), (4 + 8) * 15, "element_size() of each tensor")
    expect(moved(lambda: torch.cat([a, a])), 4 * 2 * (15 + 15), "tensors in a list")
    expect(moved(lambda: a.sort(dim=1)), (4 + 4 + 8) * 15, "sort returns values and indices")
    ordered, order = a.flatten().sort()
    look_up = {"sorter": order}  # a tensor among the keyword arguments
    found = moved(lambda: torch.searchsorted(ordered, ordered, **look_up))
    expect(found, (4 + 4 + 8 + 8) * 15, "tensors in kwargs are read too")
    yield "views move nothing"
    expect(moved(lambda: a.T), 0, "a transpose has the storage of what it was made of")
    expect(moved(lambda: a.view(15)[3:].view(4, 3)), 0)
    expect(moved(lambda: a.chunk(2, dim=1)), 0, "every one of several results is a view")
    yield "a part of a tensor"
    expect(moved(lambda: a[:2].exp()), 4 * (10 + 10), "what is read, not the whole storage")
    yield "several operators"
    expect(moved(lambda: (a.T.exp() + 1).sum()), 4 * (15 + 15) + 4 * (15 + 15) + 4 * (15 + 1))


@checks("linear_really.3")
def check_three_bills(three_bills):
    yield "one head"
    found = torch.tensor([float(n) for n in three_bills(2, 100, 3, 4, 1)])
    expected = torch.tensor([100 * 16 + 5 * 2 * 3 * 4, 5 * 2 * 3 * 4 + 2 * 3 * 16, 120 + 2 * 16.0])
    expect(found, expected, "S, N_q L K, and N_q products with the projection")
    yield "several heads"
    queries, points, C, M = 300, 16, 256, 8
    found = three_bills(queries, 13_400, points, C, M)
    expect(int(found[0]), 13_400 * C**2 + 5 * queries * points * C, "project first: 5LKC to read")
    read = 5 * queries * M * points * C
    expect(int(found[1]), read + queries * points * C**2, "each head reads all C channels")
    expect(int(found[2]), read + queries * C**2, "one sum per query and head is projected")
    yield "the map's size matters to the first order only"
    expect([int(n) for n in three_bills(queries, 1, points, C, M)[1:]], [int(n) for n in found[1:]])


def _traffic(
    size=lambda x: x.numel() * x.element_size(),
    views=False,
    lists=True,
    written=True,
    keywords=True,
):
    """The instrument with one thing wrong."""

    class Traffic(TorchDispatchMode):
        moved = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            leaves = tree_leaves((args, kwargs if keywords else {})) if lists else args
            read = [x for x in leaves if isinstance(x, torch.Tensor)]
            new = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
            given = {x.untyped_storage().data_ptr() for x in read}
            if views or any(x.untyped_storage().data_ptr() not in given for x in new):
                self.moved += sum(map(size, read + new * written))
            return result

    return Traffic


def _bills(read_all=True, split=False, per_head=False):
    def three_bills(queries, tokens, points, C, M):
        reading = 5 * queries * points * C
        later = reading * (M if read_all else 1)
        product = C * (C // M if split else C) * (M if per_head else 1)
        first = tokens * C**2 + reading
        return first, later + queries * points * product, later + queries * product

    return three_bills


WRONG = {
    "linear_really.1": [
        ("three projections", lambda C, F: (3 * C**2 + 2 * C * F) / (2 * C)),
        ("one product of pairs", lambda C, F: (4 * C**2 + 2 * C * F) / C),
        ("no feed-forward network", lambda C, F: 2 * C),
        ("one matrix in the feed-forward network", lambda C, F: 2 * C + F / 2),
    ],
    "linear_really.2": [
        ("elements, not bytes", _traffic(size=lambda x: x.numel())),
        ("4 bytes for each", _traffic(size=lambda x: 4 * x.numel())),
        ("whole storages", _traffic(size=lambda x: x.untyped_storage().nbytes())),
        ("views are counted", _traffic(views=True)),
        ("lists are overlooked", _traffic(lists=False)),
        ("only what is read", _traffic(written=False)),
        ("keyword arguments are overlooked", _traffic(keywords=False)),
    ],
    "linear_really.3": [
        ("the paper's count: no factor M", _bills(read_all=False)),
        ("one head's projection only", _bills(split=True)),
        ("a whole C x C matrix per head", _bills(per_head=True)),
    ],
}
