"""The shipped detector finds what is on the sample images, and the README's example runs."""

import json
import re
from pathlib import Path

import pytest
from safetensors import safe_open

from deformable_detr.cli import main
from deformable_detr.data.coco import CocoDataset
from deformable_detr.data.transforms import digits_eval_transform
from deformable_detr.evaluation.coco import evaluate
from deformable_detr.weights.ours import load_model

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "data" / "checkpoints" / "digits.safetensors"


def test_it_finds_the_digits_of_the_samples():
    model, categories = load_model(SHIPPED)
    samples = ROOT / "data" / "samples"
    dataset = CocoDataset(samples, samples / "annotations.json", digits_eval_transform())
    assert categories == dataset.categories
    metrics = evaluate(model, dataset, progress=False)
    assert metrics.ap50 > 0.95 and metrics.ap > 0.78


def test_the_card_travels_with_the_weights():
    with safe_open(SHIPPED, framework="pt") as file:
        card = json.loads(file.metadata()["card"])
    assert card == json.loads(SHIPPED.with_suffix(".json").read_text())


def test_evaluate_prints_the_cards_numbers(capsys):
    """On the whole test split, as the card says it was measured."""
    if not (ROOT / "data" / "digits").exists():
        pytest.skip("no data/digits: run `python data/make_digits.py`")
    assert main(["evaluate", str(ROOT / "data" / "digits"), "--split", "test"]) == 0
    printed = dict(
        re.findall(r"^(AP\d*|AP \w+ ?.*?)\s+(\d\.\d{3})$", capsys.readouterr().out, re.M)
    )
    test = json.loads(SHIPPED.with_suffix(".json").read_text())["test"]
    assert float(printed["AP"]) == pytest.approx(test["ap"], abs=2e-3)
    assert float(printed["AP50"]) == pytest.approx(test["ap50"], abs=2e-3)


def test_predict_uses_the_shipped_detector(tmp_path, capsys):
    image = ROOT / "data" / "samples" / "000008.png"
    assert main(["predict", str(image), "--output", str(tmp_path)]) == 0
    assert re.search(r"[1-9]\d* found", capsys.readouterr().out)
    assert (tmp_path / "000008.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("example", "result"), [("MSDeformAttn(", "output"), ("(found,) = predict(", "found")]
)
def test_the_readmes_python_examples_run(example, result, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (code,) = (block for block in blocks if example in block)
    namespace = {}
    exec(code, namespace)
    if result == "output":
        assert namespace[result].shape == (1, 300, 256)
    else:
        assert len(namespace[result]) and namespace[result].names[0] in capsys.readouterr().out
