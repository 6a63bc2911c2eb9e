"""What the chapter on looking says of the shipped detector: each verdict would fall if the
measurement in data/results/looking.json changed."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

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


def energy(item, region, kind="own"):
    return GRADIENT[item][region]["all"][kind][0]


def reach(size):
    return ENCODER[1]["mean distance in pixels"][size]["own"][0]


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
    assert min(heads[0], heads[2]) > 0.7 and max(heads[1], heads[3]) < 0.25
    sizes = [border[size]["own"][0] for size in SIZES]
    assert max(sizes) - min(sizes) < 0.1 < max(heads) - min(heads)
    assert max(LAST["border of levels"][1:]) < 0.3 * LAST["border of levels"][0]


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
        2 * stays[1]["own minus borrowed"][0]
    )
    assert max(map(reach, SIZES)) < 1.15 * min(map(reach, SIZES)) and reach("small") > reach(
        "large"
    )


def test_boxes_are_decided_at_their_borders_and_less_than_half_of_the_score_inside():
    """A.5, of which the second half is often told as if all of the score were inside."""
    for item, across in (("x", True), ("w", True), ("y", False), ("h", False)):
        ratio = GRADIENT[item]["sides to ends"]
        assert all((ratio[size][1] > 3 if across else ratio[size][2] < 0.4) for size in SIZES)
    assert GRADIENT["score"]["inside"]["all"]["own"][2] < 0.5
    assert energy("x", "inside", "another's") < 1.5 * energy("x", "inside", "area")
    assert energy("score", "middle") > 2 * energy("x", "middle")


def test_queries_of_the_running_example_are_what_the_caption_says():
    detector = load_detector(ROOT / "data" / "checkpoints" / "digits.safetensors")
    look = Look(detector, ROOT / "data" / "samples" / "000010.png", gradients=False)
    assert (look.at_query(0).name, look.queries.tolist()) == ("seven", [0])
    seven = torch.from_numpy(look.at_query(0).box)[None]
    for query in range(30):
        seen = look.at_query(query)
        if query > 0:
            assert box_iou(seven, torch.from_numpy(seen.box)[None]) < 0.5
        if 1 <= query <= 5:
            centre = (seen.box[:2] + seen.box[2:]) / 2
            assert seen.score < 0.3
            assert min(np.linalg.norm(centre - speck) for speck in ((86, 39), (105, 27))) < 4
        low, high = seen.references[-1].reshape(2, 2)
        far = abs((seen.points[-1] - (low + high) / 2) / ((high - low) / 2)).max(-1)
        assert (seen.weights[-1] * (far <= 1.3)).sum() > 0.9 * seen.weights[-1].sum()
