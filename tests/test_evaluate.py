"""COCO metrics where the right answer is known."""

import copy
import json
import math
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from deformable_detr import DeformableDETR
from deformable_detr.data.coco import CocoDataset, find_split
from deformable_detr.data.transforms import TO_TENSOR
from deformable_detr.evaluation.coco import evaluate, predict_dataset, same_categories, score
from deformable_detr.evaluation.detections import in_order_of
from tests.conftest import TINY, save_annotations, write_coco


@pytest.fixture
def dataset(coco):
    return CocoDataset(*find_split(coco, "train"))


def truth(dataset):
    keys = ("image_id", "category_id", "bbox")
    found = dataset.coco.dataset["annotations"]
    return [{key: copy.copy(a[key]) for key in keys} | {"score": 0.9} for a in found]


def test_the_truth_has_ap_1_and_no_large_objects(dataset):
    metrics = score(truth(dataset), dataset)
    assert metrics.ap == metrics.ap50 == metrics.ap75 == metrics.ap_small == metrics.ar == 1
    assert math.isnan(metrics.ap_medium) and math.isnan(metrics.ap_large)
    assert metrics.per_class == pytest.approx({"red": 1, "green": 1, "blue": 1})
    lines = [" ".join(line.split()) for line in str(metrics).splitlines()]
    assert "AP small (below 32^2 px) 1.000" in lines and "AP large n/a" in lines
    assert metrics.to_dict()["ap_large"] is None


def test_a_shifted_box_counts_up_to_its_iou(dataset):
    """20 x 16 boxes shifted by 4 px: IoU 16/24 = 0.667, so four of ten thresholds."""
    results = truth(dataset)
    for result in results:
        result["bbox"][0] += 4
    metrics = score(results, dataset)
    assert metrics.ap == pytest.approx(0.4) and metrics.ap50 == 1 and metrics.ap75 == 0


@pytest.mark.parametrize("change", [lambda i: i - 1000, lambda i: f"a{i}"], ids=["0", "text"])
def test_annotations_may_have_any_ids(coco, change):
    """0 as well, which to COCOeval is no annotation."""
    path = coco / "annotations" / "train.json"
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        annotation["id"] = change(annotation["id"])
    save_annotations(coco, content)
    dataset = CocoDataset(*find_split(coco, "train"))
    metrics = score(truth(dataset), dataset)
    assert metrics.ap == metrics.ar == 1


@pytest.mark.parametrize("key", ["image_id", "category_id"])
@pytest.mark.parametrize("change", [lambda i: i + (i % 2 << 63), lambda i: f"x{i}"])
def test_images_and_categories_may_have_any_ids(dataset, key, change):
    """Beyond 2^63 beside small ones, which an array would make floats; and texts."""
    content, kind = dataset.coco.dataset, {"image_id": "images", "category_id": "categories"}[key]
    for entry in content["annotations"]:
        entry[key] = change(entry[key])
    for entry in content[kind]:
        entry["id"] = change(entry["id"])
    dataset.image_ids = [entry["id"] for entry in content["images"]]
    metrics = score(truth(dataset), dataset)
    assert metrics.ap == metrics.ar == 1


def test_a_detection_of_another_data_set_is_refused(dataset):
    for key in ("image_id", "category_id"):
        results = [truth(dataset)[0] | {key: 5}]
        with pytest.raises(ValueError, match=r"detection .* data set lacks one"):
            score(results, dataset)


def test_wrong_classes_and_nothing_have_ap_0(dataset):
    results = truth(dataset)
    for result in results:
        result["category_id"] = {3: 7, 7: 20, 20: 3}[result["category_id"]]
    assert score(results, dataset).ap == 0
    assert score([], dataset).ap == 0


def test_sizes_come_from_the_data(dataset):
    dataset.info["area_thresholds"] = [256, 1296]
    metrics = score(truth(dataset), dataset)
    assert math.isnan(metrics.ap_small) and metrics.ap_medium == 1  # 320 pixels


def test_results_are_in_pixels_with_the_datas_own_ids(dataset):
    model = DeformableDETR(TINY)
    results = predict_dataset(model, dataset, batch_size=4, progress=False)
    assert len(results) == 6 * 18  # 6 queries, 3 classes
    assert {r["category_id"] for r in results} <= {3, 7, 20}
    assert {r["image_id"] for r in results} == set(dataset.image_ids)
    assert max(r["bbox"][0] + r["bbox"][2] for r in results) > 2  # not normalised


def test_detections_do_not_depend_on_the_batch(tmp_path):
    """Of images of mixed widths: those of one size share a batch, whatever its size, and the order
    stays. Padded to one size, as the official code does it, boxes move by up to a cell of a map.
    """
    content = write_coco(tmp_path, images=0)
    content["images"] = [
        {"id": i, "file_name": f"{i}.png", "width": width, "height": 48}
        for i, width in enumerate([64, 57, 64, 90, 57, 64])
    ]
    rng = np.random.default_rng(0)
    for image in content["images"]:
        pixels = rng.integers(0, 255, (48, image["width"], 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "train" / image["file_name"])
    content["images"][4]["width"] = 64  # the file is wrong about it, or does not say it
    del content["images"][5]["width"]
    save_annotations(tmp_path, content)
    dataset = CocoDataset(*find_split(tmp_path, "train"))
    torch.manual_seed(0)
    model = DeformableDETR(TINY)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    shapes = []
    model.backbone.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    alone = predict_dataset(model, dataset, batch_size=1, progress=False)
    shapes.clear()
    together = predict_dataset(model, dataset, batch_size=4, progress=False)
    assert sorted(shapes) == sorted(
        [(2, 3, 48, 64), (1, 3, 48, 57), (1, 3, 48, 90), (1, 3, 48, 57), (1, 3, 48, 64)]
    )
    assert [r["image_id"] for r in together] == [r["image_id"] for r in alone]
    for one, other in zip(alone, together, strict=True):
        assert one["category_id"] == other["category_id"]
        # sums over a batch are added in another order
        assert one["bbox"] == pytest.approx(other["bbox"], abs=1e-3)
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)


@pytest.mark.parametrize("share", [2, 5])
def test_shares_of_processes_are_the_whole(dataset, share):
    model = DeformableDETR(TINY)
    whole = predict_dataset(model, dataset, 2, progress=False)
    parts = [
        result
        for process in range(share)
        for result in predict_dataset(model, dataset, 2, progress=False, share=(process, share))
    ]
    assert in_order_of(dataset, parts) == whole


def test_every_module_keeps_its_mode_also_after_an_error(dataset):
    model = DeformableDETR(TINY).train()
    model.backbone.eval()
    modes = [module.training for module in model.modules()]
    predict_dataset(model, dataset, progress=False)
    assert [module.training for module in model.modules()] == modes
    model.decoder.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        predict_dataset(model, dataset, progress=False)
    assert [module.training for module in model.modules()] == modes


def test_no_images_have_no_metrics(coco):
    save_annotations(coco, write_coco(coco, "none", images=1) | {"images": []}, "none")
    dataset = CocoDataset(*find_split(coco, "none"))
    metrics = evaluate(DeformableDETR(TINY), dataset, progress=False)
    assert metrics.images == 0 and all(math.isnan(value) for value in metrics.rows().values())
    assert metrics.to_dict()["ap"] is None and "0 images" in str(metrics)


def test_workers_leave_ctrl_c_to_the_main_process(coco):
    def transform(*sample):
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        return TO_TENSOR(*sample)

    dataset = CocoDataset(*find_split(coco, "train"), transform)
    assert predict_dataset(DeformableDETR(TINY), dataset, num_workers=1, progress=False)


def test_splits_must_name_the_same_classes(coco, dataset):
    val_set = CocoDataset(*find_split(coco, "val"))
    same_categories(dataset, val_set)
    val_set.categories[0] = {"id": 3, "name": "pink"}
    with pytest.raises(ValueError, match="category 3, 'red', is in one of train and val only"):
        same_categories(dataset, val_set)


def test_another_number_of_classes_is_refused(dataset):
    dataset.categories.pop()
    with pytest.raises(ValueError, match="3 classes, the data has 2"):
        evaluate(DeformableDETR(TINY), dataset, progress=False)
