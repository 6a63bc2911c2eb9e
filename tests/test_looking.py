"""What the detector looks at, measured: on points and gradients of which the answer is known."""

import json

import numpy as np
import pytest

from deformable_detr.provenance import checksum
from tests.test_experiments import FOLDER, study  # noqa: F401


def gathered(figures, **arrays):
    result = figures.Gathered()
    result.add(**arrays)
    return result


def test_intervals_are_over_images(study):  # noqa: F811
    """A hundred rows of one image are one draw, so that they make no interval narrow."""
    figures = study("looking_figures")
    values, images = np.arange(8.0), np.arange(8)
    mean, low, high = figures.interval(values, images)
    assert mean == 3.5 and 1.5 < low < 2.5 and 4.5 < high < 5.5
    repeated = figures.interval(values.repeat(100), images.repeat(100))
    assert repeated == [mean, low, high]
    assert figures.interval(np.array([np.nan, 2, 2]), np.arange(3)) == [2, 2, 2]
    assert figures.interval(np.array([np.nan]), np.arange(1)) is None


def test_what_the_decoder_looks_at_is_measured(study):  # noqa: F811
    """Two detections of one layer, head and level: three quarters of the weight on the right edge,
    where the picture has one, and the rest in the middle."""
    figures = study("looking_figures")
    box = np.array([[20.0, 20, 40, 40], [60, 60, 80, 80]])
    middle, half = box.reshape(2, 2, 2).mean(1), 10
    edge = middle + np.array([half - 0.5, 0])
    points = np.stack([edge, middle, middle, middle], 1).reshape(2, 1, 1, 1, 4, 2)
    weights = np.array([0.75, 0.25, 0, 0]).reshape(1, 1, 1, 1, 4).repeat(2, 0)
    reference = np.concatenate([middle, [[20, 20]] * 2], 1)[:, None]
    found = gathered(
        figures, image=np.arange(2), points=points, weights=weights, reference=reference, box=box
    )
    ranks = np.zeros((2, 128, 128))
    ranks[0, :, 39] = ranks[1, :, 79] = 1
    result = figures.decoder(found, ranks)
    assert result["detections"] == {"all": 2, "small": 0, "medium": 2, "large": 0}
    (layer,) = result["layers"]
    for measure in ("border", "edge rank"):
        assert layer[measure]["all"]["own"] == [0.75] * 3
        assert layer[measure]["medium"]["unweighted"] == [0.25] * 3
        assert layer[measure]["small"]["own"] is None
        assert layer[measure]["all"]["borrowed"] == [0.75] * 3  # the other's, moved here
        assert layer[measure]["all"]["own minus unweighted"] == [0.5] * 3
    assert layer["inside"]["all"]["own"] == [1] * 3
    assert layer["weight by distance"][0] == 0.25 and layer["weight by distance"][9] == 0.75
    assert layer["border of heads"] == layer["border of levels"] == [0.75]
    # a star of 4 points to the right: its last one lies on the edge
    assert layer["border"]["all"]["untrained"] == [0.25] * 3


def test_what_the_encoder_looks_at_is_measured(study):  # noqa: F811
    """Tokens that look 30 pixels to the right: out of an object 20 pixels wide, and on an edge."""
    figures = study("looking_figures")
    box = np.array([[20.0, 20, 40, 40], [60, 60, 80, 80], [0, 0, 0, 0]])
    reference = np.array([[30.0, 30], [70, 70], [10, 100]])[:, None]
    points = (reference[:, 0] + (30, 0)).reshape(3, 1, 1, 1, 1, 2).repeat(2, 4)
    points[:, ..., 1, :] = reference[:, 0].reshape(3, 1, 1, 1, 2)
    weights = np.array([0.6, 0.4]).reshape(1, 1, 1, 1, 2).repeat(3, 0)
    tokens = gathered(
        figures, image=np.arange(3), points=points, weights=weights, reference=reference, box=box
    )
    ranks = np.zeros((3, 128, 128))
    ranks[0, :, 60] = ranks[1, :, 100] = ranks[2, :, 40] = 1
    result = figures.encoder(tokens, ranks)
    assert result["tokens"]["all"] == 2 and result["tokens"]["background"] == 1
    (layer,) = result["layers"]
    stays, edges = layer["stays in the object"], layer["edge rank"]
    assert stays["all"]["own"] == [0.4] * 3 and "background" not in stays
    assert edges["all"]["own"] == edges["background"]["own"] == [0.6] * 3
    assert edges["all"]["turned"][0] < 0.6 and stays["all"]["turned"] == [0.4] * 3
    assert layer["mean distance in pixels"]["medium"]["own"] == [18] * 3


def test_where_a_gradients_energy_lies_is_measured(study):  # noqa: F811
    """All of x in the column of the right edge, and all else far away."""
    figures = study("looking_figures")
    box = np.array([[20.0, 20, 40, 40], [60, 60, 80, 80]])
    energy = np.zeros((2, 5, 128, 128))
    energy[0, 0, 25:35, 39] = energy[1, 0, 65:75, 79] = 1
    energy[:, 1:, 0, 0] = 1
    result = figures.gradient(gathered(figures, image=np.arange(2), energy=energy, box=box))
    x = result["items"]["x"]
    for part, share in (("sides", 1), ("border", 1), ("inside", 1), ("ends", 0), ("middle", 0)):
        assert x[part]["all"]["own"] == [share] * 3
    assert x["sides"]["all"]["another's"] == [0] * 3
    assert x["inside"]["all"]["area"][0] == pytest.approx(400 / 128**2, abs=1e-4)
    assert result["items"]["score"]["farther"]["all"]["own"] == [1] * 3


def test_looking_is_gathered_and_measured(study):  # noqa: F811
    """Two test images, by the shipped detector: all of it, and figures that are shares."""
    looking, figures = study("looking"), study("looking_figures")
    model = looking.load_detector(looking.CHECKPOINTS / "digits.safetensors").model
    dataset = looking.load_split("test", looking.digits_eval_transform())
    dataset.image_ids = dataset.image_ids[:2]
    found, tokens, gradients = looking.gather(model, dataset, size=2, every=1)
    N = len(found["image"])
    assert N > 2 and found["points"].shape == (N, 3, 4, 3, 4, 2)
    assert tokens["weights"].shape[1:] == (2, 4, 3, 4) and gradients["energy"].shape[0] == 2
    np.testing.assert_allclose(found["weights"].sum((-2, -1)), 1, rtol=1e-5)
    result = figures.measure(found, tokens, gradients, figures.edge_ranks(dataset))
    for layer in result["decoder"]["layers"]:
        assert 0.3 < layer["inside"]["all"]["own"][0] <= 1
    assert result["gradient"]["detections"]["all"] == 2
    json.dumps(result, allow_nan=False)


def test_looking_was_measured_on_the_shipped_detector():
    root = FOLDER.parent / "data"
    stored = json.loads((root / "results" / "looking.json").read_text("utf-8"))
    assert stored["weights"] == checksum(root / "checkpoints" / "digits.safetensors")
    assert stored["gradient"]["detections"]["all"] > 900  # of as many images
