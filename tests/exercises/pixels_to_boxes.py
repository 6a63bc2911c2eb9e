"""Checkers of chapter pixels_to_boxes."""

import torch

from deformable_detr.boxes import inverse_sigmoid
from deformable_detr.exercises import checks, expect
from deformable_detr.layers.attention import MSDeformAttn
from deformable_detr.layers.dense_attention import DenseAttention
from deformable_detr.models.decoder import DecoderLayer
from deformable_detr.models.heads import move
from deformable_detr.models.tokens import token_centres
from deformable_detr.structures import Queries, Tokens

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


def _random_layer() -> DecoderLayer:
    """A layer in which no weight is zero and no norm like another."""
    attentions = DenseAttention(24, 3), MSDeformAttn(24, len(SHAPES), 3, 2)
    layer = DecoderLayer(*attentions, 24, 32, dropout=0.0).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


@checks("pixels_to_boxes.2")
def check_decode_layer(decode_layer):
    layer, tokens = _random_layer(), sum(height * width for height, width in SHAPES)
    content, position, memory = torch.randn(2, 4, 24), torch.randn(2, 4, 24), torch.randn(2, 25, 24)
    points = torch.rand(2, 4, 2)
    padding = torch.zeros(2, tokens, dtype=torch.bool)
    padding[1, 20:] = True
    sampled = Tokens(memory, torch.zeros_like(memory), padding, SHAPES, torch.ones(2, 3, 2))
    on_levels = points[:, :, None].expand(-1, -1, 3, -1)

    def compare(position, hint):
        with torch.no_grad():
            args = (layer, content, position, on_levels, memory, SHAPES, padding)
            given = decode_layer(*args)
            expected = layer(Queries(content, position, points), sampled)
        expect(given, expected, hint, atol=1e-4)

    yield "order, sums and norms, with positions that are zero"
    hint = "self-attention, cross-attention (with padding), feed-forward; norm(queries + update)"
    compare(torch.zeros_like(position), hint)
    yield "positions, in the right places only"
    hint = "position joins query and key of self-attention and the query of cross-attention"
    compare(position, hint)


@checks("pixels_to_boxes.3")
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


def _decode_layer(in_query=True, in_cross=True, in_value=False, kept=False, **order):
    """The layer with one thing wrong: where the position goes, or the order of the parts."""

    def decode_layer(layer, x, position, references, memory, shapes, padding):
        def mix(x):
            located = x + position if in_query else x
            value = located if in_value else x
            return layer.self_attention(located, located, value)[0]

        def look(x):
            query = x + position if in_cross else x
            return layer.cross_attention(query, references, memory, shapes, padding)

        def think(x):
            return layer.ffn.linear2(layer.ffn.linear1(x).relu())

        parts = [(mix, layer.self_norm), (look, layer.cross_norm), (think, layer.ffn.norm)]
        if order.get("cross_first"):
            parts[:2] = parts[1::-1]
        if order.get("swapped_norms"):
            parts[:2] = [(mix, layer.cross_norm), (look, layer.self_norm)]
        x = x + position if kept else x
        for part, norm in parts:
            if order.get("norm_first"):
                x = x + part(norm(x))
            else:
                x = norm(part(x)) if order.get("no_way_around") else norm(x + part(x))
        return x

    return decode_layer


WRONG = {
    "pixels_to_boxes.1": [
        ("a row holds H tokens", _place(lambda height, width: height)),
        ("the corner of the cell", _place(lambda height, width: width, half=0.0)),
        ("earlier levels not counted off", _place(lambda height, width: width, counted=False)),
        ("y before x", _place(lambda height, width: width, x_first=False)),
    ],
    "pixels_to_boxes.2": [
        ("cross-attention first", _decode_layer(cross_first=True)),
        ("norms taken by their official numbers", _decode_layer(swapped_norms=True)),
        ("norm before each part", _decode_layer(norm_first=True)),
        ("no way around the parts", _decode_layer(no_way_around=True)),
        ("no position in self-attention", _decode_layer(in_query=False)),
        ("no position in cross-attention", _decode_layer(in_cross=False)),
        ("position in the value", _decode_layer(in_value=True)),
        ("position added for good", _decode_layer(in_query=False, in_cross=False, kept=True)),
    ],
    "pixels_to_boxes.3": [
        ("a plain difference", lambda box, reference: box - _point(reference)),
        ("a plain difference of the centres", _centres_as_they_are),
        ("reference left as it is", lambda b, r: inverse_sigmoid(b) - _point(r)),
        (
            "the reference's position taken from the size too",
            lambda b, r: inverse_sigmoid(b) - inverse_sigmoid(torch.cat([r, r], -1)),
        ),
        ("no clamp at the border", lambda b, r: b.logit() - _point(r.logit())),
    ],
}
