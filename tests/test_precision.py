"""Detecting in bfloat16 finds what float32 finds."""

import copy
import json
from pathlib import Path

import pytest
import torch

from deformable_detr import Batch, DeformableDETR, DeformableDETRConfig
from deformable_detr.cli import main
from deformable_detr.inference.detector import Detector, load_detector
from deformable_detr.inference.precision import choose_precision, in_bf16
from deformable_detr.inference.predict import predict
from deformable_detr.look.asking import explain

CPU = torch.device("cpu")
DIGITS = "data/checkpoints/digits.safetensors"
SAMPLES = [f"data/samples/{number:06}.png" for number in (1, 10, 12)]


def small(**changes: object) -> DeformableDETR:
    """A detector of every part, with random weights."""
    torch.manual_seed(0)
    options = {
        "num_classes": 3,
        "num_queries": 5,
        "backbone": "small",
        "num_levels": 2,
        "embed_dim": 32,
        "num_heads": 2,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "ffn_dim": 32,
        "dropout": 0.0,
    }
    return DeformableDETR(DeformableDETRConfig(**options | changes)).eval()


@pytest.mark.parametrize("stages", [{}, {"refine": True}, {"refine": True, "two_stage": True}])
def test_outputs_are_near_and_in_float32(stages):
    model = small(**stages)
    narrow = in_bf16(model)
    batch = Batch.from_images([torch.rand(3, 96, 128), torch.rand(3, 80, 64)])
    with torch.no_grad():
        wide, short = model(batch), narrow(batch)
    assert short.boxes.dtype == short.logits.dtype == torch.float32
    assert not torch.equal(short.logits, wide.logits)  # it did run in another precision
    for found, expected in (
        (short.boxes, wide.boxes),
        (short.logits.sigmoid(), wide.logits.sigmoid()),
    ):
        # queries of two stages may come in another order: compare what there is, sorted
        torch.testing.assert_close(found.sort(1)[0], expected.sort(1)[0], atol=0.03, rtol=0.0)


def test_the_model_itself_stays_as_it_is():
    model = small()
    before = copy.deepcopy(model.state_dict())
    narrow = in_bf16(model)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    dtypes = {p.dtype for p in narrow.parameters()}
    assert dtypes == {torch.float32, torch.bfloat16}
    assert narrow.decoder.layers[0].cross_attention.value_proj.weight.dtype == torch.bfloat16
    heads = (p for head in narrow.box_heads for p in head.parameters())
    assert {p.dtype for p in heads} == {torch.float32}  # boxes need more than 8 bits


def test_auto_asks_the_processor(monkeypatch):
    for has, expected in ((True, "bf16"), (False, "float32")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has=has: has)
        assert choose_precision("auto", CPU) == expected
    assert choose_precision("bf16", CPU) == "bf16"
    with pytest.raises(ValueError, match="one of float32, bf16, auto, got 'half'"):
        choose_precision("half", CPU)


def test_the_shipped_detector_finds_the_same_objects():
    wide = predict(DIGITS, SAMPLES, threshold=0.5)
    short = predict(DIGITS, SAMPLES, threshold=0.4, precision="bf16")
    for sure, found in zip(wide, short, strict=True):
        for name, box in zip(sure.names, sure.boxes, strict=True):
            same = [b for n, b in zip(found.names, found.boxes, strict=True) if n == name]
            assert min((b - box).abs().max().item() for b in same) < 2  # pixels


def test_what_it_looked_at_is_nearly_the_same():
    wide, short = (
        explain(load_detector(DIGITS, precision=name), SAMPLES[2]) for name in ("float32", "bf16")
    )
    assert wide.name == short.name and wide.score == pytest.approx(short.score, abs=0.02)
    assert abs(wide.points - short.points).max() < 1  # pixels
    for name, norms in wide.gradients.items():
        pair = torch.from_numpy(norms), torch.from_numpy(short.gradients[name])
        assert torch.cosine_similarity(*(x.flatten() for x in pair), dim=0) > 0.8


def test_a_detector_in_float32_is_itself():
    detector = load_detector(DIGITS)
    assert detector.in_precision("float32") is detector
    assert isinstance(detector.in_precision("bf16"), Detector)


def test_a_copy_runs_its_own_weights():
    narrow = in_bf16(small())
    other = copy.deepcopy(narrow)
    torch.nn.init.ones_(other.class_heads[0].bias)
    batch = Batch.from_images([torch.rand(3, 64, 64)])
    with torch.no_grad():
        expected, found = narrow(batch).logits, other(batch).logits
    assert (found > expected + 1).all()  # a bias of 1 in the place of -4.6
    assert in_bf16(narrow) is narrow


def test_other_classes_do_not_widen_it_nor_round_boxes():
    narrow = load_detector(DIGITS, precision="bf16")
    turned = narrow.for_categories(narrow.categories[::-1])
    dtypes = [[p.dtype for p in d.model.parameters()] for d in (narrow, turned)]
    assert dtypes[0] == dtypes[1]
    found, same = predict(narrow, SAMPLES[1])[0], predict(turned, SAMPLES[1])[0]
    assert same.names == found.names and same.boxes.dtype == torch.float32
    torch.testing.assert_close(same.boxes, found.boxes, atol=0.01, rtol=0.0)  # pixels


def test_the_command_has_it(tmp_path, capsys):
    found = tmp_path / "found.json"
    assert (
        main(
            ["predict", SAMPLES[1], "--model", DIGITS, "--precision", "bf16", "--json", str(found)]
        )
        == 0
    )
    assert "1 found: 1 seven" in capsys.readouterr().out


def test_explaining_has_it(tmp_path):
    page = tmp_path / "seen.html"
    arguments = ["explain", SAMPLES[1], "--model", DIGITS, "--precision", "bf16"]
    assert main([*arguments, "--output", str(page)]) == 0
    assert page.stat().st_size > 10_000


def test_stored_figures():
    """Measured by benchmarks/precision.py, and told in the README."""
    rows = json.loads(Path("data/results/precision.json").read_text())["rows"]
    found = {(row["model"], row["precision"]): row for row in rows}
    for model in ("digits", "trees"):
        plain, narrow, int8 = (found[model, p] for p in ("float32", "bfloat16", "int8"))
        assert abs(narrow["ap"] - plain["ap"]) < 5e-4
        assert narrow["moved"]["largest"] < 1 and narrow["moved"]["lost"] == 0
        assert int8["median_ms"] > plain["median_ms"]  # why there is no such option
