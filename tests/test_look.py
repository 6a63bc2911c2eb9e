"""What detectors look at, drawn: pictures of which the right answer is known."""

import dataclasses

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from deformable_detr import Batch, DeformableDETR, Detections, Output, Sampling
from deformable_detr.layers.dense_attention import DenseAttention
from deformable_detr.look.attention import Attention, record_attention
from deformable_detr.look.figures import (
    draw_gradient_norms,
    draw_query_attention,
    draw_sampling_points,
    draw_token_attention,
)
from deformable_detr.look.gradients import gradient_norms
from deformable_detr.look.pictures import PALETTE, draw_boxes, draw_detections
from deformable_detr.look.sampling import record_sampling
from deformable_detr.models import DETR, DETRConfig
from deformable_detr.structures import Queries, Tokens
from tests.conftest import TINY


class Closed(torch.nn.Module):
    """x is 3 times the red of pixel (row 2, column 5); the score's logit is its blue plus green."""

    def forward(self, batch):
        red, green, blue = batch.images[:, :, 2, 5].unbind(1)
        zero = 0 * red
        boxes = torch.stack([3 * red, zero, zero, zero], -1)[:, None]
        return Output((green + blue)[:, None, None], boxes)


def test_gradient_norms_of_a_closed_form():
    torch.manual_seed(0)
    batch = Batch.from_images([torch.zeros(3, 4, 9), torch.rand(3, 6, 7)])
    norms = gradient_norms(Closed(), batch, query=0, label=0)
    assert list(norms) == ["x", "y", "w", "h", "score"]
    expected = torch.zeros(6, 9)
    expected[2, 5] = 3
    torch.testing.assert_close(norms["x"], expected)
    assert not norms["y"].any() and not norms["w"].any()
    expected[2, 5] = 0.25 * 2**0.5  # sigmoid'(0) over two colours
    torch.testing.assert_close(norms["score"], expected)
    assert not batch.images.requires_grad


@pytest.mark.parametrize("two_stage", [False, True])
def test_gradient_norms_are_those_of_finite_differences(two_stage):
    """Also in a refining model, whose references are detached in training."""
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, dropout=0.0, two_stage=two_stage)
    model = DeformableDETR(config).double().eval()
    for head in model.box_heads:  # zero at first: boxes would stay where their references are
        torch.nn.init.normal_(head.layers[-1].weight)
    batch = Batch.from_images([torch.rand(3, 48, 64).double(), torch.rand(3, 40, 70).double()])
    norms = gradient_norms(model, batch, query=2, label=1, image_index=1)
    row, column, step = 21, 37, 1e-5

    def item(name, change):
        images = batch.images.clone()
        images[1, :, row, column] += change
        output = model(Batch(images, batch.mask, batch.sizes))
        return output.boxes[1, 2, 0] if name == "x" else output.logits[1, 2, 1].sigmoid()

    for name in ("x", "score"):
        colours = torch.eye(3).double() * step
        with torch.no_grad():
            slopes = [(item(name, c) - item(name, -c)) / (2 * step) for c in colours]
        expected = torch.stack(slopes).norm()
        assert expected > 0
        torch.testing.assert_close(norms[name][row, column], expected, rtol=1e-4, atol=1e-10)


def test_encoder_tokens_look_around_their_own_place():
    """At initialisation the star's mean is its centre, which is the token's own cell."""
    model = DeformableDETR(TINY).eval()
    batch = Batch.from_images([torch.rand(3, 24, 48)])
    with record_sampling(model) as record:
        model(batch)
    sampling = record.encoder[0]
    assert sampling.spatial_shapes == [(3, 6), (2, 3)]
    cell = 2 * 6 + 4  # of the first level, row 2 and column 4
    centre = sampling.locations[0, cell].mean((0, 2))[0]  # two heads: right and left
    torch.testing.assert_close(centre, torch.tensor([4.5 / 6, 2.5 / 3]))


def test_points_are_drawn_in_pixels_of_the_image_heaviest_last():
    """A picture of 40 x 30 in a batch padded to 80 x 60."""
    locations = torch.tensor([[0.25, 0.25], [0.5, 0.125]]).reshape(1, 1, 1, 1, 2, 2)
    weights = torch.tensor([0.9, 0.1]).reshape(1, 1, 1, 1, 2)
    figure, axes = plt.subplots()
    image = np.zeros((30, 40, 3), np.uint8)
    sampling = Sampling(locations, weights, [(6, 8)])
    draw_sampling_points(
        axes, image, sampling, 0, (60, 80), reference=(20, 15), box=(1, 2, 30, 20), label="nine"
    )
    offsets = axes.collections[0].get_offsets()
    assert offsets.tolist() == [[40, 7.5], [20, 15]]
    assert axes.lines[0].get_xydata().tolist() == [[20, 15]]
    assert axes.patches[0].get_bbox().bounds == (1, 2, 29, 18)
    assert axes.get_xlim() == (0, 40) and axes.get_ylim() == (30, 0)
    plt.close(figure)


def test_detections_are_drawn_where_they_are():
    image = Image.new("RGB", (60, 40), "gray")
    boxes = torch.tensor([[10.0, 20, 30, 38], [-5, -5, 70, 90]])
    found = Detections(torch.tensor([0.9, 0.2]), torch.tensor([1, 0]), boxes, torch.arange(2))
    picture = draw_detections(image, found, ["a", "b"])
    scale = picture.width / 60
    assert scale == 10 and picture.size == (600, 400)
    colour = tuple(int(PALETTE[1][i : i + 2], 16) for i in (1, 3, 5))
    for x, y in ((20, 38), (10, 30), (30, 30)):  # bottom, left and right edges
        x, y = (
            min(round(v * scale), limit - 1) for v, limit in zip((x, y), (600, 400), strict=True)
        )
        assert picture.getpixel((x, y)) == colour
    assert picture.getpixel((200, 300)) == (128, 128, 128)
    assert image.getpixel((10, 30)) == (128, 128, 128)


def test_boxes_may_have_their_own_colours():
    image = Image.new("RGB", (60, 40), "gray")
    draw_boxes(image, [[10, 30, 30, 38], [10, 30, 30, 38]], [0, 0], ["", ""], ["#010203", "#fff"])
    assert image.getpixel((10, 34)) == (1, 2, 3)  # the first is on top


def test_a_thin_picture_is_not_enlarged_without_end():
    found = Detections(torch.zeros(0), torch.zeros(0).long(), torch.zeros(0, 4), torch.zeros(0))
    assert draw_detections(Image.new("RGB", (1, 2000)), found, []).size == (2, 4000)
    assert draw_detections(Image.new("RGB", (9, 5000)), found, []).size == (9, 5000)


def test_gradient_pictures_have_the_items_names():
    figure, axes = plt.subplots(1, 5)
    norms = {name: torch.rand(20, 30) for name in ("x", "y", "w", "h", "score")}
    image = np.zeros((16, 24, 3), np.uint8)
    draw_gradient_norms(list(axes), image, norms, torch.tensor([0.5, 0.5, 0.5, 0.25]))
    assert [a.get_title() for a in axes] == list(norms)
    assert axes[0].patches[0].get_bbox().bounds == (5.5, 5.5, 12, 4)
    assert axes[0].images[1].get_array().shape == (16, 24)
    plt.close(figure)


# DETR's maps


class Pointing(torch.nn.Module):
    """Each query looks at one token alone: the one whose feature it carries."""

    def __init__(self, tokens):
        super().__init__()
        self.attention = DenseAttention(2 * tokens, num_heads=2)
        identity = torch.eye(2 * tokens)
        with torch.no_grad():
            self.attention.in_proj_weight.copy_(torch.cat([30 * identity, 30 * identity, identity]))

    def forward(self, wanted, padding_mask, shape):
        """wanted: (B, Q), tokens. Each head sees the whole code, one-hot, of a token."""
        codes = torch.eye(padding_mask.shape[1]).repeat(1, 2)
        features = codes.expand(len(wanted), -1, -1)
        tokens = Tokens(features, 0 * features, padding_mask, [shape], torch.ones(2, 1, 2))
        content = codes[wanted]
        return self.attention.attend(Queries(content, 0 * content), tokens)


@pytest.fixture
def pointing():
    """Two images, 60 x 80 and 40 x 56, as a map of 3 x 4; what their queries or tokens look at."""
    mask = torch.zeros(2, 3, 4, dtype=torch.bool)
    mask[1, 2:], mask[1, :, 3:] = True, True
    wanted = torch.tensor([[6, 0, 11], [5, 6, 2]])
    model = Pointing(12)
    with torch.no_grad(), record_attention(model) as record:
        model(wanted, mask.flatten(1), (3, 4))
    return record["attention"], wanted


def lit(figure, axes, size):
    """The middles of cells of 20 x 20 pixels that have colour on a grey image, drawn as it is."""
    figure.canvas.draw()
    shown = np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int)
    found = set()
    for y in range(10, size[0], 20):
        for x in range(10, size[1], 20):
            column, up = axes.transData.transform((x + 3, y + 3)).round().astype(int)
            colour = shown[len(shown) - 1 - up, column]
            if colour.max() - colour.min() > 30:
                found.add((y // 20, x // 20))
            else:
                assert abs(colour.mean() - 153) < 8  # the image, 128 on white at 0.8
    return found


GREY = [np.full((60, 80, 3), 128, np.uint8), np.full((40, 56, 3), 128, np.uint8)]


@pytest.mark.parametrize(("image", "query"), [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)])
def test_a_querys_token_lights_up_at_its_place(pointing, image, query):
    """Also on a padded batch, and nothing but it: the image beneath stays as it is."""
    attention, wanted = pointing
    figure, axes = plt.subplots()
    draw_query_attention(
        axes, GREY[image], attention, query, (60, 80), image, box=(1, 2, 30, 20), label="nine"
    )
    place = divmod(int(wanted[image, query]), 4)
    assert lit(figure, axes, GREY[image].shape[:2]) == {place}
    assert axes.patches[0].get_bbox().bounds == (1, 2, 29, 18)
    height, width = GREY[image].shape[:2]
    assert axes.get_xlim() == (0, width) and axes.get_ylim() == (height, 0)
    plt.close(figure)


def test_the_token_at_a_point_is_the_one_in_whose_cell_it_lies():
    """Token (row, column) looks at the next one in its row, and the last at the first."""
    weights = torch.zeros(1, 2, 12, 12)
    for token in range(12):
        weights[0, :, token, token // 4 * 4 + (token + 1) % 4] = 1
    attention = Attention(weights, [(3, 4)])
    for point, looked_at in {(0, 0): (0, 1), (59, 39): (1, 3), (79, 59): (2, 0)}.items():
        figure, axes = plt.subplots()
        draw_token_attention(axes, GREY[0], attention, point, (60, 80))
        assert axes.lines[0].get_xydata().tolist() == [list(point)]
        assert lit(figure, axes, (60, 80)) == {looked_at}
        plt.close(figure)


def test_what_attention_cannot_be_drawn():
    _, axes = plt.subplots()
    attention = Attention(torch.ones(1, 1, 12, 12), [(3, 4)])
    with pytest.raises(ValueError, match=r"in the image of 80 x 60 pixels, got \(80, 3\)"):
        draw_token_attention(axes, GREY[0], attention, (80, 3), (60, 80))
    for shapes, given in ((None, "none"), ([(2, 3), (2, 3)], "2 maps")):
        attention = Attention(torch.ones(1, 1, 12, 12), shapes)
        with pytest.raises(ValueError, match=f"tokens of one map, got {given}"):
            draw_query_attention(axes, GREY[0], attention, 0, (60, 80))
    plt.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_drawn_too(dtype):
    figure, axes = plt.subplots(1, 2)
    locations = torch.rand(1, 1, 2, 1, 2, 2).to(dtype)
    sampling = Sampling(locations, torch.rand(1, 1, 2, 1, 2).to(dtype), [(3, 4)])
    draw_sampling_points(axes[0], GREY[0], sampling, 0, (60, 80))
    attention = Attention(torch.rand(1, 2, 12, 12).to(dtype), [(3, 4)])
    draw_query_attention(axes[1], GREY[0], attention, 0, (60, 80))
    plt.close(figure)


def test_score_gradients_are_of_the_models_own_scoring():
    """DETR's score is a softmax, to which the logit of no object belongs."""
    torch.manual_seed(0)
    config = DETRConfig(num_classes=3, num_queries=4, backbone="small", embed_dim=32, num_heads=2)
    config = dataclasses.replace(config, encoder_layers=1, decoder_layers=1, ffn_dim=32)
    model = DETR(config).double().eval()
    batch = Batch.from_images([torch.rand(3, 32, 48).double()])
    norms = gradient_norms(model, batch, query=1, label=2)
    images = batch.images.clone().requires_grad_(True)
    score = model(Batch(images, batch.mask, batch.sizes)).logits[0, 1].softmax(-1)[2]
    (gradient,) = torch.autograd.grad(score, images)
    torch.testing.assert_close(norms["score"], gradient[0].norm(dim=0))
