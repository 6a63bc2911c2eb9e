"""Checkers of chapter groups_and_queries, "Groups and queries"."""

import torch
from scipy.optimize import linear_sum_assignment

from deformable_detr.exercises import checks, expect
from deformable_detr.layers.dense_attention import between_groups
from deformable_detr.structures import Queries


@checks("groups_and_queries.1")
def check_group_mask(group_mask):
    yield "its size, and a single group"
    expect(tuple(group_mask(2, 3).shape), (6, 6), "a row and a column per query")
    expect(group_mask(1, 4), torch.zeros(4, 4), "within a group nothing is forbidden")
    yield "between groups"
    content = torch.zeros(1, 15, 8)
    expected = between_groups(Queries(content, content, groups=3))
    given = group_mask(3, 5)
    expect(given[0, 5], True, "True is forbidden, and queries 0 and 5 are of different groups")
    expect(given[0, 3], False, "the first five are one group")
    expect(given, expected, "K blocks of N x N on the diagonal")
    expect(str(given.dtype), "torch.bool", "a mask is bool")


@checks("groups_and_queries.2")
def check_match_in_groups(match_in_groups):
    def sorted_pairs(queries, objects):
        return sorted(
            zip(torch.as_tensor(queries).tolist(), torch.as_tensor(objects).tolist(), strict=True)
        )

    yield "one group"
    cost = torch.rand(5, 3)
    expected = linear_sum_assignment(cost.numpy())
    expect(sorted_pairs(*match_in_groups(cost, 1)), sorted_pairs(*expected))
    yield "every object once in each of three groups"
    cost = torch.rand(12, 2)
    cost[4:8] += 5  # a group that is worse than the others, and must be matched all the same
    queries, objects = match_in_groups(cost, 3)
    expect(len(queries), 6, "K pairs per object")
    found = sorted((int(q) // 4, int(o)) for q, o in zip(queries, objects, strict=True))
    expect(found, [(g, o) for g in range(3) for o in range(2)], "each group finds each object once")
    yield "the cheapest of its group"
    expected = []
    for start in (0, 4, 8):
        rows, columns = linear_sum_assignment(cost[start : start + 4].numpy())
        expected += [(start + int(r), int(c)) for r, c in zip(rows, columns, strict=True)]
    expect(sorted_pairs(queries, objects), sorted(expected))


@checks("groups_and_queries.3")
def check_queries_from_tokens(queries_from_tokens):
    logits, boxes = torch.randn(2, 11, 3), torch.rand(2, 11, 4) * 0.8 + 0.1
    memory = torch.randn(2, 11, 6, requires_grad=True)
    moved = boxes.clone().requires_grad_()
    usable = torch.ones(2, 11, dtype=torch.bool)

    def rows(x, scores):
        places = scores.topk(4, 1).indices.unsqueeze(-1)
        return x.detach().gather(1, places.expand(-1, -1, x.shape[-1]))

    yield "one class, all tokens usable"
    content, references = queries_from_tokens(logits[..., :1], moved, usable, memory, 4)
    expect(content, rows(memory, logits[..., 0]), "rows of the memory, best first, per picture")
    expect(references, rows(boxes, logits[..., 0]), "the boxes of the same tokens")
    yield "several classes"
    best = logits.max(-1).values
    content, references = queries_from_tokens(logits, moved, usable, memory, 4)
    expect(content, rows(memory, best), "a token's score is that of its best class")
    yield "tokens that are not usable come last"
    spoiled = logits - 10.0  # so low that 0 is not last
    spoiled[:, 2] = 50.0
    some = usable.clone()
    some[:, 2] = False
    content, _ = queries_from_tokens(spoiled, moved, some, memory, 4)
    expect(content, rows(memory, best.masked_fill(~some, -torch.inf)), "their logits do not count")
    yield "contents carry a gradient into the memory, references carry none"
    content, references = queries_from_tokens(logits, moved, usable, memory, 4)
    expect(bool(content.requires_grad), True, "the contents are not detached")
    expect(bool(references.requires_grad), False, "the references are")


def _mask(compare, deal=False):
    def group_mask(groups, size):
        index = torch.arange(groups * size)
        group = index % groups if deal else index // size
        return compare(group[:, None], group)

    return group_mask


def _without_offset(cost, groups):
    pairs = [linear_sum_assignment(part.numpy()) for part in cost.chunk(groups)]
    return tuple(torch.cat([torch.as_tensor(pair[i]) for pair in pairs]) for i in (0, 1))


def _copies(cost, groups):
    rows, columns = linear_sum_assignment(cost.repeat(1, groups).numpy())
    return torch.as_tensor(rows), torch.as_tensor(columns) % cost.shape[1]


def _once(cost, groups):
    rows, columns = linear_sum_assignment(cost.numpy())
    return torch.as_tensor(rows), torch.as_tensor(columns)


def _greedy(cost, groups):
    size = len(cost) // groups
    queries = [part.argmin(0) + size * g for g, part in enumerate(cost.chunk(groups))]
    return torch.cat(queries), torch.arange(cost.shape[1]).repeat(groups)


def _tokens(score=None, blank=-torch.inf, detach=(False, True), per_image=True):
    """The selection with one thing wrong."""

    def select(logits, boxes, usable, memory, num_queries):
        scores = (score or (lambda x: x.max(-1).values))(logits)
        if blank is not None:
            scores = scores.masked_fill(~usable, blank)
        chosen = scores.topk(num_queries, 1).indices
        chosen = chosen if per_image else chosen[:1].expand_as(chosen)
        places = chosen.unsqueeze(-1)
        pair = [x.gather(1, places.expand(-1, -1, x.shape[-1])) for x in (memory, boxes)]
        return tuple(x.detach() if cut else x for x, cut in zip(pair, detach, strict=True))

    return select


WRONG = {
    "groups_and_queries.1": [
        ("True where allowed", _mask(torch.eq)),
        ("queries dealt out like cards", _mask(torch.ne, deal=True)),
        ("numbers in place of a mask", lambda k, n: _mask(torch.ne)(k, n).float()),
    ],
    "groups_and_queries.2": [
        ("numbers within the group", _without_offset),
        ("each object copied, matched once", _copies),
        ("groups ignored", _once),
        ("the cheapest query of each object", _greedy),
    ],
    "groups_and_queries.3": [
        ("class 0 alone", _tokens(lambda logits: logits[..., 0])),
        ("the sum over classes", _tokens(lambda logits: logits.sum(-1))),
        ("tokens that are not usable", _tokens(blank=None)),
        ("0 for tokens that are not usable", _tokens(blank=0.0)),
        ("the tokens of the first picture for all", _tokens(per_image=False)),
        ("contents detached", _tokens(detach=(True, True))),
        ("references with gradient", _tokens(detach=(False, False))),
    ],
}
