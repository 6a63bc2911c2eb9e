"""The benchmarks: peers that agree, results with the keys that the README and the plot read."""

import json

import pytest
import torch
from torch import nn

from benchmarks import dat, forms, model, operator, peers, timing
from benchmarks.operator_results import merge, plot, ratios
from deformable_detr import DeformableDETR, DeformableDETRConfig
from deformable_detr.backbones.dat import DAT, DATConfig
from deformable_detr.provenance import provenance

TINY = peers.Case(2, ((5, 7), (3, 4), (2, 2), (1, 2)), 9, 1)
ROW = {"shape": "encoder", "mode": "forward", "threads": 1, "allocator": "default"}
FIGURES = {"minimum_ms": 1.0, "cpu_median_ms": 2.0}


@pytest.mark.parametrize("queries", [9, None])
def test_peers_agree(queries):
    case = peers.Case(TINY.batch, TINY.levels, queries, 1)
    tensors = peers.inputs(case)
    found = peers.peers(case.levels)
    assert {peers.OURS, peers.OFFICIAL, peers.HUGGING_FACE} <= found.keys()
    for mode in peers.MODES:
        expected = peers.call(found[peers.OFFICIAL], tensors, mode)()
        for operator_ in found.values():
            torch.testing.assert_close(peers.call(operator_, tensors, mode)(), expected)


def test_locations_are_near_their_queries():
    _, locations, weights = peers.inputs(
        peers.Case(1, ((40, 60), (20, 30), (9, 8), (4, 6)), None, 1)
    )
    first = locations[0, 60 * 20 + 30, :, 0]  # a query in the middle of the finest level
    pixels = (first - torch.tensor([30.5 / 60, 20.5 / 40])) * torch.tensor([60, 40])
    assert pixels.abs().amax() < peers.K + 5
    torch.testing.assert_close(weights.sum((-1, -2)), torch.ones(weights.shape[:3]))


def test_every_call_is_timed_and_the_calmest_attempt_returned():
    seen = []
    calls = {name: lambda name=name: seen.append(name) for name in "ab"}
    result = timing.side_by_side(calls, {"a": 6, "b": 2}, attempts=1)
    assert (seen.count("a"), seen.count("b")) == (7, 3)  # once more to be warm
    assert result["a"]["rounds"] == 6
    assert result["a"].keys() == result["b"].keys()


def test_summary():
    result = timing.summary([4.0, 1.0, 3.0, 2.0, 5.0], [1.0, 2.0, 9.0, 3.0, 4.0])
    assert (result["median_ms"], result["minimum_ms"]) == (3.0, 1.0)
    assert (result["quartiles_ms"], result["spread"]) == ([2.0, 4.0], 0.667)
    assert result["cpu_median_ms"] == 3.0


def test_peak_memory_counts_what_is_freed_before_the_end():
    def call():
        torch.ones(64, 1 << 18).sum()  # 64 MiB
        return torch.ones(8, 1 << 18)

    peak = timing.peak_mib(call)
    assert peak is None or 60 < peak < 80


def row(peer, median, **changed):
    return ROW | FIGURES | {"peer": peer, "median_ms": median} | changed


def result(*rows):
    limit = {"forward_ms": 1.0, "forward + backward_ms": 4.0}
    about = provenance("test", ("transformers", peers.PACKAGE))
    return about | {"rows": list(rows), "memory": [], "limit": limit}


def test_merged_results():
    old = result(row(peers.OURS, 9.0), row(peers.OFFICIAL, 60.0))
    new = result(row(peers.OURS, 4.0), row(peers.OURS, 2.0, threads=2))
    merged = merge(old, new)
    assert len(merged["rows"]) == 3  # the new row in the place of the old one
    assert merged["ratios"] == [
        ROW | {"peer": peers.OFFICIAL, "times": 15.0, "times_of_minima": 1.0, "times_of_cpu": 1.0}
    ]
    assert [x["part"] for x in merged["part_of_the_limit"]] == [0.25]


def test_scaling(monkeypatch):
    def timed(calls, rounds, attempts):
        calls["2: copy of 64 MiB"]()
        assert torch.get_num_threads() == 2
        figures = {"median_ms": 3.0, "quartiles_ms": [2.0, 4.0], "minimum_ms": 1.0}
        halves = {"median_ms": 2.0, "quartiles_ms": [1.0, 4.0], "minimum_ms": 1.0}
        return {name: figures if name.startswith("1") else halves for name in calls}

    before = torch.get_num_threads()
    monkeypatch.setattr(timing, "side_by_side", timed)
    rows = operator.scaling(["training"])
    torch.set_num_threads(before)
    assert [found["work"] for found in rows[2:]] == [f"training, {mode}" for mode in peers.MODES]
    assert all(
        (found["times"], found["times_of_quartiles"], found["times_of_minima"]) == (1.5, 2.0, 1.0)
        for found in rows
    )
    old, new = result() | {"scaling": rows}, result(row(peers.OURS, 4.0))
    assert merge(old, new)["scaling"] == rows  # what was not measured again stays


def test_results_of_another_machine_are_dropped():
    old = result(row(peers.OFFICIAL, 60.0)) | {"cpu": "another"}
    assert len(merge(old, result(row(peers.OURS, 4.0)))["rows"]) == 1


def test_plot(tmp_path):
    merged = merge({}, result(row(peers.OURS, 4.0), row(peers.OFFICIAL, 60.0)))
    plot(merged, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_stored_operator_results():
    files = sorted(timing.RESULTS.glob("operator_avx*.json"))
    assert files
    for path in files:
        check_operator_results(json.loads(path.read_text()))


def check_operator_results(stored):
    assert {"cpu", "vectors", "versions", "limit", "build", "ratios", "scaling"} <= stored.keys()
    named = {
        (r["shape"], r["mode"], r["threads"], r["allocator"], r["peer"]) for r in stored["rows"]
    }
    for shape in peers.CASES:
        for mode in peers.MODES:
            for peer in (peers.OURS, peers.OFFICIAL, peers.HUGGING_FACE, peers.PACKAGE):
                assert (shape, mode, 1, "default", peer) in named
    assert stored["ratios"] == ratios(stored["rows"])


def test_models_ratios():
    figures = {"mode": "inference", "threads": 1, "minimum_ms": 1.0, "cpu_median_ms": 1.0}
    rows = [
        {"model": peers.OURS, "median_ms": 2.0, "extra_mib": 30.0, **figures},
        {"model": peers.HUGGING_FACE, "median_ms": 5.0, "extra_mib": 60.0, **figures},
    ]
    found = model.summarise({"times": rows})["ratios"]["inference, 1 threads"]
    assert (found["times"], found["part_of_memory"]) == (2.5, 0.5)


SMALL = DeformableDETRConfig(
    num_classes=5, num_queries=9, encoder_layers=1, decoder_layers=2, ffn_dim=64
)


def test_models_agree_and_every_part_is_found():
    models = model.detectors(SMALL)
    predict = model.predictors(models, torch.randn(3, 70, 90))
    assert model.largest_difference(models, predict) < 1e-4
    for name in models:
        parts = model.breakdown(
            models[name], name, model.call(models[name], predict[name], "inference")
        )
        assert parts.keys() == {
            "backbone",
            "input projections",
            "encoder",
            "encoder: operator",
            "decoder",
            "decoder: operator",
            model.REST,
        }


def test_forms_agree_and_one_that_fails_is_told(monkeypatch):
    def compiler(module):
        if isinstance(module, DeformableDETR):
            return module
        raises = type("Raises", (), {"__call__": lambda *_, **__: 1 / 0})
        return raises()

    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.setattr(forms, "SIDE", 64)
    models, image = model.detectors(SMALL), torch.randn(3, 70, 90)
    calls = forms.forms(models, image, "inference")
    plain, _ = calls[peers.OURS, forms.PLAIN]()
    for key, each in calls.items():
        if forms.COMPILED not in key[1]:
            torch.testing.assert_close(each()[0].float(), plain, atol=0.1, rtol=0.05)
    rows = forms.measure(models, image, "inference", 1)
    failed = {(r["model"], r["form"]) for r in rows if "does not run" in r}
    assert failed == {(peers.HUGGING_FACE, form) for form in (forms.COMPILED, forms.BOTH)}
    limits = [row["limit_ms"] for row in rows if row["model"] == forms.LIMIT]
    assert len(limits) == 2 and min(limits) > 0


# DAT


def test_dat_is_the_authors_form():
    """The whole model, shallow, of 64 pixels; its windows and its moved keys, and gradients."""
    config = DATConfig(8, ("WS", "W", "D", "D"), (1, 2, 4, 8), (1, 1, 2, 4), 2, 64)
    torch.manual_seed(0)
    ours = DAT(config, 3).double()
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.3)
    theirs = dat.AuthorsForm(ours).double()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(theirs(images), ours(images), atol=1e-9, rtol=1e-9)
    dat.call(ours, images, "forward + backward")()
    dat.call(theirs, images, "forward + backward")()
    bias = ours.body.stage3.blocks[0].attention.bias.table.grad
    theirs_bias = theirs.learned["stages/2/attns/0/rpe_table"].grad
    torch.testing.assert_close(theirs_bias, bias, atol=1e-9, rtol=1e-9)


def test_dats_layers_agree_and_all_pairs_at_once_take_more_memory(monkeypatch):
    monkeypatch.setattr(dat.dat_attention, "PAIRS_AT_ONCE", 1 << 12)
    x = torch.randn(1, 10, 14, 384)
    with torch.no_grad():
        ours, at_once, authors = (layer(x) for layer in dat.layers((10, 14)).values())
    torch.testing.assert_close(at_once, ours, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(authors, ours, atol=1e-4, rtol=1e-4)
    rows = dat.measure_layer(1, (10, 14))
    assert dat.dat_attention.PAIRS_AT_ONCE == 1 << 12
    assert [row["model"] for row in rows] == 2 * [dat.OURS, dat.AT_ONCE, dat.AUTHORS]
    counted = [row["counted_mib"] for row in rows]
    assert counted[0] < counted[1] and counted[3] < counted[4]


def test_ratios_of_dat():
    times = {"median_ms": 2.0, "minimum_ms": 1.0, "cpu_median_ms": 4.0}
    rows = [{"mode": "forward", "batch": 1, "model": dat.OURS} | times]
    rows.append({"mode": "forward", "batch": 1, "model": dat.AUTHORS} | {n: 3.0 for n in times})
    assert dat.summarise(rows) == [
        {
            "mode": "forward",
            "batch": 1,
            "times": 1.5,
            "times_of_minima": 3.0,
            "times_of_cpu": 0.75,
        }
    ]


def test_stored_results_of_dats_layer():
    """What the layer's docstring says that turns spare, and hardly cost."""
    stored = json.loads((timing.RESULTS / "dat_cpu.json").read_text())
    rows = stored["third_stages_layer_at_800_x_1066"]
    ours, at_once, authors = (
        next(r for r in rows if (r["mode"], r["model"]) == ("forward + backward", name))
        for name in (dat.OURS, dat.AT_ONCE, dat.AUTHORS)
    )
    counted = [round(row["counted_mib"]) for row in (ours, at_once)]
    text = " ".join(dat.DAttention.__doc__.split())
    assert "{} MiB of tensors at most in place of {}.".format(*counted) in text
    assert ours["measured_mib"] < at_once["measured_mib"] < authors["measured_mib"]
    assert ours["cpu_median_ms"] < 1.2 * at_once["cpu_median_ms"]
    assert stored["largest_difference"] < 1e-5
