"""Checkers of chapter matching_and_loss."""

import math

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_iou, generalized_box_iou

from deformable_detr.boxes import cxcywh_to_xyxy
from deformable_detr.exercises import checks, expect
from deformable_detr.inference.postprocess import postprocess
from deformable_detr.losses.matcher import HungarianMatcher
from deformable_detr.structures import Output, Predictions, Target


@checks("matching_and_loss.1")
def check_class_targets(class_targets):
    categories = [2, 3, 5, 8, 13]

    def ones(wanted, expected, hint):
        """`expected`: the (query, class) pairs of the ones; everything else must be zero."""
        expect([tuple(place) for place in wanted.nonzero().tolist()], expected, hint)
        expect(wanted.sum(), torch.tensor(float(len(expected))), "the only values are 0 and 1")

    yield "one row for each query, one column for each class"
    wanted = class_targets([3], [1], 4, categories)
    hint = "with sigmoid scores there is no column for background"
    expect(tuple(wanted.shape), (4, 5), hint)
    yield "a category id finds its own column, although ids have gaps"
    hint = "as (query, class): category 3 is the second of the categories, column 1"
    ones(wanted, [(1, 1)], hint)
    wanted = class_targets([5, 3], [3, 0], 4, categories)
    ones(wanted, [(0, 1), (3, 2)], "object i belongs to queries[i]; all other rows are zero")
    yield "two objects of one category use two rows, and the last category has a column"
    ones(class_targets([13, 13], [2, 0], 3, categories), [(0, 4), (2, 4)], "column 4 twice")
    yield "an image without objects wants zeros"
    expect(class_targets([], [], 3, categories), torch.zeros(3, 5))


def _focal(p: float, positive: bool) -> float:
    """One term of the focal loss, alpha 0.25 and gamma 2."""
    return -0.25 * (1 - p) ** 2 * math.log(p) if positive else -0.75 * p**2 * math.log(1 - p)


@checks("matching_and_loss.2")
def check_class_term(class_term):
    logit = torch.logit(torch.tensor([[0.2]]))
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    yield "one positive of probability 0.2"
    hint = "0.25 * (1 - 0.2)^2 * -log(0.2)"
    expect(class_term(logit, one, 1), torch.tensor(_focal(0.2, True)), hint)
    yield "one negative of probability 0.2"
    hint = "0.75 * 0.2^2 * -log(1 - 0.2)"
    expect(class_term(logit, zero, 1), torch.tensor(_focal(0.2, False)), hint)
    yield "every query and class counts, and the sum is divided by the number of boxes"
    p = torch.tensor([[0.6, 0.2], [0.1, 0.3], [0.05, 0.1]])
    wanted = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    terms = [_focal(p[i, j].item(), bool(wanted[i, j])) for i in range(3) for j in range(2)]
    hint = "sum over all, also over queries without an object; divide by boxes, not by entries"
    expect(class_term(p.logit(), wanted, 2), torch.tensor(sum(terms) / 2), hint)
    yield "a batch without boxes is divided by one"
    nothing = [_focal(x, False) for x in p.flatten().tolist()]
    hint = "max(num_boxes, 1)"
    expect(class_term(p.logit(), torch.zeros(3, 2), 0), torch.tensor(sum(nothing)), hint)
    yield "logits of 200 and -200 give a finite loss"
    logits = torch.tensor([[200.0, -200.0]])
    given = class_term(logits, torch.tensor([[0.0, 1.0]]), 1)
    hint = "sigmoid(200) is exactly 1, and log(1 - 1) is not finite: start from the logits"
    expect(given, torch.tensor(0.75 * 200 + 0.25 * 200), hint)


@checks("matching_and_loss.3")
def check_pairwise_giou(pairwise_giou):
    a = torch.tensor([[0.3, 0.4, 0.4, 0.5]])
    yield "a box with itself has 1"
    expect(pairwise_giou(a, a), torch.ones(1, 1))
    yield "two boxes that overlap, given as cxcywh"
    b = torch.tensor([[0.5, 0.4, 0.2, 0.5]])
    hint = "a fifth of the union overlaps and the hull is the union; are these corners?"
    expect(pairwise_giou(a, b), torch.tensor([[1 / 5]]), hint)
    yield "every box of a with every box of b"
    many = torch.tensor([[0.3, 0.4, 0.4, 0.5], [0.4, 0.5, 0.2, 0.4], [0.35, 0.4, 0.1, 0.6]])
    given = pairwise_giou(many, many[:2])
    hint = "row i, column j: box i of a with box j of b; IoU minus the empty part of the hull"
    expect(given, generalized_box_iou(cxcywh_to_xyxy(many), cxcywh_to_xyxy(many[:2])), hint)
    yield "disjoint boxes are below 0, also when they are apart in both directions"
    apart = torch.tensor([[0.9, 0.9, 0.1, 0.2]])
    hint = "width and height of the overlap are both negative here, and their product is not"
    expected = generalized_box_iou(cxcywh_to_xyxy(a), cxcywh_to_xyxy(apart))
    expect(pairwise_giou(a, apart), expected, hint)


def _row(places: list[float]) -> torch.Tensor:
    """Boxes of one size in one row."""
    return torch.tensor([[x, 0.5, 0.2, 0.4] for x in places])


@checks("matching_and_loss.4")
def check_match(match):
    one = torch.zeros(1, dtype=torch.long)

    def pairs(found):
        return [tuple(int(number) for number in pair) for pair in found]

    yield "one object, and the query that fits it"
    found = match(torch.zeros(3, 1), _row([0.2, 0.55, 0.9]), one, _row([0.5]))
    expect(pairs(found), [(1, 0)], "all scores are equal: the nearest box is cheapest")
    yield "the least total, not the cheapest pair first"
    logits = torch.full((3, 1), 0.1).logit()
    args = logits, _row([0.52, 0.78, 0.10]), torch.zeros(2, dtype=torch.long), _row([0.4, 0.6])
    expect(pairs(match(*args)), [(0, 0), (1, 1)], "linear_sum_assignment on the whole matrix")
    yield "equal boxes: the class decides, in the column of the label"
    scores = torch.tensor([[0.8, 0.1, 0.3], [0.1, 0.3, 0.8], [0.3, 0.8, 0.1]])
    args = scores.logit(), _row([0.5] * 3), torch.tensor([2, 0, 1]), _row([0.5] * 3)
    hint = "object 0 has label 2, which query 1 finds likely: (yes - no)[:, labels]"
    expect(pairs(match(*args)), [(0, 1), (1, 0), (2, 2)], hint)
    yield "an image without objects"
    nothing = torch.zeros(0, dtype=torch.long), torch.zeros(0, 4)
    expect(pairs(match(logits, _row([0.5] * 3), *nothing)), [], "no pairs")
    yield "the library's matcher, on random predictions"
    for _ in range(20):
        said = Predictions(2 * torch.randn(1, 9, 4), torch.rand(1, 9, 4) * 0.5 + 0.2)
        target = Target(0, torch.randint(4, (5,)), torch.rand(5, 4) * 0.5 + 0.2, (64, 80))
        [expected] = HungarianMatcher()(said, [target])
        found = match(said.logits[0], said.boxes[0], target.labels, target.boxes)
        expected = list(zip(*(index.tolist() for index in expected), strict=True))
        hint = "2 * class + 5 * L1 (of cxcywh) - 2 * GIoU (of xyxy)"
        expect(pairs(found), expected, hint)


@checks("matching_and_loss.5")
def check_detections(detections):
    p = torch.tensor([[0.9, 0.8, 0.1], [0.1, 0.3, 0.2], [0.2, 0.1, 0.7], [0.1, 0.1, 0.1]])
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.2, 0.2, 0.1, 0.1], [0.25, 0.5, 0.5, 1.0]])
    boxes = torch.cat([boxes, boxes[:1]])
    scores, labels, pixels = detections(p.logit(), boxes, (100, 200), 3)
    yield "the three best scores, best first"
    hint = "sigmoid, then the best over all queries and classes: one query may give two"
    expect(scores, torch.tensor([0.9, 0.8, 0.7]), hint)
    yield "their classes"
    hint = "the flat index counts classes fastest: index % classes"
    expect(labels, torch.tensor([0, 1, 2]), hint)
    yield "their boxes, as corners in pixels of the original image"
    expected = torch.tensor([[80.0, 30, 120, 70], [80, 30, 120, 70], [0, 0, 100, 100]])
    hint = "x is multiplied by the width 200, y by the height 100; the query is index // classes"
    expect(pixels, expected, hint)
    yield "the same as the library's postprocess"
    logits, boxes = torch.randn(7, 3), torch.rand(7, 4)
    output = Output(logits[None], boxes[None])
    found = postprocess(output, [(48, 80)], top_k=5)[0]
    scores, labels, pixels = detections(logits, boxes, (48, 80), 5)
    for given, expected in ((scores, found.scores), (labels, found.labels), (pixels, found.boxes)):
        expect(given, expected)


def _raw_ids(category_ids, queries, num_queries, categories):
    wanted = torch.zeros(num_queries, len(categories))
    for query, category_id in zip(queries, category_ids, strict=True):
        wanted[query, category_id - 1] = 1
    return wanted


def _background(category_ids, queries, num_queries, categories):
    wanted = torch.zeros(num_queries, len(categories) + 1)
    wanted[:, -1] = 1
    for query, category_id in zip(queries, category_ids, strict=True):
        wanted[query] = 0
        wanted[query, categories.index(category_id)] = 1
    return wanted


def _first_rows(category_ids, queries, num_queries, categories):
    wanted = torch.zeros(num_queries, len(categories))
    for row, category_id in enumerate(category_ids):
        wanted[row, categories.index(category_id)] = 1
    return wanted


def _class_term(alpha=0.25, alpha_no=None, from_logits=True, all_queries=True, mean=False, least=1):
    def class_term(logits, wanted, num_boxes):
        p = logits.sigmoid()
        p_t = p * wanted + (1 - p) * (1 - wanted)
        cross_entropy = -p_t.log()
        if from_logits:
            cross_entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        weight = alpha * wanted + (alpha_no or 1 - alpha) * (1 - wanted)
        terms = weight * (1 - p_t) ** 2 * cross_entropy
        if not all_queries and len(wanted) > 1:
            terms = terms[wanted.any(-1)]
        return terms.mean() if mean else terms.sum() / max(torch.tensor(num_boxes), least)

    return class_term


def _unclamped_giou(a, b):
    a, b = cxcywh_to_xyxy(a)[:, None], cxcywh_to_xyxy(b)[None]
    overlap = (torch.minimum(a, b)[..., 2:] - torch.maximum(a, b)[..., :2]).prod(-1)
    hull = (torch.maximum(a, b)[..., 2:] - torch.minimum(a, b)[..., :2]).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - overlap
    return overlap / union - (hull - union) / hull


def _best_class_of_each_query(logits, boxes, original_size, top_k):
    best, label = logits.sigmoid().max(-1)
    scores, query = best.topk(top_k)
    height, width = original_size
    scale = torch.tensor([width, height, width, height])
    return scores, label[query], cxcywh_to_xyxy(boxes[query]) * scale


def _detections(by_queries=False, swapped=False, softmax=False, corners=True):
    def detections(logits, boxes, original_size, top_k):
        scores = logits.softmax(-1) if softmax else logits.sigmoid()
        scores, index = scores.flatten().topk(top_k)
        divisor = logits.shape[0 if by_queries else 1]
        query, labels = index // divisor, index % divisor
        height, width = original_size[::-1] if swapped else original_size
        boxes = cxcywh_to_xyxy(boxes[query]) if corners else boxes[query]
        return scores, labels, boxes * torch.tensor([width, height, width, height])

    return detections


def _cost(logits, boxes, labels, objects, sign=-2, p=1, columns=True, likely=False):
    score = logits.sigmoid()
    yes, no = -((1 - score) ** 2) * score.log(), -(score**2) * (1 - score).log()
    class_cost = 2 * (0.25 * yes - 0.75 * no) if not likely else -2 * score
    class_cost = class_cost[:, labels] if columns else class_cost[:, torch.zeros_like(labels)]
    a, b = cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(objects)
    distance = torch.cdist(boxes, objects, p=p)
    return class_cost + 5 * distance + sign * generalized_box_iou(a, b)


def _match(**options):
    def match(*args):
        rows, columns = linear_sum_assignment(_cost(*args, **options))
        return list(zip(rows.tolist(), columns.tolist(), strict=True))

    return match


def _greedy(*args):
    cost, pairs = _cost(*args), []
    for _ in range(cost.shape[1]):
        query, chosen = divmod(int(cost.argmin()), cost.shape[1])
        pairs.append((query, chosen))
        cost[query], cost[:, chosen] = torch.inf, torch.inf
    return sorted(pairs)


def _each_its_best(*args):
    cost = _cost(*args)
    return sorted((int(column.argmin()), n) for n, column in enumerate(cost.T))


WRONG = {
    "matching_and_loss.1": [
        ("a column for background", _background),
        ("the category id as a column", _raw_ids),
        ("object i given to query i", _first_rows),
    ],
    "matching_and_loss.2": [
        ("alpha on the negatives", _class_term(alpha=0.75)),
        ("the same alpha for all", _class_term(alpha=0.25, alpha_no=0.25)),
        ("the mean over queries and classes", _class_term(mean=True)),
        ("only matched queries", _class_term(all_queries=False)),
        ("division by no boxes", _class_term(least=0)),
        ("log of a probability that is 0", _class_term(from_logits=False)),
    ],
    "matching_and_loss.3": [
        ("cxcywh taken for corners", generalized_box_iou),
        ("IoU alone", lambda a, b: box_iou(cxcywh_to_xyxy(a), cxcywh_to_xyxy(b))),
        ("overlap not clamped", _unclamped_giou),
        ("box i with box i only", lambda a, b: _unclamped_giou(a, b).diagonal()[:, None]),
    ],
    "matching_and_loss.4": [
        ("greedy", _greedy),
        ("each object its best query", _each_its_best),
        ("GIoU with the wrong sign", _match(sign=2)),
        ("the column of class 0", _match(columns=False)),
        ("a probability instead of the focal loss", _match(likely=True)),
        ("Euclidean instead of L1", _match(p=2)),
    ],
    "matching_and_loss.5": [
        ("one class for each query", _best_class_of_each_query),
        ("softmax", _detections(softmax=True)),
        ("index divided by the queries", _detections(by_queries=True)),
        ("height and width swapped", _detections(swapped=True)),
        ("centre and size instead of corners", _detections(corners=False)),
    ],
}
