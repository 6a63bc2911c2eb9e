"""Checkers of chapter pixels_to_boxes, "The detector"."""

import math

import torch
import torch.nn.functional as F
from torchvision.ops import box_iou, generalized_box_iou

from deformable_detr.boxes import cxcywh_to_xyxy, inverse_sigmoid
from deformable_detr.exercises import checks, expect
from deformable_detr.inference.postprocess import postprocess
from deformable_detr.models.heads import move
from deformable_detr.models.tokens import token_centres
from deformable_detr.structures import Output

SHAPES = [(3, 5), (2, 4), (1, 2)]


@checks("pixels_to_boxes.1")
def check_token_place(token_place):
    def place(index, expected, hint):
        level, x, y = token_place(index, SHAPES)
        expect(level, expected[0], hint)
        expect(torch.tensor([float(x), float(y)]), torch.tensor(expected[1:]), hint)

    yield "the first token is the centre of the top-left cell"
    place(0, (0, 0.1, 1 / 6), "a cell's centre lies half a cell from its edge; x comes first")
    yield "tokens run along a row before they go to the next"
    place(6, (0, 0.3, 0.5), "a row holds W tokens, not H")
    yield "the tokens of the levels before are counted off"
    place(15, (1, 0.125, 0.25), "token 15 is the first of level 1: the first level holds 15")
    place(24, (2, 0.75, 0.5), "token 24 is the last of all")
    yield "all tokens agree with the library's token_centres"
    centres = token_centres(SHAPES, torch.ones(1, 3, 2))[0]
    for index, (x, y) in enumerate(centres.tolist()):
        given = token_place(index, SHAPES)
        expect(torch.tensor([float(given[1]), float(given[2])]), torch.tensor([x, y]))


@checks("pixels_to_boxes.2")
def check_needed_delta(needed_delta):
    yield "a box of half the image, centred on its reference, needs no delta"
    reference = torch.tensor([0.3, 0.8])
    box = torch.tensor([0.3, 0.8, 0.5, 0.5])
    hint = "a difference of logits; and a point has no size to start from, so 0.5 is logit 0"
    expect(needed_delta(box, reference), torch.zeros(4), hint)
    yield "sigmoid(delta + inverse_sigmoid(reference)) is the box"
    references, boxes = torch.rand(2, 3, 2), torch.rand(2, 3, 4) * 0.9 + 0.05
    hint = "both box and reference go through the inverse sigmoid before they are subtracted"
    expect(move(references, needed_delta(boxes, references)), boxes, hint)
    yield "a box that touches the border needs a finite delta"
    delta = needed_delta(torch.tensor([0.0, 0.5, 0.2, 1.0]), torch.tensor([0.1, 1.0]))
    expect(bool(delta.isfinite().all()), True, "0 and 1 have no finite logit: clamp them")


@checks("pixels_to_boxes.3")
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


@checks("matching_and_loss.1")
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


@checks("matching_and_loss.2")
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


@checks("matching_and_loss.3")
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


def _place(cell, counted=True, along_rows=True, half=0.5, x_first=True):
    def token_place(index, shapes):
        start = 0
        for level, (height, width) in enumerate(shapes):
            if index < start + height * width:
                row, column = divmod(index - start if counted else index, cell(height, width))
                x, y = (column + half) / width, (row + half) / height
                return (level, x, y) if x_first else (level, y, x)
            start += height * width

    return token_place


def _point(reference):
    return torch.cat([reference, torch.zeros_like(reference)], -1)


def _centres_as_they_are(box, reference):
    return torch.cat([box[..., :2] - reference, inverse_sigmoid(box[..., 2:])], -1)


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


WRONG = {
    "pixels_to_boxes.1": [
        ("a row holds H tokens", _place(lambda height, width: height)),
        ("the corner of the cell", _place(lambda height, width: width, half=0.0)),
        ("earlier levels not counted off", _place(lambda height, width: width, counted=False)),
        ("y before x", _place(lambda height, width: width, x_first=False)),
    ],
    "pixels_to_boxes.2": [
        ("a plain difference", lambda box, reference: box - _point(reference)),
        ("a plain difference of the centres", _centres_as_they_are),
        ("reference left as it is", lambda b, r: inverse_sigmoid(b) - _point(r)),
        (
            "the reference's position taken from the size too",
            lambda b, r: inverse_sigmoid(b) - inverse_sigmoid(torch.cat([r, r], -1)),
        ),
        ("no clamp at the border", lambda b, r: b.logit() - _point(r.logit())),
    ],
    "pixels_to_boxes.3": [
        ("a column for background", _background),
        ("the category id as a column", _raw_ids),
        ("object i given to query i", _first_rows),
    ],
    "matching_and_loss.1": [
        ("alpha on the negatives", _class_term(alpha=0.75)),
        ("the same alpha for all", _class_term(alpha=0.25, alpha_no=0.25)),
        ("the mean over queries and classes", _class_term(mean=True)),
        ("only matched queries", _class_term(all_queries=False)),
        ("division by no boxes", _class_term(least=0)),
        ("log of a probability that is 0", _class_term(from_logits=False)),
    ],
    "matching_and_loss.2": [
        ("cxcywh taken for corners", generalized_box_iou),
        ("IoU alone", lambda a, b: box_iou(cxcywh_to_xyxy(a), cxcywh_to_xyxy(b))),
        ("overlap not clamped", _unclamped_giou),
        ("box i with box i only", lambda a, b: _unclamped_giou(a, b).diagonal()[:, None]),
    ],
    "matching_and_loss.3": [
        ("one class for each query", _best_class_of_each_query),
        ("softmax", _detections(softmax=True)),
        ("index divided by the queries", _detections(by_queries=True)),
        ("height and width swapped", _detections(swapped=True)),
        ("centre and size instead of corners", _detections(corners=False)),
    ],
}
