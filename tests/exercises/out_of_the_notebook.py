"""Checkers of chapter out_of_the_notebook, "Out of the notebook"."""

import io
import warnings

import numpy as np
import torch
from PIL import Image
from torch import nn

from deformable_detr.exercises import checks, expect
from deformable_detr.export.graph import best
from deformable_detr.losses.scoring import FocalScoring


class _Module(nn.Module):
    """A function as what exporters take."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, features):
        return self.function(features)


def _centres(features, traced=True, swap=False, ones=True):
    """As the text asks; the switches make wrong answers."""
    H, W = features.shape[-2:]
    if not traced:
        H, W = int(H), int(W)
    ys = (torch.arange(H) + 0.5 * ones) / H
    xs = (torch.arange(W) + 0.5 * ones) / W
    grid = torch.meshgrid(ys, xs, indexing="ij")
    return torch.stack(grid if swap else grid[::-1], -1).flatten(0, 1)


@checks("out_of_the_notebook.1")
def check_cell_centres(cell_centres):
    small, large = torch.rand(2, 3, 2, 4), torch.rand(1, 3, 5, 3)
    yield "the centres, x before y, row by row"
    for features in (small, large):
        expect(cell_centres(features), _centres(features), "first (0.5 / W, 0.5 / H)")
    yield "traced at 2 x 4, run at 5 x 3"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a trace says of itself
        trace = torch.jit.trace(_Module(cell_centres), small, check_trace=False)
    expect(trace(large), _centres(large), "is there an int(), a linspace or a torch.tensor?")
    yield "exported for any size"
    free = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.export.export(_Module(cell_centres), (small,), dynamic_shapes=(free,))
    expect(program.module()(large), _centres(large))


@checks("out_of_the_notebook.2")
def check_best_boxes(best_boxes):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 3, generator=generator)
    logits[2] = torch.tensor([4.0, 3.5, 0.0])  # two of the best are one query's
    boxes = torch.rand(7, 4, generator=generator)
    size = 60, 90  # H, W

    def expected(top_k):
        given = logits[None], boxes[None], torch.tensor([size])
        return [x[0].numpy() for x in best(*given, FocalScoring(), top_k)]

    def given(top_k):
        return best_boxes(logits.numpy(), boxes.numpy(), size, top_k)

    yield "scores, best first"
    expect(given(5)[0], expected(5)[0], "a sigmoid for each class; the best of all of them")
    yield "classes"
    expect(given(5)[1], expected(5)[1], "an index of the flat array is query * classes + class")
    yield "boxes in pixels"
    expect(given(5)[2], expected(5)[2], "x times the width, y times the height; corners", atol=1e-3)
    yield "fewer pairs than wanted"
    expect(len(given(100)[0]), 21, "7 queries times 3 classes")


def _png(size=(20, 10), turned=False):
    exif = Image.Exif()
    if turned:
        exif[0x0112] = 6  # shown turned by a quarter
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "jpeg", exif=exif)
    return file.getvalue()


@checks("out_of_the_notebook.3")
def check_answer(answer):
    seen = []

    def detect(image):
        seen.append(image)
        return [{"name": "tree", "score": 0.5, "box": [1, 2, 3, 4]}]

    yield "a picture"
    status, found = answer(_png(), detect, 100_000)
    expect(status, 200)
    expect(found, {"detections": [{"name": "tree", "score": 0.5, "box": [1, 2, 3, 4]}]})
    expect(seen[-1].mode, "RGB", "Image.convert")
    yield "what is no picture"
    for body in (b"", b"GIF89a, but no picture"):
        status, found = answer(body, detect, 100_000)
        expect(status, 400, "PIL raises OSError, of which UnidentifiedImageError is one")
        expect(list(found), ["error"])
        expect(len(seen), 1, "detect is not called")
    yield "what is cut short"
    status, _ = answer(_png((200, 200))[:-40], detect, 100_000)
    expect(status, 400, "PIL reads pixels only when they are asked for, such as by convert")
    yield "too large a body"
    status, found = answer(_png(), detect, 10)
    expect((status, list(found)), (413, ["error"]), "more bytes than the limit")
    expect(answer(b"x" * 11, detect, 10)[0], 413, "the limit comes before the picture is opened")
    yield "a picture that is to be turned"
    answer(_png(turned=True), detect, 100_000)
    expect(seen[-1].size, (10, 20), "ImageOps.exif_transpose")
    yield "an error of the detector goes through"

    def failing(image):
        raise OSError("the weights are gone")

    try:
        answer(_png(), failing, 100_000)
    except OSError:
        raised = True
    else:
        raised = False
    expect(raised, True, "detect stands outside the try: its error is no fault of the picture")


def _answer(turn=True, limit_first=True, read=True, status=400, catch=False):
    def answer(body, detect, limit):
        from PIL import ImageOps

        if limit_first and len(body) > limit:
            return 413, {"error": "too large"}
        try:
            image = Image.open(io.BytesIO(body))
            image = ImageOps.exif_transpose(image) if turn else image
            image = image.convert("RGB") if read else Image.new("RGB", image.size)
            found = detect(image) if catch else None
        except OSError:
            return status, {"error": "no picture"}
        if len(body) > limit:
            return 413, {"error": "too large"}
        return 200, {"detections": found if catch else detect(image)}

    return answer


def _best_boxes(logits, boxes, size, top_k, scores=lambda x: 1 / (1 + np.exp(-x)), swap=False):
    probabilities = scores(logits)
    order = np.argsort(-probabilities, axis=None)[:top_k]
    queries, labels = np.unravel_index(order, logits.shape)
    x, y, w, h = boxes[queries].T
    height, width = size[::-1] if swap else size
    corners = np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1)
    return probabilities.ravel()[order], labels, corners * [width, height, width, height]


def _softmax(x):
    e = np.exp(x)
    return e / e.sum(-1, keepdims=True)


def _one_class_per_query(logits, *given):
    return _best_boxes(np.where(logits == logits.max(1, keepdims=True), logits, -50.0), *given)


WRONG = {
    "out_of_the_notebook.1": [
        ("sizes made into numbers", lambda features: _centres(features, traced=False)),
        ("y before x", lambda features: _centres(features, swap=True)),
        ("corners, not centres", lambda features: _centres(features, ones=False)),
    ],
    "out_of_the_notebook.2": [
        ("a softmax", lambda *given: _best_boxes(*given, scores=_softmax)),
        ("one class per query", _one_class_per_query),
        ("width and height swapped", lambda *given: _best_boxes(*given, swap=True)),
    ],
    "out_of_the_notebook.3": [
        ("the picture is not turned", _answer(turn=False)),
        ("opened before it is measured", _answer(limit_first=False)),
        ("its pixels are never read", _answer(turn=False, read=False)),
        ("all is well", _answer(status=200)),
        ("detect inside the try", _answer(catch=True)),
    ],
}
