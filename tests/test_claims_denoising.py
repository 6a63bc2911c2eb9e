"""What chapter denoising says of noise, of the published readings and of the family, checked
against the library and the tables it reads."""

import csv
import dataclasses
from pathlib import Path

import pybtex.database
import pytest
import torch
from torchvision.ops import box_iou

from deformable_detr.boxes import cxcywh_to_xyxy, inverse_sigmoid
from deformable_detr.evaluation.intervals import verdict
from deformable_detr.models import denoising
from deformable_detr.models.anchors import AnchorDecoder
from tests.members import build, make_batch, tiny

ROOT = Path(__file__).parents[1]
SEVEN = torch.tensor([[0.47, 0.69, 0.27, 0.42]])  # about the running example's box


def overlaps(boxes):
    return box_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(SEVEN))[:, 0]


def test_noise_of_dn_detr_leaves_about_as_much_overlap_as_the_prediction_says():
    """At 0.4 a mean IoU nearer to 0.6 than to 0.9 or 0.3; at 1.0 a side may shrink to nothing."""
    torch.manual_seed(0)
    draws = 2 * torch.rand(10_000, 4) - 1
    usual, wild = (denoising.shift(SEVEN.expand(10_000, 4), draws, s) for s in (0.4, 1.0))
    assert 0.5 < overlaps(usual).mean() < 0.7
    assert wild[:, 2:].min() < 0.01 and overlaps(usual).min() > 0.3


def test_nearly_half_of_far_copies_are_slivers_in_the_official_reading():
    """7 of 16 have a crossed pair of edges, and their negative sides become 0.001."""
    torch.manual_seed(0)
    moves = 2 * torch.rand(20_000, 4) - 1
    far = moves + torch.where(moves < 0, -1.0, 1.0)
    crossed = denoising.move_edges(SEVEN.expand(20_000, 4), far, 1.0, sort=False)
    share = (crossed[:, 2:] < 0).any(-1).float().mean().item()
    assert share == pytest.approx(7 / 16, abs=6 * (7 / 16 * 9 / 16 / 20_000) ** 0.5)
    sides = inverse_sigmoid(torch.tensor([-0.2, 0.0]), AnchorDecoder.eps).sigmoid()
    assert torch.allclose(sides, torch.tensor(0.001), atol=1e-5)


def test_near_copies_overlap_more_than_far_ones():
    torch.manual_seed(0)
    moves = 2 * torch.rand(5_000, 4) - 1
    far = moves + torch.where(moves < 0, -1.0, 1.0)
    near, far = (denoising.move_edges(SEVEN.expand(5_000, 4), x, 1.0) for x in (moves, far))
    assert overlaps(near).mean() > 2 * overlaps(far).mean() > 0


@pytest.mark.parametrize("counts", [(1, 3, 2), (3, 3, 3), (0, 2, 1)])
def test_background_places_of_the_official_reading_grow_with_the_imbalance(counts):
    """(2BN - n) / n of them for each object that must be found; else one."""
    n, most = sum(counts), max(counts)
    for empty_places in (False, True):
        model = build(tiny("dino", denoising_pairs=6, empty_places=empty_places)).train()
        batch = make_batch(*counts)
        queries, _ = model.queries(model.encoder(model.tokens(batch)), batch.targets)
        known = queries.denoising
        judged = 3 * known.size if empty_places else int(known.counted.sum())
        found = sum(len(places) for places, _ in known.matches)
        expected = (2 * len(counts) * most - n) / n if empty_places else 1
        assert (judged - found) / found == pytest.approx(expected)


@pytest.mark.parametrize("counts", [(1, 3, 2), (2, 2, 0)])
def test_rule_two_a_group_never_sees_another(counts):
    """Each place sees its own group and the learned queries: counted by row."""
    model, batch = build(tiny("dn_detr", denoising_groups=3)).train(), make_batch(*counts)
    queries, _ = model.queries(model.encoder(model.tokens(batch)), batch.targets)
    visible = (~queries.attention_mask).sum(1)
    total = queries.content.shape[1] - queries.denoising.size
    assert (visible[: queries.denoising.size] == max(counts) + total).all()
    assert (visible[queries.denoising.size :] == total).all()


def test_inference_needs_all_parameters_but_the_table_of_classes():
    for name in ("dn_detr", "dino"):
        model, batch = build(tiny(name)).eval(), make_batch(2, 1)
        output = model(dataclasses.replace(batch, targets=None))
        parts = [*output.auxiliary, output]
        sum(part.logits.sum() + part.boxes.sum() for part in parts).backward()
        unused = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
        unused = {n for n in unused if not n.startswith("first_stage")}  # they choose
        assert unused == {"label_embed.weight"}


def test_five_of_dinos_eight_authors_wrote_dn_detr_and_none_deformable_detr():
    entries = pybtex.database.parse_file(ROOT / "book" / "references.bib").entries
    dino, dn, base = (
        {
            " ".join(person.first_names + person.last_names)
            for person in entries[key].persons["author"]
        }
        for key in ("zhang2023dino", "li2022dn", "zhu2021deformable")
    )
    assert len(dino) == 8 and len(dino & dn) == 5 and not dino & base


@pytest.mark.parametrize("name", ["members", "denoising", "dino"])
def test_the_tables_have_what_the_chapter_asks_of_them(name):
    """Every finished training has AP on test and instability on val, between 0 and 1."""
    with open(ROOT / "data" / "results" / f"{name}.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["status"] == "done"]
    trials = {(row["configuration"], row["seed"]) for row in rows}
    for metric, split in (("ap", "test"), ("ap_small", "test"), ("instability", "val")):
        found = {
            (row["configuration"], row["seed"]): float(row["value"])
            for row in rows
            if row["metric"] == metric and row["split"] == split
        }
        assert found.keys() == trials and all(0 <= value <= 1 for value in found.values())


def test_without_contrast_there_are_as_many_near_copies_and_no_far_ones():
    places = {}
    for copies in (2, 1):
        model, batch = build(tiny("dino", denoising_pairs=6)).train(), make_batch(2, 1)
        model.copies = copies
        known = model.queries(model.encoder(model.tokens(batch)), batch.targets)[0].denoising
        found = sum(len(matched) for matched, _ in known.matches)
        places[copies] = found, int(known.counted.sum()) - found
    assert places[2] == (places[1][0], places[1][0]) and places[1][1] == 0


def test_kinds_of_errors_are_of_as_many_boxes_as_there_are_digits():
    """The same number for all trainings, some of them duplicates."""
    with open(ROOT / "data" / "results" / "dino.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["status"] == "done"]
    kinds, boxes = ("correct", "class", "place", "both", "duplicate", "background"), {}
    for row in rows:
        if row["metric"] in kinds:
            trial = boxes.setdefault((row["configuration"], row["seed"]), {})
            trial[row["metric"]] = float(row["value"])
    totals = {sum(trial.values()) for trial in boxes.values()}
    assert len(totals) == 1 and all(trial["duplicate"] > 0 for trial in boxes.values())


def test_the_less_stable_of_two_detectors_can_be_the_better_one():
    """With refinement more digits change their query until the end, and AP is higher."""
    with open(ROOT / "data" / "results" / "convergence.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["status"] == "done"]

    def last(name, metric, split):
        found = {}
        for row in rows:
            if (row["configuration"], row["metric"], row["split"]) == (name, metric, split):
                found[row["seed"]] = float(row["value"])
        return sum(found.values()) / len(found)

    for metric, split in (("instability", "val"), ("ap", "test")):
        plain, refined = (last(n, metric, split) for n in ("two maps", "two maps, refinement"))
        assert refined > 1.5 * plain > 0


def test_noise_calms_dn_detrs_matching_and_pairs_raise_dinos_ap():
    found = {}
    for name in ("members", "denoising"):
        with open(ROOT / "data" / "results" / f"{name}.csv", newline="") as file:
            for row in csv.DictReader(file):
                if row["status"] == "done" and row["at"] == "300":
                    key = row["configuration"], row["split"], row["metric"]
                    found.setdefault(key, []).append(float(row["value"]))
    with_noise, without = (
        found[name, "val", "instability"] for name in ("DN-DETR", "DN-DETR, no groups")
    )
    assert verdict(without, with_noise).startswith("better")  # more of it
    assert verdict(found["DINO", "test", "ap"], found["DINO, no pairs", "test", "ap"]).startswith(
        "better"
    )
    without = found["DN-DETR, no groups", "test", "ap"]
    assert verdict(found["DN-DETR", "test", "ap"], without).startswith("no difference")
