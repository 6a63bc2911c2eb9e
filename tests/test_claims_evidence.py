"""What chapters detr and ten_times_faster say in words, from tables and fresh models."""

import csv
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deformable_detr.data.coco import CocoDataset, collate, find_split
from deformable_detr.losses.matcher import HungarianMatcher
from deformable_detr.models import DEFAULT, DETR, MODELS, DETRConfig
from deformable_detr.training.recipe import load_recipe

DATA = Path(__file__).parents[1] / "data"
ONE_MAP = ("model.num_levels=1", "model.refine=false", "model.two_stage=false")


def values(study, configuration, metric, split="val", at=None):
    """Of the finished trials, by seed and step, or at one step only."""
    with open(DATA / "results" / f"{study}.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["status"] == "done"]
    wanted = configuration, metric, split
    mine = [r for r in rows if (r["configuration"], r["metric"], r["split"]) == wanted]
    found = {(row["seed"], int(row["at"])): float(row["value"]) for row in mine}
    assert found, f"{study} has no {metric} of {configuration}"
    return [v for (_, step), v in found.items() if at is None or step == at]


# DETR, and why it is slow


@pytest.mark.parametrize("side", [128, 256, 512])
def test_dense_attention_and_its_gradient_start_at_nearly_all_tokens(side):
    def at_start(configuration, metric):
        return values("initialisation", configuration, metric, "start", side)

    (tokens,) = set(at_start("dense", "tokens"))
    for metric in ("encoder_effective_keys", "decoder_effective_keys"):
        assert min(at_start("dense", metric)) > 0.85 * tokens
        assert set(at_start("deformable, one map", metric)) == {4}
    assert min(at_start("dense", "encoder_gradient_tokens")) > 0.95 * tokens
    assert max(at_start("deformable, one map", "encoder_gradient_tokens")) < 20


def fresh(recipe, seed):
    torch.manual_seed(seed)
    model = MODELS[recipe.model.get("name", DEFAULT)][1](recipe.model_config(num_classes=10))
    backbone = DATA / "checkpoints" / "digits_backbone.safetensors"
    model.backbone.load_state_dict(load_file(backbone))
    return model.eval()


@torch.no_grad()
def test_before_training_detrs_queries_say_the_same_and_matches_are_decided_by_next_to_nothing():
    dense, deformable = load_recipe("digits-detr"), load_recipe("digits").changed(ONE_MAP)
    val = CocoDataset(*find_split(DATA / "digits", "val"), dense.eval_transform())
    batch = collate([val[i] for i in range(8)])
    spreads, gaps = {}, {}
    for name, recipe in (("dense", dense), ("deformable", deformable)):
        for seed in range(3):
            model = fresh(recipe, seed)
            output = model(batch)
            spreads.setdefault(name, []).append(output.boxes[..., :2].std(1).mean().item())
            for logits, boxes, target in zip(
                output.logits, output.boxes, batch.targets, strict=True
            ):
                cost = HungarianMatcher().cost(logits, boxes, target, model.scoring)
                best, second = cost.sort(0).values[:2]
                gaps.setdefault(name, []).append(second - best)
    assert max(spreads["dense"]) < 0.01 and min(spreads["deformable"]) > 0.2
    medians = {name: torch.cat(found).median().item() for name, found in gaps.items()}
    assert medians["deformable"] > 20 * medians["dense"]


def test_the_backbone_holds_more_than_half_of_detr_and_the_queries_next_to_nothing():
    with torch.device("meta"):
        model = DETR(DETRConfig())
    parts = {n: sum(p.numel() for p in part.parameters()) for n, part in model.named_children()}
    assert sum(parts.values()) == 41_524_768 and parts["query_embed"] == 25_600
    assert parts["backbone"] > sum(parts.values()) / 2


# Ten times faster?


RATES = ("0.0002", "0.0005", "0.001")


@pytest.mark.parametrize("rate", RATES)
def test_after_1500_steps_one_map_finds_boxes_and_detr_none(rate):
    assert min(values("rates", f"one map, {rate}", "object_ap", at=1500)) > 0.05
    assert max(values("rates", f"DETR, {rate}", "object_ap", at=1500)) < 0.02


def test_a_step_costs_nearly_the_same_with_dense_and_deformable_attention():
    for metric, apart in (("multiply_adds", 0.1), ("parameters", 0.1)):
        one, dense = (
            values("rates", f"{name}, 0.0005", metric, "model")[0] for name in ("one map", "DETR")
        )
        assert one == pytest.approx(dense, rel=apart)


def test_the_fastest_learner_has_the_least_steady_matches():
    """So instability cannot be compared with queries that are chosen by their scores."""

    def of(name, metric, at):
        return values("convergence", name, metric, at=at)

    for other in ("one map", "two maps", "two maps, refinement"):
        assert min(of("two maps, two stages", "object_ap", 150)) > max(of(other, "object_ap", 150))
        two_stages = of("two maps, two stages", "instability", 150)
        assert min(two_stages) > max(of(other, "instability", 150))


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("step", [1000, 1500])
def test_at_equal_steps_and_rates_dense_attentions_matches_are_less_steady(rate, step):
    dense, deformable = (
        values("rates", f"{name}, {rate}", "instability", at=step) for name in ("DETR", "one map")
    )
    assert sum(dense) / len(dense) > sum(deformable) / len(deformable)


@pytest.mark.parametrize("metric", ["multiply_adds", "parameters"])
def test_a_pass_of_faster_rcnn_costs_more_than_one_of_two_maps_with_two_stages(metric):
    if not (DATA / "results" / "faster_rcnn.csv").exists():
        pytest.skip("the study of Faster R-CNN has no table yet")
    ours = values("convergence", "two maps, two stages", metric, "model")
    assert values("faster_rcnn", "Faster R-CNN, 0.001", metric, "model")[0] > 1.5 * max(ours)


def test_matches_settle_and_attention_narrows_without_a_detector():
    """In at least one training of dense attention to the end of its 12,000 steps."""
    metrics = ("instability", "decoder_effective_keys", "object_ap")
    ends = [
        each
        for name in ("DETR", "DETR, 0.0005")
        for each in zip(*(values("detr", name, m, at=12_000) for m in metrics), strict=True)
    ]
    assert any(changed < 0.15 and keys < 30 and ap < 0.02 for changed, keys, ap in ends)
