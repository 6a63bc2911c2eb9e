"""What a detector looks at, by one call: places that are known, and perturbations that agree."""

import dataclasses
import html.parser
import re
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from deformable_detr import DeformableDETR, MSDeformAttn, Output
from deformable_detr.cli import main
from deformable_detr.inference.detector import Detector, load_detector
from deformable_detr.inference.predict import predict
from deformable_detr.integrations import use_in_transformers
from deformable_detr.look import explain
from deformable_detr.look.asking import Look
from deformable_detr.look.gradients import ITEMS
from deformable_detr.look.measures import energy_shares, regions, weight_shares
from deformable_detr.look.overlays import draw_gradient, draw_whole, holding, show
from deformable_detr.look.page import page as write_page
from deformable_detr.models import DETR, MODELS
from deformable_detr.models.tokens import level_mask, valid_ratio
from tests.conftest import TINY, TINY_DETR
from tests.members import build, tiny
from tests.test_integrations import transformers

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "data" / "checkpoints" / "digits.safetensors"
SAMPLE = ROOT / "data" / "samples" / "000012.png"
CATEGORIES = [{"id": 3, "name": "red"}, {"id": 7, "name": "green"}, {"id": 20, "name": "blue"}]


# a toy model of which everything is known


class Decoder(torch.nn.Module):
    """One layer, which samples on two maps of strides 8 and 16."""

    def __init__(self):
        super().__init__()
        self.cross_attention = MSDeformAttn(4, num_levels=2, num_heads=1, num_points=1)
        with torch.no_grad():  # one cell to the right on the first level, one up on the second
            self.cross_attention.sampling_offsets.bias.copy_(torch.tensor([1.0, 0, 0, -1]))
            self.cross_attention.attention_weights.bias.copy_(torch.tensor([3.0, 1]).log())


class BrightSpot(torch.nn.Module):
    """Finds where it is bright: a box of a tenth of the image around the centre of the red light
    above a half. Its score is the sigmoid of 20 times the green of the image's first pixel."""

    def __init__(self):
        super().__init__()
        self.decoder = Decoder()

    def forward(self, batch):
        images, (height, width) = batch.images, batch.sizes[0].tolist()
        red = (images[0, 0, :height, :width] - 0.5).relu()
        x = (torch.arange(width) + 0.5) / width
        y = (torch.arange(height) + 0.5) / height
        centre = torch.stack([(red.sum(0) * x).sum(), (red.sum(1) * y).sum()]) / red.sum()
        shapes = [tuple(-(-n // s) for n in images.shape[2:]) for s in (8, 16)]
        ratios = [valid_ratio(level_mask(batch.mask, shape)) for shape in shapes]
        reference = centre * torch.cat(ratios)  # (L, 2), relative to the padded maps
        features = torch.zeros(1, sum(h * w for h, w in shapes), 4)
        query = torch.zeros(1, 1, 4)
        self.decoder.cross_attention(query, reference[None, None], features, shapes)
        box = torch.cat([centre, torch.full((2,), 0.1)])
        return Output(20 * images[0, 1, 0, 0].view(1, 1, 1), box.view(1, 1, 4))


def spot(width=200, height=120, x=150, y=30):
    """A dark picture with a bright square of 8 x 8 pixels around a place."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[y - 4 : y + 4, x - 4 : x + 4, 0] = 255
    return Image.fromarray(pixels)


def resized(width, height):
    """A transform to that size, without normalisation."""

    def transform(image):
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BOX))
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255

    return transform


@dataclasses.dataclass
class Toy:
    """What `explain` asks of a Detector."""

    model: torch.nn.Module
    side: tuple[int, int] = (200, 120)
    categories: tuple = ({"id": 1, "name": "spot"},)
    threshold: float = 0.5

    def eval_transform(self):
        return resized(*self.side)


SIDES = ((200, 120), (100, 60), (99, 61), (50, 90))  # (W, H) as it is seen,
PADDED = ((61, 100), (96, 160), (90, 131))  # and (H, W) to which it is padded, where it fits
FITTING = [(s, p) for s in SIDES for p in PADDED if p[0] >= s[1] and p[1] >= s[0]]


@pytest.mark.parametrize(("side", "padded_size"), [(side, None) for side in SIDES] + FITTING)
def test_places_are_in_pixels_of_the_original_picture(side, padded_size):
    """However it is resized, even to other proportions, and padded."""
    width, height = side
    look = Look(Toy(BrightSpot(), side), spot(), padded_size=padded_size)
    seen = look.at_detection()
    near = 200 / width, 120 / height  # one seen pixel: resizing blurs the spot
    middle = seen.box.reshape(2, 2).mean(0)
    assert np.all(np.abs(middle - (150, 30)) < near)
    np.testing.assert_allclose(seen.references[0], [*middle, *middle], rtol=1e-6)
    # the place is exactly where the model has put it: one cell to the right, one up
    fine, coarse = (~level_mask(look.batch.mask, shape)[0] for shape in seen.map_shapes)
    cells = [200 / int(fine[0].sum()), 0], [0, -120 / int(coarse[:, 0].sum())]
    np.testing.assert_allclose(seen.points[0, 0, :, 0], middle + cells, rtol=1e-5)
    np.testing.assert_allclose(seen.weights[0, 0, :, 0], [0.75, 0.25], rtol=1e-6)
    np.testing.assert_allclose(seen.box[2:] - seen.box[:2], [20, 12], rtol=1e-5)
    assert seen.gradients["x"].shape == (height, width)


@pytest.mark.parametrize("padded_size", [None, (130, 260)])
def test_gradients_of_a_closed_form(padded_size):
    """x = sum(red * x) / sum(red), so d x / d red = (x_pixel - x) / sum(red), where red is above a
    half: in 64 pixels by a half."""
    seen = explain(Toy(BrightSpot()), spot(), padded_size=padded_size)
    y, x = np.mgrid[:120, :200] + 0.5
    bright = (np.abs(x - 150) < 4) & (np.abs(y - 30) < 4)
    np.testing.assert_allclose(seen.gradients["x"], bright * np.abs(x - 150) / 32, atol=1e-4)
    np.testing.assert_allclose(seen.gradients["y"], bright * np.abs(y - 30) / 32, atol=1e-4)
    expected = np.zeros((120, 200))
    expected[0, 0] = 20 / 4
    np.testing.assert_allclose(seen.gradients["score"], expected, atol=1e-6)
    assert not seen.gradients["w"].any()


def test_smoothing_is_the_mean_over_noise():
    """The slope of the score is steepest where the green is 0, so that its mean over noise is less;
    that of x hardly changes."""
    plain = explain(Toy(BrightSpot()), spot())
    smooth = explain(Toy(BrightSpot()), spot(), noise=0.05)
    np.testing.assert_allclose(smooth.gradients["x"], plain.gradients["x"], atol=0.02)
    assert 0.6 < smooth.gradients["score"][0, 0] / plain.gradients["score"][0, 0] < 0.95
    assert not smooth.gradients["score"][1:].any()
    np.testing.assert_array_equal(smooth.points, plain.points)
    again = explain(Toy(BrightSpot()), spot(), noise=0.05)
    np.testing.assert_array_equal(again.gradients["score"], smooth.gradients["score"])


# detectors


def tiny_model(**changes):
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, dropout=0.0, **changes)
    model = DeformableDETR(config).double().eval()
    for head in model.box_heads:  # zero at first: boxes would stay where their references are
        torch.nn.init.normal_(head.layers[-1].weight)
    for module in model.modules():
        if isinstance(module, MSDeformAttn):  # or all queries would look alike
            torch.nn.init.normal_(module.sampling_offsets.weight, std=0.1)
            torch.nn.init.normal_(module.attention_weights.weight, std=0.1)
    return model


def picture(width=70, height=50, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def as_float64(image):
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).double() / 255


@pytest.mark.parametrize("two_stage", [False, True])
def test_perturbations_move_a_detection_as_the_gradients_say(two_stage):
    """Along the gradient of an item, by its norm; in a random direction far less."""
    model, image = tiny_model(two_stage=two_stage), picture()
    seen = explain(model, image, query=2, transform=as_float64)
    base = as_float64(image)
    row, column = np.unravel_index(seen.gradients["x"].argmax(), (50, 70))

    def middle(change):
        moved = base.clone()
        moved[:, row, column] += change
        box = explain(
            model, image, query=2, gradients=False, transform=lambda _: moved
        ).box.reshape(2, 2)
        return box.mean(0)[0]

    step = 1e-5
    slopes = [(middle(step * c) - middle(-step * c)) / (2 * step) for c in torch.eye(3).double()]
    assert np.linalg.norm(slopes) == pytest.approx(seen.gradients["x"][row, column], rel=1e-3)


@pytest.mark.parametrize("item", ["x", "score"])
def test_noise_on_pixels_moves_a_detection_as_their_energy_says(item):
    """Independent noise on some pixels moves an item by the root of their energy: of the shipped
    detector, on the tenth of the pixels with the largest norm, and on all others."""
    detector = load_detector(SHIPPED)
    look = Look(detector, SAMPLE)
    seen = look.at_detection(0)
    strong = seen.gradients[item] >= np.quantile(seen.gradients[item], 0.9)
    for chosen in (strong, ~strong):
        changes = []
        for seed in range(12):
            noise = torch.randn(3, 128, 128, generator=torch.Generator().manual_seed(seed))
            moved = look.batch.images[0].detach() + 0.003 * noise * torch.from_numpy(chosen)
            other = Look(detector, SAMPLE, transform=lambda _, m=moved: m, gradients=False)
            other = other.at_query(seen.query)
            values = [(e.score if item == "score" else e.box[::2].mean()) for e in (seen, other)]
            changes.append(values[1] - values[0])
        expected = 0.003 * np.sqrt(np.square(seen.gradients[item][chosen]).sum())
        assert 0.5 < np.sqrt(np.mean(np.square(changes))) / expected < 2  # of 12 draws


@pytest.mark.parametrize("exact_padding", [False, True])
@pytest.mark.parametrize("padded_size", [None, (80, 120)])
def test_references_of_all_layers_are_boxes_that_the_model_gave(exact_padding, padded_size):
    """Also where it reckons padding to the pixel: the second layer looks around the first one's."""
    model = tiny_model(exact_padding=exact_padding)
    look = Look(model, picture(57, 43), 0.0, as_float64, padded_size, gradients=False)
    before = look.trace.output.auxiliary[0].boxes[0]
    for query in range(6):
        seen = look.at_query(query)
        cx, cy, w, h = before[query].tolist()
        sides = np.array([57, 43, 57, 43])
        expected = np.array([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]) * sides
        np.testing.assert_allclose(seen.references[1], expected, rtol=1e-9, atol=1e-9)


def test_a_detection_is_the_one_that_predict_finds():
    detector = load_detector(SHIPPED)
    (found,) = predict(detector, SAMPLE)
    look = Look(detector, SAMPLE, gradients=False)
    assert len(found) == len(look) >= 4
    for i, query in enumerate(found.queries.tolist()):
        for seen in (look.at_detection(i), look.at_query(query)):
            assert (seen.query, seen.name) == (query, found.names[i])
            assert seen.score == pytest.approx(found.scores[i].item())
            np.testing.assert_allclose(seen.box, found.boxes[i], atol=1e-3)
            np.testing.assert_allclose(seen.weights.sum((-2, -1)), 1, rtol=1e-5)
            assert weight_shares(seen)["inside"] > 0.4  # it stands where the digit is


def test_every_token_reads_around_itself():
    """At a known place of every level: the reference is the middle of the cell."""
    look = Look(load_detector(SHIPPED), SAMPLE, gradients=False)
    for level, side in enumerate((4, 8, 16)):
        seen = look.at_token((100.0, 50.0), level)
        assert seen.token == (level, 50 // side, 100 // side)
        middle = [100 // side * side + side / 2, 50 // side * side + side / 2]
        np.testing.assert_allclose(seen.references, [middle * 2] * 2, rtol=1e-6)
        assert seen.points.shape == (2, 4, 3, 4, 2) and seen.box is None and not seen.gradients


def test_columns_are_a_table_of_all_points():
    seen = explain(load_detector(SHIPPED), SAMPLE, gradients=False)
    table = seen.columns()
    layer, head, level, point = 1, 2, 1, 3
    (row,) = np.flatnonzero(
        (table["layer"] == layer)
        & (table["head"] == head)
        & (table["level"] == level)
        & (table["point"] == point)
    )
    assert (table["x"][row], table["y"][row]) == tuple(seen.points[layer, head, level, point])
    assert table["weight"][row] == seen.weights[layer, head, level, point]
    middle = seen.references[layer].reshape(2, 2).mean(0)
    assert [table["reference_x"][row], table["reference_y"][row]] == middle.tolist()
    assert len({len(column) for column in table.values()}) == 1


SAMPLING = [
    name
    for name, (config, _) in MODELS.items()
    if "num_points" in {field.name for field in dataclasses.fields(config)}
]


@pytest.mark.parametrize("name", SAMPLING)
def test_all_members_that_sample(name):
    model = build(tiny(name)).eval()
    look = Look(model, picture(80, 64), threshold=0.0)
    seen = look.at_detection(1)
    assert set(seen.gradients) == set(ITEMS) and seen.gradients["x"].shape == (64, 80)
    assert all(norm.any() for norm in seen.gradients.values())
    layers = model.config.decoder_layers
    assert len(seen.points) == layers and seen.references.shape[0] == layers
    x0, y0, x1, y1 = seen.references[-1]
    assert 0 <= x0 + x1 <= 160 and 0 <= y0 + y1 <= 128  # its middle
    tokens = [look.at_middle_of(look.at_query(q)) for q in range(4)]
    tokens = [token for token in tokens if token]
    for token in tokens:  # in a sparse encoder hardly any is asked for
        _, row, column = token.token
        middle = [column * 4 + 2, row * 4 + 2]
        np.testing.assert_allclose(token.references[0], middle * 2, atol=1e-3)


def test_a_sparse_encoder_tells_which_tokens_it_updated():
    model = build(tiny("sparse_detr", rho=0.2)).eval()
    look = Look(model, picture(80, 64), threshold=0.0, gradients=False)
    chosen = set(look.trace.chosen.tolist())
    width = look.trace.shapes[0][1]
    for index in range(width):
        point = (index * 4 + 1.0, 1.0)
        if index in chosen:
            assert look.at_token(point).token == (0, 0, index)
        else:
            with pytest.raises(ValueError, match="this is none of them"):
                look.at_token(point)


# Hugging Face


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    config = transformers.DeformableDetrConfig(
        backbone_config=transformers.ResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 8, 16, 16],
            depths=[1] * 4,
            layer_type="basic",
            out_features=["stage2", "stage3", "stage4"],
        ),
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        **{"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 7},
        **{"encoder_attention_heads": 2, "decoder_attention_heads": 2},
        **{"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "with_box_refine": True},
        id2label={0: "ant", 1: "bee"},
    )
    model = transformers.DeformableDetrForObjectDetection(config).double().eval()
    for name, parameter in model.named_parameters():
        if "sampling_offsets" in name or "bbox_embed" in name or "attention_weights" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("padded_size", [None, (80, 128)])
def test_hugging_faces_model(theirs, padded_size):
    image = picture(90, 60)
    look = Look(theirs, image, 0.0, as_float64, padded_size)
    seen = look.at_query(3)
    assert seen.name in ("ant", "bee")
    assert seen.points.shape == (2, 2, 4, 4, 2) and set(seen.gradients) == set(ITEMS)
    batch = look.batch
    with torch.no_grad():
        output = theirs(pixel_values=batch.images, pixel_mask=(~batch.mask).long())
    cx, cy, w, h = output.intermediate_reference_points[0, 0, 3].tolist()
    sides = np.array([90, 60, 90, 60])
    expected = np.array([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]) * sides
    np.testing.assert_allclose(seen.references[1], expected, rtol=1e-6)
    cx, cy, w, h = output.pred_boxes[0, 3].tolist()
    expected = np.array([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]) * sides
    np.testing.assert_allclose(seen.box, expected, rtol=1e-6)
    token = look.at_token((45.0, 30.0))
    _, row, column = token.token
    (height, width), ratio = token.map_shapes[0], look.trace.ratios[0].numpy()
    middle = np.array([(column + 0.5) / width, (row + 0.5) / height]) / ratio * (90, 60)
    np.testing.assert_allclose(token.references[0], [*middle, *middle], rtol=1e-6)
    assert np.all(np.abs(middle - (45, 30)) <= np.array([90 / width, 60 / height]) / ratio / 2)


def test_hugging_faces_gradients_are_those_of_perturbations(theirs):
    image = picture(90, 60)
    base = as_float64(image)
    seen = explain(theirs, image, query=1, transform=as_float64)
    row, column = np.unravel_index(seen.gradients["h"].argmax(), (60, 90))

    def height(change):
        moved = base.clone()
        moved[:, row, column] += change
        box = explain(theirs, image, query=1, gradients=False, transform=lambda _: moved).box
        return box[3] - box[1]

    step = 1e-5
    slopes = [(height(step * c) - height(-step * c)) / (2 * step) for c in torch.eye(3).double()]
    assert np.linalg.norm(slopes) == pytest.approx(seen.gradients["h"][row, column], rel=1e-3)


def test_hugging_faces_model_with_our_operator(theirs):
    image = picture(90, 60)
    plain = explain(theirs, image, query=2, transform=as_float64)
    with use_in_transformers(theirs):
        ours = explain(theirs, image, query=2, transform=as_float64)
    np.testing.assert_allclose(ours.points, plain.points, rtol=1e-9)
    for item in ITEMS:
        np.testing.assert_allclose(ours.gradients[item], plain.gradients[item], rtol=1e-6)


# time


def test_it_takes_no_time_on_a_digits_image():
    """CPU seconds, so that a busy machine does not count: points in 2, gradients in 5."""
    detector = load_detector(SHIPPED)
    for gradients, limit in ((False, 2), (True, 5)):
        start = time.process_time()
        explain(detector, SAMPLE, gradients=gradients)
        assert time.process_time() - start < limit


# figures, measures and the page


def test_points_are_drawn_where_they_are_and_as_large_as_their_weight():
    seen = explain(load_detector(SHIPPED), SAMPLE, gradients=False)
    axes = seen.draw_points(layer=1, head=2, level=0)
    marks = [line for line in axes.lines if line.get_marker() == "o"]
    drawn = np.array([line.get_xydata()[0] for line in marks])
    points, weights = seen.points[1, 2, 0], seen.weights[1, 2, 0]
    order = np.argsort(-weights)
    np.testing.assert_allclose(drawn, points[order])
    sizes = [line.get_markersize() for line in marks]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) == 4
    all_marks = seen.draw_points(layer=1).lines
    assert {line.get_marker() for line in all_marks} == {"o", "s", "D", "+"}
    whole = seen.draw_points(whole=True)
    assert sorted(whole.get_xlim()) == [0, 128] and whole.get_ylim() == (128, 0)


def test_points_outside_the_picture_do_not_widen_the_view():
    """A token's points lie outside, and the view of the whole picture is the picture all the same;
    so it is where something was drawn over the gradients and over the picture alone."""
    seen = explain(load_detector(SHIPPED), SAMPLE, token=(4, 60), gradients=False)
    assert seen.points[0].min() < -1
    assert_whole(seen.draw_points(layer=0, whole=True), 128, 128)
    image = Image.new("RGB", (40, 30))
    for draw in (
        lambda axes: draw_gradient(axes, image, np.eye(30, 40)),
        lambda axes: draw_whole(axes, image, np.array([-5.0, -5, 50, 40])),
    ):
        axes = Figure().subplots()
        draw(axes)
        axes.plot([-9, 60], [-9, 60], "o")
        show(axes, None)
        assert_whole(axes, 40, 30)


def assert_whole(axes, width, height):
    """The view is the picture of that size, upright."""
    assert axes.get_xlim() == (0, width) and axes.get_ylim() == (height, 0)


def test_the_picture_beneath_stays_visible():
    """Under points and contours: what is drawn follows the picture itself, with a quarter of its
    contrast or more, in most of its parts in which there is something to see."""
    seen = explain(load_detector(SHIPPED), SAMPLE)
    for axes in (seen.draw_points(whole=True), seen.draw_gradients(whole=True)[4]):
        agg = FigureCanvasAgg(axes.figure)
        agg.draw()
        canvas = Image.fromarray(np.asarray(agg.buffer_rgba())[..., :3])
        box = axes.get_window_extent()
        crop = canvas.crop((box.x0, canvas.height - box.y1, box.x1, canvas.height - box.y0))
        shown = np.asarray(crop.resize((128, 128), Image.Resampling.BOX), float).mean(-1)
        beneath = np.asarray(seen.image, float).mean(-1)
        parts = [x.reshape(16, 8, 16, 8).swapaxes(1, 2).reshape(256, 64) for x in (beneath, shown)]
        parts = [(a, b) for a, b in zip(*parts, strict=True) if a.std() > 10]
        assert len(parts) > 40
        assert np.median([np.corrcoef(a, b)[0, 1] if b.std() else 0 for a, b in parts]) > 0.9
        assert np.median([b.std() / a.std() for a, b in parts]) > 0.25


def test_contours_hold_their_share_of_the_energy():
    energy = np.array([[8.0, 1], [4, 3]])
    assert holding(energy, 0.5) == 8 and holding(energy, 0.51) == 4 and holding(energy, 1) == 1


def test_regions_of_a_box():
    x, y = np.array([5, 10, 14, 5, 5, 15, -4]), np.array([10, 10, 10, 0, 21, 10, 10])
    found = regions(x, y, np.array([0, 0, 10, 20]))
    assert found["inside"].tolist() == [True, True, False, True, False, False, False]
    assert found["sides"].tolist() == [False, True, False, False, False, False, False]
    assert found["ends"].tolist() == [False, False, False, True, True, False, False]


def test_shares_of_a_closed_form():
    """All of the score's energy is in the first pixel, and none of it in the box."""
    seen = explain(Toy(BrightSpot()), spot())
    shares = energy_shares(seen)
    assert shares["score"] == {"inside": 0, "sides": 0, "ends": 0}
    assert shares["area"]["inside"] == pytest.approx(20 * 12 / (200 * 120))
    assert np.isnan(shares["w"]["inside"])
    assert shares["x"]["inside"] == pytest.approx(1)  # the spot is in the box
    # one point is 200 / 25 = 8 pixels to the right, the other 120 / 8 = 15 up: 0.75 is inside
    assert weight_shares(seen)["inside"] == pytest.approx(0.75)


class Page(html.parser.HTMLParser):
    """The tags of a page, and what its pictures are and say."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.text = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.images.append(dict(attributes))
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_command_writes_one_page(tmp_path, capsys):
    path = tmp_path / "new" / "page.html"
    assert main(["explain", str(SAMPLE), "--model", str(SHIPPED), "--output", str(path)]) == 0
    assert re.match(r"detection 0: zero 0\.9\d\n", capsys.readouterr().out)
    text = path.read_text("utf-8")
    assert "<script" not in text and not re.search(r"(src|href)='(?!data:)", text)
    page = Page(text)
    assert len(page.images) == 1 + 3 * 3 and all(image["alt"] for image in page.images)
    assert "Detection 2: zero" in page.text and "of the weight lies in the box" in page.text
    assert path.stat().st_size < 3e6


@pytest.mark.parametrize("width", [380, 1100])
def test_the_page_fits_the_window(tmp_path, width, chromium):
    """Of a telephone too, where figures scroll by themselves; every picture is shown."""
    look = Look(load_detector(SHIPPED), SAMPLE)
    seen = look.at_detection()
    which = {"layer": -1, "head": None, "level": None}
    text = write_page("unbroken" * 20, {"detection 0": seen}, [look.at_middle_of(seen)], which)
    (tmp_path / "page.html").write_text(text, "utf-8")
    page = chromium.new_page(viewport={"width": width, "height": 800})
    page.goto((tmp_path / "page.html").as_uri())
    needed = page.evaluate("document.documentElement.scrollWidth")
    sizes = page.evaluate("[...document.images].map(image => image.naturalWidth)")
    page.close()
    assert needed <= width and len(sizes) == 4 and min(sizes) > 300


def test_the_command_draws_a_picture_of_what_is_asked_for(tmp_path, capsys):
    path = tmp_path / "seen.png"
    options = ["--model", str(SHIPPED), "--output", str(path)]
    for what, lines in {
        ("--detection", "1", "3"): ["detection 1", "detection 3"],
        ("--query", "4", "--level", "0", "--layer", "1", "--head", "-1"): ["query 4"],
        ("--token", "64", "30.5", "--token-level", "1"): [],
    }.items():
        assert main(["explain", str(SAMPLE), *options, *what]) == 0
        said = capsys.readouterr().out.splitlines()
        assert [line.split(":")[0] for line in said[:-1]] == lines
        with Image.open(path) as drawn:
            assert drawn.width > 1000 and len(drawn.convert("L").getcolors()) > 100


def test_a_class_whose_name_is_no_html(tmp_path):
    """And a token's page, which has no box."""
    categories = [{"id": i, "name": name} for i, name in enumerate(("<b>&'", '"', "c"))]
    model = tiny_model().float()
    detector = Detector(model, categories, 0.0, "digits")
    file = tmp_path / "model.safetensors"
    detector.save_pretrained(file)
    picture().save(tmp_path / "<i>.png")
    path = tmp_path / "page.html"
    options = ["--model", str(file), "--output", str(path)]
    assert main(["explain", str(tmp_path / "<i>.png"), *options, "--query", "0"]) == 0
    page = Page(path.read_text("utf-8"))
    assert "<i>.png" in page.text
    assert main(["explain", str(tmp_path / "<i>.png"), *options, "--token", "3", "4"]) == 0
    assert len(Page(path.read_text("utf-8")).images) == 1


# errors


def test_errors_are_one_line(tmp_path, capsys):
    model = ["--model", str(SHIPPED)]
    empty, dense = tmp_path / "empty.png", tmp_path / "detr.safetensors"
    Image.new("RGB", (64, 64), "gray").save(empty)
    Detector(DETR(TINY_DETR), CATEGORIES).save_pretrained(dense)
    page = ["--output", str(tmp_path / "page.html")]
    for arguments, message in [
        ([str(SAMPLE), *model, "--detection", "9"], "detection must be 0 to 4, got 9"),
        ([str(SAMPLE), *model, "--query", "99"], "query must be 0 to"),
        ([str(SAMPLE), *model, "--token", "128", "3"], "must lie in the picture of 128 x 128"),
        ([str(SAMPLE), *model, "--token", "1", "3", "--token-level", "3"], "level must be 0 to 2"),
        ([str(SAMPLE), *model, "--layer", "3"], "layer must be 0 to 2, got 3"),
        ([str(SAMPLE), *model, "--head", "4"], "head must be 0 to 3, got 4"),
        ([str(SAMPLE), *model, "--level", "-4"], "level must be 0 to 2, got -4"),
        ([str(SAMPLE), *model, "--noise", "-1"], "noise must be at least 0, got -1.0"),
        ([str(SAMPLE), *model, "--noise", "1000"], "the object is not found any more"),
        ([str(empty), *model], "nothing is detected with a score of 0.5 or more; the best score"),
        ([str(SAMPLE), "--model", str(dense)], "no module of DETR samples"),
        ([str(tmp_path / "no.png"), *model], "no image at"),
        ([str(SAMPLE), *model, "--output", str(tmp_path / "x.pdf")], "must end in .html or .png"),
    ]:
        output = [] if "--output" in arguments else page
        assert main(["explain", *arguments, *output]) == 2, arguments
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ") and message in error and "\n" not in error
    assert not (tmp_path / "page.html").exists()


def test_wrong_arguments_of_explain():
    detector = load_detector(SHIPPED)
    with pytest.raises(ValueError, match="a query or a token, not both"):
        explain(detector, SAMPLE, query=1, token=(3, 4))
    with pytest.raises(ValueError, match=r"at least \(128, 128\), which the model sees"):
        explain(detector, SAMPLE, padded_size=(100, 200))
    with pytest.raises(TypeError, match=r"detector must be a Detector, a model .* got Linear"):
        explain(torch.nn.Linear(2, 2), SAMPLE)
    with pytest.raises(ValueError, match="there are no gradients"):
        explain(detector, SAMPLE, gradients=False).draw_gradients()


def test_the_model_is_left_as_it_was():
    model = tiny_model().train()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    explain(model, picture(), query=0, transform=as_float64)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert hooks == [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    assert all(p.grad is None for p in model.parameters())
