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
from deformable_detr.look.figures import draw_gradient_norms, draw_sampling_points
from deformable_detr.look.gradients import gradient_norms
from deformable_detr.look.pictures import PALETTE, caption_font, draw_boxes, draw_detections
from deformable_detr.look.sampling import record_sampling
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


def test_names_are_drawn_in_their_own_letters():
    """Of a letter that a font lacks, it draws the same empty box."""
    font = caption_font(20)
    drawn = {bytes(font.getmask(letter)) for letter in "eé\u0416\u03a9"}
    empty = bytes(font.getmask("\ufff0"))
    assert len(drawn) == 4 and empty not in drawn


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
