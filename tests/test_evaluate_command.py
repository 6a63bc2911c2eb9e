"""`evaluate` on the command line: what it says beside its figures, without classes, in two
processes."""

import json
import os
import subprocess
import sys

import pytest
import torch

from deformable_detr import DeformableDETR
from deformable_detr.cli import main
from deformable_detr.data.coco import CocoDataset
from deformable_detr.data.places import find_split
from deformable_detr.evaluation.agnostic import without_classes
from deformable_detr.evaluation.coco import score
from deformable_detr.weights.ours import save_model
from tests.conftest import TINY, save_annotations, write_coco

CATEGORIES = [{"id": 3, "name": "red"}, {"id": 7, "name": "green"}, {"id": 20, "name": "blue"}]


@pytest.fixture
def model_file(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "model.safetensors"
    model = DeformableDETR(TINY)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    save_model(model, path, CATEGORIES)
    return path


def evaluate(coco, model_file, tmp_path, *options):
    """What is written as JSON."""
    arguments = ["evaluate", str(coco), "--model", str(model_file), "--split", "train"]
    assert main([*arguments, "--json", str(tmp_path / "a.json"), *options]) == 0
    return json.loads((tmp_path / "a.json").read_text())


def test_a_report_says_what_it_is_of(coco, model_file, tmp_path, capsys):
    page = tmp_path / "page.html"
    about = evaluate(coco, model_file, tmp_path, "--report", str(page))["about"]
    assert (about["model"], about["data"], about["split"]) == (str(model_file), str(coco), "train")
    assert about["date"].startswith("20") and len(about) == 4
    printed, text = capsys.readouterr().out, page.read_text()
    for name, value in about.items():
        assert f"{name}: {value}" in printed and f"<dt>{name}</dt><dd>{value}</dd>" in text


def test_more_objects_than_can_be_found_are_said_with_numbers(coco, model_file, tmp_path, capsys):
    content = write_coco(coco, "crowded")
    (coco / "annotations" / "crowded.json").unlink()
    first = content["annotations"][0]
    content["annotations"] += [
        first | {"id": i, "bbox": [i % 44, i % 30, 3, 3], "area": 9} for i in range(130)
    ]
    save_annotations(coco, content)
    page = tmp_path / "page.html"
    found = evaluate(coco, model_file, tmp_path, "--report", str(page), "--top-k", "300")
    printed, text = capsys.readouterr().out, page.read_text()
    assert len(found["remarks"]) == 2
    assert "has 131 objects, more than the 6 queries" in found["remarks"][0]
    assert "131 objects of one class: COCO's metrics count 100" in found["remarks"][1]
    for line in found["remarks"]:
        assert line in printed and line.replace("'", "&#x27;") in text
    assert "recall can be high where AP is low" in printed and "AP is over IoU" in text


def test_nothing_is_said_where_all_can_be_found(coco, model_file, tmp_path):
    assert evaluate(coco, model_file, tmp_path)["remarks"] == []


# Without classes


def test_wrong_names_do_not_count_without_classes(coco):
    dataset = CocoDataset(*find_split(coco, "train"))
    keys = ("image_id", "category_id", "bbox")
    results = [{key: a[key] for key in keys} for a in dataset.coco.dataset["annotations"]]
    results = [
        r | {"score": 0.9, "category_id": {3: 7, 7: 20, 20: 3}[r["category_id"]]} for r in results
    ]
    assert score(results, dataset).ap == 0
    # the same box under another name would be a second detection, of nothing
    again = [r | {"score": 0.95, "category_id": 3} for r in results]
    merged, one = without_classes([*results, *again, *results], dataset)
    metrics = score(merged, one)
    assert metrics.ap == pytest.approx(1) and list(metrics.per_class) == ["object"]
    assert len(merged) == 5 and {r["score"] for r in merged} == {0.95}
    assert score(results, dataset).ap == 0  # the data set itself is as it was
    assert len(dataset.categories) == 3 and dataset[0][1].labels.tolist() == [0]


def test_a_detector_of_other_classes_is_measured_without_them(coco, tmp_path, capsys):
    other = [{"id": i, "name": f"thing {i}"} for i in range(3)]
    path = tmp_path / "other.safetensors"
    save_model(DeformableDETR(TINY), path, other)
    assert main(["evaluate", str(coco), "--model", str(path)]) == 2
    assert "has not" in capsys.readouterr().err
    found = evaluate(coco, path, tmp_path, "--class-agnostic", "--threshold", "0")
    assert found["confusion"]["names"] == ["object", "background"]
    assert found["errors"]["objects"] == 5 and "one class" in found["about"]["classes"]
    detections = sum(found["errors"]["counts"].values()) - found["errors"]["counts"]["missed"]
    assert detections == 6 * 6  # each query of each image once


def test_an_empty_class_that_the_detector_has_not_does_not_matter(
    coco, model_file, tmp_path, capsys
):
    """Roboflow lists a parent category, id 0, under the name of the whole set."""
    before = evaluate(coco, model_file, tmp_path)
    path = coco / "annotations" / "train.json"
    content = json.loads(path.read_text())
    content["categories"].insert(0, {"id": 0, "name": "shapes", "supercategory": "none"})
    save_annotations(coco, content)
    capsys.readouterr()
    found = evaluate(coco, model_file, tmp_path)
    assert "left out, as no box has them: shapes\n" in capsys.readouterr().err
    for name in ("metrics", "errors", "confusion", "curves"):
        assert found[name] == before[name]
    content["annotations"][0]["category_id"] = 0
    save_annotations(coco, content)
    assert main(["evaluate", str(coco), "--model", str(model_file), "--split", "train"]) == 2
    error = capsys.readouterr().err
    assert "such as 'shapes'; --class-agnostic leaves classes aside\n" in error


# In two processes


@pytest.mark.parametrize("views", [[], ["--tta", "--tta-scales", "1"]], ids=["once", "views"])
def test_two_processes_find_what_one_finds(coco, model_file, tmp_path, views):
    """Of six images, half each; the figures are the same, and said once."""
    options = ["--batch-size", "2", "--threshold", "0", *views]
    alone = evaluate(coco, model_file, tmp_path, *options)
    arguments = ["evaluate", coco, "--model", model_file, "--split", "train", *options]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["-m", "deformable_detr.cli", *arguments, "--json", tmp_path / "b.json"]
    run = subprocess.run(
        [str(each) for each in launch],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("6 images") == 1
    together = json.loads((tmp_path / "b.json").read_text())
    for each in (alone, together):
        each["about"].pop("date")
    assert together == alone
