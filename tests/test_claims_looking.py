"""What the chapter on looking says of the shipped detector: each figure in its text is that of
data/results/looking.json, and each verdict would fall if the measurement changed."""

import json
import re
from pathlib import Path

import pytest

from deformable_detr.inference.detector import load_detector
from deformable_detr.look.asking import Look

ROOT = Path(__file__).parents[1]
FOUND = json.loads((ROOT / "data" / "results" / "looking.json").read_text())
DECODER, ENCODER = FOUND["decoder"]["layers"], FOUND["encoder"]["layers"]
LAST, GRADIENT = DECODER[-1], FOUND["gradient"]["items"]
SIZES = ("small", "medium", "large")


@pytest.fixture(scope="module")
def text():
    """The chapter's prose in one line."""
    source = (ROOT / "chapters" / "13_looking.py").read_text(encoding="utf-8")
    lines = [line[2:] for line in source.splitlines() if line.startswith("# ")]
    return re.sub(r"[*$]", "", " ".join(lines))


def edge_ranks(layers):
    return [layer["edge rank"]["all"]["own minus borrowed"][0] for layer in layers]


def energy(item, region, kind="own"):
    return GRADIENT[item][region]["all"][kind][0]


def reach(size):
    return ENCODER[1]["mean distance in pixels"][size]["own"][0]


QUOTED = (
    ("{:.3f} of the last layer's weight lies inside", [LAST["inside"]["all"]["own"][0]]),
    (
        "would have {:.3f} of the weight inside, and a star that has learned nothing has {:.3f}",
        [LAST["inside"]["all"][kind][0] for kind in ("unweighted", "untrained")],
    ),
    (
        "The last layer has {:.3f} of its weight there; equal weights would put {:.3f} there",
        [LAST["border"]["all"][kind][0] for kind in ("own", "unweighted")],
    ),
    ("({:.2f} for head 0", LAST["border of heads"][:1]),
    ("{:.2f} for head 3)", LAST["border of heads"][3:]),
    (
        "({:.2f} on the finest map, which has {:.2f} of all weight",
        [LAST["border of levels"][0], LAST["weight of levels"][0]],
    ),
    (
        "over the whole box of a digit is {:.3f}",
        [LAST["edge rank"]["all"]["all of the box"][0]],
    ),
    ("it is nothing, {:.3f}; in the last it is {:.3f}", edge_ranks(DECODER)[::2]),
    ("in the second it is {:.3f}", edge_ranks(ENCODER)[1:]),
    ("{:.3f}, {:.3f}, {:.3f} in the three layers", edge_ranks(DECODER)),
    (
        "{:.3f} of a token's weight stays on its digit, and with a pattern borrowed from a token "
        "on another digit it is {:.3f}",
        [ENCODER[1]["stays in the object"]["all"][kind][0] for kind in ("own", "borrowed")],
    ),
    (
        "the untrained {:.3f} does not depend",
        [ENCODER[1]["stays in the object"]["all"]["untrained"][0]],
    ),
    (
        "on a small digit lies {:.1f} pixels away, on a large one {:.1f}",
        [reach("small"), reach("large")],
    ),
    ("encoder: {:.1f}, {:.1f} and {:.1f} pixels", [reach(size) for size in SIZES]),
    (
        "the gradient of x is {:.1f} times as strong (in energy) at the sides as at the ends, and "
        "that of y {:.2f} times",
        [GRADIENT[item]["sides to ends"]["all"][0] for item in "xy"],
    ),
    (
        "For x it is clearer the larger the object: {:.1f}, {:.1f} and {:.1f} times on small, "
        "medium and large digits",
        [GRADIENT["x"]["sides to ends"][size][0] for size in SIZES],
    ),
    (
        "under the same box: {:.3f} of it lies inside, hardly more than the box's {:.3f} of the "
        "area",
        [energy("x", "inside", "another's"), energy("x", "inside", "area")],
    ),
    (
        "The middle of the box has {:.3f} of its energy, twice as much as for x ({:.3f})",
        [energy("score", "middle"), energy("x", "middle")],
    ),
    (
        "only {:.3f} of the score's energy lies inside the box, {:.3f} lies beyond the band, and "
        "the border (sides and ends) has {:.3f}",
        [energy("score", region) for region in ("inside", "farther", "border")],
    ),
    ("over {} detections", [FOUND["gradient"]["detections"]["all"]]),
)


@pytest.mark.parametrize(("sentence", "figures"), QUOTED, ids=[words for words, _ in QUOTED])
def test_a_figure_in_the_text_is_the_one_that_was_measured(text, sentence, figures):
    assert sentence.format(*figures) in text


def test_the_last_layer_does_not_spread_its_weight_over_the_object():
    """A.6: the whole foreground instance. Here: the middle and the border, and less between."""
    border = LAST["border"]["all"]
    assert border["own"][1] > 2 * border["unweighted"][2]
    ends = FOUND["distances"]
    density = [
        weight / (far**2 - near**2)
        for weight, near, far in zip(LAST["weight by distance"], ends[:-1], ends[1:], strict=True)
    ]
    middle, between, at_border = max(density[1:4]), min(density[5:8]), max(density[8:10])
    assert middle > 2 * between and at_border > 1.5 * between


def test_weight_favours_points_outside_the_box():
    inside = LAST["inside"]["all"]
    assert inside["own minus unweighted"][2] < 0 and inside["own minus untrained"][2] < 0


def test_heads_divide_border_and_inside_and_sizes_do_not():
    heads, border = LAST["border of heads"], LAST["border"]
    assert min(heads[0], heads[2]) > 0.7 and max(heads[1], heads[3]) < 0.2
    sizes = [border[size]["own"][0] for size in SIZES]
    assert max(sizes) - min(sizes) < 0.1 < max(heads) - min(heads)
    assert max(LAST["border of levels"][1:]) < 0.11


def test_a_borrowed_pattern_brings_its_place_in_the_box_along():
    """So of measures of the box alone its mean is the own one, whatever the patterns are."""
    for layer in DECODER:
        for size in SIZES:
            _, low, high = layer["border"][size]["own minus borrowed"]
            assert low < 0.001 and high > -0.001 and high - low < 0.03


def test_the_band_at_the_border_has_the_area_that_the_text_says(text):
    wide, narrow = (1 + FOUND["border"]) ** 2, (1 - FOUND["border"]) ** 2
    assert f"{wide - narrow:.1f} of the area of the box" in text
    assert f"({1 - narrow:.2f} inside it and {wide - 1:.2f} outside)" in text


def test_points_find_edges_in_later_layers_only():
    for layers in (DECODER, ENCODER):
        first, *later = (layer["edge rank"]["all"]["own minus borrowed"] for layer in layers)
        assert first[0] < 0.002
        assert all(low > 0.02 for _, low, _ in later)


def test_the_encoder_separates_instances_a_little_and_does_not_adapt_to_scale():
    stays = [layer["stays in the object"]["all"] for layer in ENCODER]
    assert stays[0]["own minus borrowed"][2] < 0 < stays[1]["own minus borrowed"][1]
    assert stays[1]["borrowed"][0] - stays[1]["untrained"][0] > (
        3 * stays[1]["own minus borrowed"][0]
    )
    assert max(map(reach, SIZES)) < 1.1 * min(map(reach, SIZES))


def test_boxes_are_decided_at_their_borders_and_less_than_half_of_the_score_inside():
    """A.5, of which the second half is often told as if all of the score were inside."""
    for item, across in (("x", True), ("w", True), ("y", False), ("h", False)):
        ratio = GRADIENT[item]["sides to ends"]
        assert all((ratio[size][1] > 3 if across else ratio[size][2] < 0.4) for size in SIZES)
    assert GRADIENT["score"]["inside"]["all"]["own"][2] < 0.5
    assert energy("score", "middle") > 2 * energy("x", "middle")


def test_queries_of_the_running_example_are_what_the_caption_says():
    detector = load_detector(ROOT / "data" / "checkpoints" / "digits.safetensors")
    look = Look(detector, ROOT / "data" / "samples" / "000010.png", gradients=False)
    seven, second = look.at_query(0), look.at_query(10)
    assert (seven.name, look.queries.tolist()) == ("seven", [0])
    assert second.score < 0.05 and abs(second.box - seven.box).max() < 4
    for query in range(30):
        seen = look.at_query(query)
        low, high = seen.references[-1].reshape(2, 2)
        far = abs((seen.points[-1] - (low + high) / 2) / ((high - low) / 2)).max(-1)
        assert (seen.weights[-1] * (far <= 1.3)).sum() > 0.9 * seen.weights[-1].sum()
