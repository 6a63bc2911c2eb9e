"""What the chapters on groups and on fewer tokens say of costs, of targets and of the studies: each
would fall if the library or the data changed."""

import csv
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from deformable_detr.data.coco import CocoDataset, collate
from deformable_detr.data.transforms import digits_eval_transform
from deformable_detr.evaluation.complexity import complexity, count, make_batch
from deformable_detr.evaluation.intervals import verdict
from deformable_detr.layers.reading import tokens_read
from deformable_detr.look.sampling import record_sampling
from deformable_detr.losses import SetCriterion
from deformable_detr.models import MODELS
from deformable_detr.weights.ours import load_model
from tests.members import make_batch as small_batch
from tests.members import tiny

ROOT = Path(__file__).parents[1]


def full_size(name, **options):
    kind, model = MODELS[name]
    with torch.device("meta"):
        large = model(kind(**options))
    return complexity(large, repeats=0)


# Groups


def test_groups_cost_nothing_at_inference():
    counts = []
    for name, options in (("group_detr", {"groups": 5}), ("deformable_detr", {})):
        model = MODELS[name][1](tiny(name, refine=True, **options)).eval()
        counts.append(count(model, (64, 96))[0])
    # but for the points, which are made of the whole table before the first group is taken
    table = 4 * 6 * 32 * 2
    assert counts[0] - counts[1] == table < counts[1] / 1000


def test_eleven_groups_add_a_seventh_to_a_training_step():
    kind, model = MODELS["group_detr"]
    totals = []
    for groups in (1, 11):
        with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):
            large = model(kind(groups=groups, refine=True)).train()
            picture = dataclasses.replace(make_batch((800, 1066)), targets=[])
            with FlopCounterMode(display=False) as counter:
                large(picture)
        totals.append(counter.get_total_flops())
    assert totals[1] / totals[0] == pytest.approx(8 / 7, abs=0.01)


def test_efficient_detr_halves_the_encoder_and_nearly_does_without_a_decoder():
    base = full_size("deformable_detr", refine=True, two_stage=True).parts
    ours = full_size("efficient_detr").parts
    assert ours["encoder"] / base["encoder"] == pytest.approx(0.5, abs=0.01)
    assert ours["decoder"] < 0.2 * base["decoder"]


# Tokens


@pytest.fixture(scope="module")
def readings():
    """What the shipped detector's decoder reads of the sample pictures, and half a cell beside."""
    model, _ = load_model(ROOT / "data/checkpoints/digits.safetensors")
    samples = ROOT / "data/samples"
    dataset = CocoDataset(samples, samples / "annotations.json", digits_eval_transform())
    with torch.no_grad(), record_sampling(model.eval()) as record:
        model(collate([dataset[i] for i in range(len(dataset))]))
    return tokens_read(record.decoder), tokens_read(record.decoder, half_cell=True)


def test_half_a_cell_changes_the_target(readings):
    """A third of it for a tenth of the tokens, a fifth for three tenths."""
    S = readings[0].shape[1]
    for rho, same in ((0.1, 0.7), (0.3, 0.8)):
        here, there = (
            torch.zeros_like(x).scatter(1, x.topk(int(S * rho) + 1).indices, 1) for x in readings
        )
        assert ((here * there).sum() / here.sum()).item() == pytest.approx(same, abs=0.05)


def test_few_tokens_are_most_of_what_is_read(readings):
    read = readings[0]
    for rho, share in ((0.1, 0.7), (0.3, 0.95)):
        best = read.topk(int(read.shape[1] * rho) + 1).values.sum(1) / read.sum(1)
        assert best.mean() > share


def test_in_the_sevens_picture_other_places_are_read_more(readings):
    """And of the finest map a token of the seven is read less than another, on average."""
    levels = readings[0][9].split([32 * 32, 16 * 16, 8 * 8])
    for level, read in enumerate(levels):
        side, cell = 32 >> level, 4 << level
        middles = (torch.arange(side) + 0.5) * cell
        rows, columns = (middles > 62) & (middles < 115), (middles > 43) & (middles < 77)
        seven = rows[:, None] & columns
        read = read.view(side, side)
        assert read[~seven].max() > 2 * read[seven].max()
        assert (read[seven].mean() > read[~seven].mean()) == (level > 0)


def test_a_tenth_of_the_updates_costs_a_fifth_of_the_encoder():
    costs = [full_size("sparse_detr", rho=rho).parts["encoder"] for rho in (0.1, 1.0)]
    assert costs[0] / costs[1] == pytest.approx(0.2, abs=0.03)


def test_the_encoder_is_half_of_all():
    found = full_size("deformable_detr", refine=True, two_stage=True)
    assert found.parts["encoder"] / found.multiply_adds == pytest.approx(0.5, abs=0.03)


def test_the_choice_of_tokens_is_learned_from_a_target_alone():
    torch.manual_seed(0)
    model = MODELS["sparse_detr"][1]
    sparse, batch = model(tiny("sparse_detr", rho=0.3)).train(), small_batch(2, 1)
    losses = SetCriterion()(sparse(batch), batch.targets)
    own = losses.pop("loss_scorer")
    parts = list(sparse.scorer.parameters())
    for loss, reached in ((sum(losses.values()), False), (own, True)):
        found = torch.autograd.grad(loss, parts, retain_graph=True, allow_unused=True)
        assert any(g is not None and g.any() for g in found) == reached


# The studies


def finished(study):
    """The rows of a study's finished trials."""
    with (ROOT / f"data/results/{study}.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["status"] == "done"]


@pytest.mark.parametrize("study", ["members", "sparse"])
def test_the_table_has_what_the_chapters_read(study):
    """Of each trained member."""
    rows = finished(study)
    assert rows, "no member is trained"
    wanted = {("test", m) for m in ("ap", "ap_small", "ap_medium", "ap_large")}
    wanted |= {("val", "instability"), ("train", "cpu_seconds"), ("model", "multiply_adds")}
    for trial in {(row["configuration"], row["seed"]) for row in rows}:
        of_it = [row for row in rows if (row["configuration"], row["seed"]) == trial]
        assert wanted <= {(row["split"], row["metric"]) for row in of_it if row["at"] == "300"}


@pytest.fixture(scope="module")
def spent():
    """By configuration, by a step or an inference, and by metric."""
    found = {}
    for row in finished("member_costs"):
        of_it = found.setdefault(row["configuration"], {})
        of_it[row["split"], row["metric"]] = float(row["value"])
    return found


BASE, REFINEMENT = "Deformable DETR, two stages", "Deformable DETR, refinement"


def test_a_tenth_of_the_updates_does_not_make_the_rest_free(spent):
    """More than half of everything is left, and of time more than of multiply-adds."""
    tenth, dense = spent["rho 0.1"], spent["rho 1"]
    for part in ("step", "inference"):
        counted, clocked = (
            tenth[part, metric] / dense[part, metric]
            for metric in ("multiply_adds", "milliseconds")
        )
        assert 0.5 < counted < clocked < 1
    assert 0.5 < tenth["step", "peak_bytes"] / dense["step", "peak_bytes"] < 1


def test_groups_make_the_dearest_step_and_cost_nothing_at_inference(spent):
    for metric in ("multiply_adds", "milliseconds", "peak_bytes"):
        of_members = {
            row["configuration"]: spent[row["configuration"]] for row in finished("members")
        }
        assert max(of_members, key=lambda name: of_members[name]["step", metric]) == "Group DETR"
    counts = (spent[name]["inference", "multiply_adds"] for name in ("Group DETR", REFINEMENT))
    assert next(counts) == pytest.approx(next(counts), rel=1e-3)


@pytest.mark.parametrize("name", ["Sparse DETR", "Lite DETR"])
def test_fewer_tokens_save_multiply_adds_and_no_time_on_small_pictures(spent, name):
    for part in ("step", "inference"):
        assert spent[name][part, "multiply_adds"] < 0.85 * spent[BASE][part, "multiply_adds"]
        assert spent[name][part, "milliseconds"] > 0.99 * spent[BASE][part, "milliseconds"]


def test_equal_multiply_adds_are_those_of_the_tables(spent):
    """Steps in proportion to what is spent, and figures of the tables shipped."""
    found = json.loads((ROOT / "data/results/equal_cost.json").read_text())
    for name, each in found["members"].items():
        share = spent[name]["step", "multiply_adds"] / spent[BASE]["step", "multiply_adds"]
        assert each["steps of the base"] == pytest.approx(found["steps"] * share, abs=0.1)
        if "ap" in each:
            of_it = [
                r for r in finished("members") if (r["configuration"], r["split"]) == (name, "test")
            ]
            values = [float(row["value"]) for row in of_it if row["metric"] == "ap"]
            mean = sum(values) / len(values)
            assert each["ap"]["member"]["mean"] == pytest.approx(mean, abs=1e-4), "make it again"


def test_the_base_is_better_the_longer_it_is_trained():
    """So that a dearer step means a harder opponent."""
    means = []
    for steps in (225, 300, 375, 450):
        of_it = [
            float(row["value"])
            for row in finished("lengths")
            if (row["configuration"], row["split"], row["metric"])
            == (f"{steps} steps", "test", "ap")
        ]
        means.append(sum(of_it) / len(of_it))
    assert means == sorted(means)


def test_with_rates_of_their_own_efficient_detr_is_ahead_and_fewer_tokens_are_not_behind():
    rates = {
        (r["configuration"]): float(r["value"])
        for r in finished("member_rates")
        if (r["split"], r["metric"]) == ("val", "object_ap")
    }
    found = {}
    for row in finished("tuned_members"):
        if (row["split"], row["metric"]) == ("test", "ap"):
            found.setdefault(row["configuration"], []).append(float(row["value"]))
    assert len(found) == 9 and all(len(values) >= 3 for values in found.values())
    for name in found:
        assert max(0.0005, 0.001, 0.002, key=lambda r: rates[f"{name}, {r:g}"]) == 0.002
    said = {name: verdict(values, found[BASE]) for name, values in found.items()}
    assert [name for name in said if said[name].startswith("better")] == ["Efficient DETR"]
    for name in ("Sparse DETR", "Lite DETR"):
        assert said[name].startswith("no difference")


def test_trained_for_as_long_as_the_digits_detector_efficient_detr_is_not_ahead():
    runs = json.loads((ROOT / "data/results/digits_training.json").read_text())["runs"]
    base = [run["test"]["ap"] for run in runs if run["round"] == 0]
    (long,) = (float(r["value"]) for r in finished("as_long") if r["metric"] == "ap")
    assert abs(long - max(base)) < max(base) - min(base)
