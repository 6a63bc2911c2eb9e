"""What the chapters on what matters and on linear cost say, from the tables of the studies."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from deformable_detr.evaluation.intervals import interval

RESULTS = Path(__file__).parents[1] / "data" / "results"
KINDS = ("dense", "windowed", "deformable", "deformable of 4 levels")


def rows(name):
    with (RESULTS / f"{name}.csv").open(encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["value"]]


def curves(name, metric):
    """{configuration: {seed: (tokens, values)}}."""
    found = {}
    for row in rows(name):
        if row["metric"] == metric:
            points = found.setdefault(row["configuration"], {}).setdefault(int(row["seed"]), [])
            points.append((int(row["at"]), float(row["value"])))
    return {
        name: {seed: tuple(np.array(sorted(points)).T) for seed, points in seeds.items()}
        for name, seeds in found.items()
    }


def slope(tokens, values):
    chosen = tokens >= 1024
    return np.polyfit(np.log(tokens[chosen]), np.log(values[chosen]), 1)[0]


COUNTS = {metric: curves("cost", metric) for metric in ("multiply_adds", "bytes_moved")}
COUNTS["peak_bytes"] = curves("cost", "peak_bytes")
CLOCK = curves("clock", "milliseconds")


@pytest.mark.parametrize("metric", COUNTS)
def test_by_count_dense_bends_and_the_others_are_linear(metric):
    exponents = {kind: slope(*COUNTS[metric][f"{kind}, encoder"][0]) for kind in KINDS}
    assert 1.8 < exponents.pop("dense") <= 2.05
    assert all(0.95 < exponent < 1.01 for exponent in exponents.values())


def test_by_count_deformable_attention_is_the_cheapest_at_every_size():
    ours = COUNTS["multiply_adds"]["deformable, encoder"][0][1]
    for kind in ("dense", "windowed", "deformable of 4 levels"):
        assert (COUNTS["multiply_adds"][f"{kind}, encoder"][0][1] > ours).all()


def test_the_small_terms_are_small_at_one_level_only():
    C, M, K = 256, 8, 4
    small = [(5 + 3 * M) * levels * K for levels in (1, 2, 4)]
    assert small[0] < small[1] < C < small[2]
    one, four = (
        COUNTS["multiply_adds"][f"{kind}, encoder"][0] for kind in ("deformable", KINDS[-1])
    )
    assert four[1][-1] / four[0][-1] == 2 * C**2 + small[2] * C
    assert one[1][-1] / one[0][-1] == 2 * C**2 + small[0] * C


def test_fused_dense_attention_holds_no_matrix():
    held = curves("clock", "peak_bytes")
    fused, kept = (dict(zip(*held[name][0], strict=True)) for name in ("dense", KEPT))
    assert kept[4096] > 20 * fused[4096]
    assert slope(*held["dense"][0]) < 1.1


KEPT = "dense, weights kept"


def test_by_the_clock_there_is_a_crossing_below_a_thousand_tokens():
    """In each repeat: dense attention is quicker at 64 tokens, and slower from 1,024 on."""
    for seed, (tokens, dense) in CLOCK["dense"].items():
        ours = CLOCK["deformable"][seed][1]
        assert dense[0] < ours[0]
        assert (dense > ours)[tokens >= 1024].all()
        four = np.interp(tokens, *CLOCK["deformable of 4 levels"][seed])
        assert dense[0] < four[0] and (dense > four)[tokens >= 1024].all()


def test_by_the_clock_only_dense_attention_rises_per_token():
    for name, seeds in CLOCK.items():
        for tokens, milliseconds in seeds.values():
            per_token = milliseconds / tokens
            growth = per_token[-1] / per_token[tokens >= 256][0]
            assert growth > 3 if name.startswith("dense") else growth < 1.5


def test_plain_pytorch_needs_more_tokens_to_win():
    for seed, (tokens, dense) in CLOCK["dense"].items():
        plain, ours = (CLOCK[f"deformable{s}"][seed][1] for s in (", plain PyTorch", ""))
        assert (plain > ours).all() and (plain > dense)[tokens <= 256].all()


def test_the_clock_says_on_which_machine():
    about = json.loads((RESULTS / "clock.json").read_text(encoding="utf-8"))
    assert about["cpu"] and about["cores"] and about["versions"]["torch"]


MEASURED = {
    (r["configuration"], r["split"], r["metric"]): float(r["value"]) for r in rows("thresholds")
}
RULES = list(dict.fromkeys(name for name, _, _ in MEASURED))
HEAVIEST = [name for name in RULES if "heaviest" in name] + ["all"]


def points(name):
    return np.mean([MEASURED[name, "test", f"{part}_points"] for part in ("encoder", "decoder")])


def against_the_same_number(name):
    """Differences in AP, on each fifth of the images, from the heaviest points, as many."""
    rivals = sorted(HEAVIEST, key=points)
    found = []
    for fold in range(5):
        part = f"test, part {fold}"
        same = np.interp(
            points(name), [points(r) for r in rivals], [MEASURED[r, part, "ap"] for r in rivals]
        )
        found.append(MEASURED[name, part, "ap"] - same)
    return interval(found)


def test_a_k_of_its_own_for_each_query_brings_next_to_nothing():
    for name in (name for name in RULES if "least" in name):
        found = against_the_same_number(name)
        if points(name) > 5:
            assert found.low > -0.005 and found.high < 0.0055
        elif points(name) < 2.5:
            assert found.high < 0 and found.low < -0.0055
        else:
            assert found.low < 0 < found.high


def test_eight_of_twelve_points_keep_the_ap_and_four_most_of_it():
    ap = {name: MEASURED[name, "test", "ap"] for name in HEAVIEST}
    assert abs(ap["8 heaviest"] - ap["all"]) < 0.003
    assert 0.035 > ap["all"] - ap["4 heaviest"] > 0.01


def test_without_the_finest_map_small_digits_are_lost_and_large_ones_suffer_least():
    left = [
        MEASURED["none at stride 4", "test", f"ap_{size}"] / MEASURED["all", "test", f"ap_{size}"]
        for size in ("small", "medium", "large")
    ]
    assert left[0] < 0.05 < left[1] < left[2]


def differences(name, ours, theirs, metric):
    runs = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["runs"]
    values = {(r["variant"], r["seed"]): r["val"][metric] for r in runs}
    seeds = sorted({seed for variant, seed in values if variant == ours})
    return interval([values[ours, seed] - values[theirs, seed] for seed in seeds])


def test_refinement_two_stages_and_an_open_gradient_are_seen_in_short_trainings():
    assert differences("refinement", "refinement", "plain", "ap").low > 0
    assert differences("refinement", "refinement, two stages", "refinement", "ap").low > 0
    assert differences("gradient_cut", "open", "cut", "loss_giou").high < 0


def test_the_schematic_shows_what_the_study_changes():
    from schematics.what_matters import GROUPS

    study = json.loads((RESULTS / "ablations.json").read_text(encoding="utf-8"))
    shown = [change for _, _, changes in GROUPS for change in changes]
    names = [name.removeprefix("offsets ") for name in study["configurations"]]
    assert set(names[1:]) <= set(shown) and names[0] == "base"


def in_training(part, size, metric):
    """(seeds, steps): what training does to points."""
    (seeds,) = curves("points", f"{part}_{size}_{metric}").values()
    return np.array([values for _, values in seeds.values()])


@pytest.mark.parametrize("size", ["small", "medium", "large"])
def test_points_keep_most_of_their_star_and_next_to_nothing_is_a_querys_own(size):
    for part in ("encoder", "decoder"):
        assert in_training(part, size, "direction").min() > 0.85
        assert in_training(part, size, "own").max() < 0.02


def test_in_the_decoder_boxes_move_points_and_in_the_encoder_lengths_fall_for_all_sizes():
    small, large = (in_training("decoder", size, "length") for size in ("small", "large"))
    assert large[:, 0].max() < 1.55 * small[:, 0].min()
    assert (small[:, -1] < small[:, 0]).all() and (large[:, -1] > 2 * large[:, 0]).all()
    ends = [in_training("encoder", size, "length")[:, -1] for size in ("small", "medium", "large")]
    assert np.max(ends) < 0.75 * 30 and (np.max(ends, 0) < 1.15 * np.min(ends, 0)).all()


def test_the_finer_map_takes_over_and_large_digits_keep_twice_as_much_on_the_other():
    for part, least in (("encoder", 0.7), ("decoder", 0.85)):
        for size in ("small", "medium", "large"):
            assert in_training(part, size, "level_0")[:, -1].min() > least
    small, large = (in_training("decoder", s, "level_1")[:, -1] for s in ("small", "large"))
    assert ((large > 1.8 * small) & (large < 2.4 * small)).all()
    small, large = (in_training("encoder", s, "level_1")[:, -1] for s in ("small", "large"))
    assert {True, False} == set((large > small).tolist())
