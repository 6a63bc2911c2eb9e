"""Detections from whatever picture people have, in its pixels, with their data's own names."""

import dataclasses
import json
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from deformable_detr import Batch, DeformableDETR, Detections, Output
from deformable_detr.data.checks import check_dataset
from deformable_detr.data.coco import CocoDataset, find_split
from deformable_detr.data.images import read_image
from deformable_detr.data.transforms import TO_TENSOR
from deformable_detr.evaluation.coco import predict_dataset
from deformable_detr.inference.detector import (
    Detector,
    load_detector,
    read_card,
    update_card,
)
from deformable_detr.inference.predict import predict, predict_each
from deformable_detr.inference.views import View, fuse, make_views, suppress
from deformable_detr.models import DETRConfig, build_model
from deformable_detr.weights.classes import with_classes
from deformable_detr.weights.ours import load_model, save_model
from tests.conftest import TINY

CATEGORIES = [{"id": 3, "name": "red"}, {"id": 7, "name": "green"}, {"id": 20, "name": "blue"}]


class Finder(DeformableDETR):
    """Finds the rectangle whose pixels are all one bright colour: the right answer is known."""

    def forward(self, batch):
        logits = torch.full((len(batch), 2, 3), -9.0)
        boxes = torch.full((len(batch), 2, 4), 0.5)
        for i, (image, (height, width)) in enumerate(zip(batch.images, batch.sizes, strict=True)):
            image = image[:, :height, :width]
            label = (image - image.mean(0)).amax((1, 2)).argmax()
            bright = image[label] - image.sum(0) / 3 > 0.5
            y, x = bright.nonzero(as_tuple=True)
            x0, x1, y0, y1 = x.min(), x.max() + 1, y.min(), y.max() + 1
            size = torch.tensor([width, height, width, height])
            box = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0])
            boxes[i, 1], logits[i, 1, label] = box / size, 2.0
        return Output(logits, boxes)


@pytest.fixture(scope="module")
def finder():
    return Detector(Finder(TINY), CATEGORIES, transforms="digits")


def picture(box=(6, 10, 30, 22), colour=1, size=(64, 48)):
    """A coloured rectangle on grey."""
    image = Image.new("RGB", size, (90, 90, 90))
    colours = [0, 0, 0]
    colours[colour] = 255
    image.paste(tuple(colours), box)
    return image


def test_every_kind_of_picture_in_one_list(finder, tmp_path):
    image = picture()
    image.save(tmp_path / "000000039769.png")
    inputs = [image, np.asarray(image), tmp_path / "000000039769.png", str(tmp_path)]
    inputs.append(picture((2, 3, 12, 40), colour=2, size=(33, 50)))
    found = predict(finder, inputs, batch_size=2)
    for each in found[:4]:
        assert each.boxes.tolist() == [[pytest.approx(x, abs=1e-4) for x in (6, 10, 30, 22)]]
        assert each.names == ["green"] and each.category_ids == [7] and each.labels.tolist() == [1]
        assert each.queries.tolist() == [1]
        assert each.scores.tolist() == [pytest.approx(torch.tensor(2.0).sigmoid().item())]
        assert each.size == (48, 64) and each.image.tobytes() == image.tobytes()
    assert found[2].path == found[3].path == tmp_path / "000000039769.png"
    assert found[4].names == ["blue"] and found[4].size == (50, 33)
    (single,) = predict(finder, image)
    assert torch.equal(single.boxes, found[0].boxes)


def test_coco_results(finder, tmp_path):
    for name in ("000000039769.png", "photo.png"):
        picture().save(tmp_path / name)
    found = predict(finder, tmp_path)
    for each, image_id in zip(found, (39769, "photo.png"), strict=True):
        (result,) = json.loads(json.dumps(each.to_coco()))
        assert result["image_id"] == image_id and result["category_id"] == 7
        assert result["bbox"] == [pytest.approx(x, abs=1e-4) for x in (6, 10, 24, 12)]
    (of_array,) = predict(finder, picture())
    assert of_array.to_coco(5)[0]["image_id"] == 5
    with pytest.raises(ValueError, match="came from no file needs an image_id"):
        of_array.to_coco()


def test_detections_of_several_images_and_some_of_one():
    parts = [
        Detections(torch.rand(n), torch.arange(n), torch.rand(n, 4), -torch.arange(n))
        for n in (3, 0, 2)
    ]
    whole = Detections.cat(parts)
    assert len(whole) == 5 and whole.queries.tolist() == [0, -1, -2, 0, -1]
    for index in (slice(3, 5), torch.tensor([3, 4]), torch.arange(5) > 2):
        some = whole[index]
        assert torch.equal(some.boxes, parts[2].boxes) and torch.equal(some.labels, parts[2].labels)
    assert whole.to("meta").scores.device.type == "meta"


def test_the_same_as_evaluation(coco):
    """Through files, names and ids, what `evaluate` counts is what `predict` shows."""
    torch.manual_seed(0)
    model = DeformableDETR(TINY).train()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    dataset = CocoDataset(coco / "train", coco / "annotations" / "train.json")
    expected = predict_dataset(model, dataset, 3, progress=False)
    found = predict(
        Detector(model, dataset.categories, 0.0, "digits"), coco / "train", batch_size=3
    )
    results = [result for each in found for result in each.to_coco()]
    assert len(results) == len(expected) and model.training
    for one, other in zip(results, expected, strict=True):
        assert one["image_id"] == other["image_id"] and one["category_id"] == other["category_id"]
        assert one["bbox"] == pytest.approx(other["bbox"], abs=1e-3)


def test_threshold_and_top_k(finder):
    bare = predict(finder.model, picture(), transform=TO_TENSOR, threshold=0.0)[0]
    assert len(bare) == 6 and bare.names[0] == "class 1"
    assert len(predict(finder, picture(), threshold=0.0, top_k=4)[0]) == 4
    assert len(predict(finder, picture(), threshold=0.9)[0]) == 0
    nothing = predict(finder, picture(), threshold=0.9)[0]
    assert nothing.to_coco(1) == [] and nothing.draw().size[0] >= 64
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\], got 1.5"):
        predict(finder, picture(), threshold=1.5)
    with pytest.raises(ValueError, match="the model has 3 classes, got 1 categories"):
        predict(finder.model, picture(), categories=CATEGORIES[:1])


def test_suppression_on_request(finder):
    """Two boxes that overlap, each with three classes: suppression leaves one of each class."""
    for nms, count in ((None, 6), (0.9, 6), (0.0, 3)):
        found = predict(finder, picture(), threshold=0.0, nms=nms)[0]
        assert len(found) == count and found.names[0] == "green"
    with pytest.raises(ValueError, match=r"nms must be in \[0, 1\], or None for all boxes, got 2"):
        predict(finder, picture(), nms=2)


def test_the_file_keeps_threshold_and_transforms(tmp_path):
    path = tmp_path / "model.safetensors"
    model = DeformableDETR(TINY)
    save_model(model, path, CATEGORIES, {"command": "this one"})
    assert load_detector(path).threshold == 0.5 and load_detector(path).transforms == "digits"
    update_card(path, threshold=0.0, transforms="coco")
    assert read_card(path) == {"command": "this one", "threshold": 0.0, "transforms": "coco"}
    detector = load_detector(path)
    assert detector.threshold == 0 and detector.transforms == "coco"
    assert detector.short_side == 800
    update_card(path, short_side=96)
    assert load_detector(path).short_side == 96
    assert detector.categories == CATEGORIES
    for name, tensor in load_model(path)[0].state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    update_card(path, transforms="digits")
    (found,) = predict(path, picture())
    assert len(found) == 18  # a threshold of 0 keeps all of 6 queries and 3 classes
    wrongs = {"threshold": "high"}, {"threshold": 2}, {"transforms": "secret"}, {"short_side": 8}
    for wrong in wrongs:
        save_model(model, path, CATEGORIES, wrong)
        with pytest.raises(ValueError, match=next(iter(wrong))):
            load_detector(path)


def test_turned_by_exif(finder, tmp_path):
    """The camera stored it lying; people see, and annotate, it standing."""
    stored = picture((6, 10, 30, 22), size=(64, 48))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show it
    stored.save(tmp_path / "turned.png", exif=exif)
    (found,) = predict(finder, tmp_path / "turned.png")
    assert found.size == (64, 48) and found.image.size == (48, 64)
    assert found.boxes[0].tolist() == pytest.approx([48 - 22, 6, 48 - 10, 30], abs=1e-4)


def test_other_modes_of_colour(tmp_path):
    grey = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
    expected = np.stack([grey] * 3, -1)
    deep = grey.astype(np.uint16) * 256 + 7
    for name, image in {
        "grey.png": Image.fromarray(grey),
        "deep.png": Image.fromarray(deep),
        "deep.tif": Image.fromarray(deep),
        "rgba.png": Image.fromarray(np.dstack([expected, grey])),
        "palette.png": Image.fromarray(grey).convert("P"),
    }.items():
        image.save(tmp_path / name)
        assert np.array_equal(np.asarray(read_image(tmp_path / name)), expected), name
    Image.fromarray(grey).save(tmp_path / "clear.png", transparency=5)
    assert np.array_equal(np.asarray(read_image(tmp_path / "clear.png")), expected)
    for array in (grey, grey[:, :, None], deep, np.dstack([deep] * 3), expected):
        assert np.array_equal(np.asarray(read_image(array)), expected)
    assert np.array_equal(np.asarray(read_image(expected[:, ::-1])), expected[:, ::-1])
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "real.tif")
    Image.fromarray(grey.astype(np.int32) * 10_000).save(tmp_path / "long.tif")
    for name in ("real.tif", "long.tif"):
        with pytest.raises(ValueError, match=f"{name}: its pixels are . of Pillow"):
            read_image(tmp_path / name)
    for array in (grey / 255.0, expected.transpose(2, 0, 1), grey[:0], grey[0]):
        with pytest.raises(ValueError, match="an image array must be uint8 or uint16 and"):
            read_image(array)


def test_files_that_cannot_be_read(finder, tmp_path):
    picture().save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    (tmp_path / "c.jpg").write_bytes(b"")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "d.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "notes.txt").write_text("no picture either, and none is expected")
    with pytest.warns(UserWarning, match=r"3 files passed over: .*b\.png.*c\.jpg.*d\.png"):
        found = predict(finder, tmp_path)
    assert [each.path.name for each in found] == ["a.png"]
    for name in ("b.png", "c.jpg", "d.png"):
        with pytest.raises(ValueError, match=f"cannot read image .*{name}"):
            predict(finder, [tmp_path / "a.png", tmp_path / name])
    with pytest.raises(FileNotFoundError, match=r"no image at .*no\.png"):
        predict(finder, tmp_path / "no.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no image in the folder .*empty"):
        predict(finder, tmp_path / "empty")
    (tmp_path / "empty" / "deeper").mkdir()
    with pytest.raises(FileNotFoundError, match="its 1 subfolders are not searched"):
        predict(finder, tmp_path / "empty")
    with pytest.raises(TypeError, match="got Tensor"):
        predict(finder, torch.zeros(3, 8, 8))


def test_it_holds_a_batch_at_most(finder, tmp_path, monkeypatch):
    """Of a folder of many, images are read as they are needed."""
    for i in range(5):
        picture().save(tmp_path / f"{i}.png")
    opened = []
    original = Image.open
    monkeypatch.setattr(
        Image, "open", lambda p, **options: opened.append(p) or original(p, **options)
    )
    each = predict_each(finder, tmp_path, batch_size=2)
    next(each)
    assert len(opened) == 2
    assert len(list(each)) == 4 and len(opened) == 5


def test_to_supervision(finder, monkeypatch):
    (found,) = predict(finder, picture())
    found.boxes += torch.tensor([-9.0, 0, 50, 0])  # beyond the left and right borders
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match="pip install supervision"):
        found.to_supervision()
    stand_in = types.SimpleNamespace(Detections=lambda **fields: fields)
    monkeypatch.setitem(sys.modules, "supervision", stand_in)
    fields = found.to_supervision()
    x0, y0, x1, y1 = found.boxes[0].tolist()
    assert x0 < 0 and x1 > 64 and fields["xyxy"].tolist() == [[0, y0, 64, y1]]
    assert fields["class_id"].tolist() == [1]
    assert fields["confidence"].tolist() == found.scores.tolist()
    assert fields["data"]["class_name"].tolist() == ["green"]


def test_supervision_itself(finder):
    import supervision

    detections = predict(finder, [picture()])[0].to_supervision()
    assert isinstance(detections, supervision.Detections) and len(detections) == 1
    assert detections["class_name"].tolist() == ["green"]
    empty = predict(finder, picture(), threshold=1.0)[0].to_supervision()
    assert len(empty) == 0 and len(supervision.Detections.merge([detections, empty])) == 1


def test_tiles_of_a_large_image_by_supervision(finder):
    """As the README shows it: the boxes of each tile, moved to the tile's place."""
    import supervision

    tiles = picture(), picture((2, 3, 12, 40), colour=2)
    slicer = supervision.InferenceSlicer(
        lambda tile: predict(finder, tile)[0].to_supervision(), slice_wh=(64, 48), overlap_wh=0
    )
    found = slicer(np.concatenate([np.asarray(tile) for tile in tiles], 1))
    boxes = dict(zip(found["class_name"].tolist(), found.xyxy.tolist(), strict=True))
    assert boxes == {
        "green": pytest.approx([6, 10, 30, 22], abs=1e-4),
        "blue": pytest.approx([64 + 2, 3, 64 + 12, 40], abs=1e-4),
    }


@pytest.mark.parametrize("kind", ["yolo", "voc"])
def test_other_formats_by_supervision(kind, tmp_path):
    """The conversion that data/README.md shows: images, boxes and names arrive whole."""
    import supervision

    source, target = tmp_path / "theirs", tmp_path / "ours"
    for folder in ("images", "labels"):
        (source / folder).mkdir(parents=True)
    picture((6, 10, 30, 22)).save(source / "images" / "a.png")
    picture(size=(40, 30)).save(source / "images" / "b.png")  # nothing on it
    if kind == "yolo":
        (source / "data.yaml").write_text("nc: 2\nnames: [cat, dog]\n")
        (source / "labels" / "a.txt").write_text(f"1 {18 / 64} {16 / 48} {24 / 64} {12 / 48}\n")
        (source / "labels" / "b.txt").write_text("")
        data = supervision.DetectionDataset.from_yolo(
            str(source / "images"), str(source / "labels"), str(source / "data.yaml")
        )
    else:
        # counted from one, the last pixel included
        corners = "<xmin>7</xmin><ymin>11</ymin><xmax>30</xmax><ymax>22</ymax>"
        for name, boxes in (
            ("a", f"<object><name>dog</name><bndbox>{corners}</bndbox></object>"),
            ("b", ""),
        ):
            text = f"<annotation><filename>{name}.png</filename>{boxes}</annotation>"
            (source / "labels" / f"{name}.xml").write_text(text)
        data = supervision.DetectionDataset.from_pascal_voc(
            str(source / "images"), str(source / "labels")
        )
    data.as_coco(str(target / "train"), str(target / "annotations" / "train.json"))
    place = find_split(target, "train")
    assert not [fault for fault in check_dataset(*place) if fault.fatal]
    dataset = CocoDataset(*place)
    names = [category["name"] for category in dataset.categories]
    targets = [dataset[i][1] for i in range(2)]
    (found,) = [target for target in targets if len(target.labels)]
    assert found.original_size == (48, 64) and names[found.labels[0]] == "dog"
    expected = torch.tensor([[18 / 64, 16 / 48, 24 / 64, 12 / 48]])
    torch.testing.assert_close(found.boxes, expected, atol=1e-3, rtol=0)


def test_drawing(finder):
    (found,) = predict(finder, picture())
    drawn = found.draw()
    assert drawn.size == (64 * 8, 48 * 8)
    assert drawn.getpixel((6 * 8, 15 * 8)) == (0x56, 0xB4, 0xE9)  # the colour of label 1


# Views, and what they show merged


def detections(*rows):
    """Of (score, label, x0, y0, x1, y1)."""
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return Detections(table[:, 0], table[:, 1].long(), table[:, 2:], torch.arange(len(table)))


def test_a_mirrored_or_scaled_view_finds_the_same_place(finder):
    image = picture((6, 10, 30, 22))
    (expected,) = predict(finder, image)
    for scale in (0.5, 1.0, 2.0):
        for view in make_views("digits", (scale,), flip=True):
            (found,) = predict(finder, image, views=[view])
            edge = 0.01 if scale == 1 else 0.6  # resizing blurs it
            torch.testing.assert_close(found.boxes, expected.boxes, atol=edge, rtol=0)
    views = make_views("digits", (0.5, 1, 2), flip=True)
    assert len(views) == 6
    for merge in ("fusion", "nms"):
        (found,) = predict(finder, image, views=views, merge=merge)
        torch.testing.assert_close(found.boxes, expected.boxes, atol=0.6, rtol=0)
        assert found.names == ["green"]
        torch.testing.assert_close(found.scores, expected.scores)
    with pytest.raises(ValueError, match="merge must be one of"):
        predict(finder, image, views=views, merge="mean")


def test_sizes_of_views():
    image = picture(size=(64, 48))
    small, mirrored, large = (view.of(image) for view in make_views("digits", (0.5, 1.5), True)[:3])
    assert small.shape == mirrored.shape == (3, 24, 32) and large.shape == (3, 72, 96)
    torch.testing.assert_close(small, mirrored.flip(2), atol=0.05, rtol=0)
    assert make_views("coco", (0.1,))[0].of(image).shape == (3, 80, 107 - 1)
    mirror = View(np.asarray, flip=True).of(image)
    assert np.array_equal(mirror, np.asarray(image)[:, ::-1])
    for wrong in ((), (1.0, 0.0), (float("inf"),), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="scales must be one or more numbers above 0"):
            make_views("coco", wrong)


def test_suppress_by_hand():
    one = detections((0.9, 0, 0, 0, 10, 10), (0.4, 0, 20, 0, 30, 10))
    other = detections((0.8, 0, 1, 0, 11, 10), (0.7, 1, 0, 0, 10, 10), (0.3, 0, 6, 0, 16, 10))
    merged = suppress([one, other])
    # 0.8 overlaps 0.9 by 9/11; 0.7 is of another class; 0.3 overlaps by 4/16 only
    assert merged.scores.tolist() == pytest.approx([0.9, 0.7, 0.4, 0.3])
    assert merged.labels.tolist() == [0, 1, 0, 0]
    assert merged.boxes[0].tolist() == [0, 0, 10, 10]


def test_fuse_by_hand():
    one = detections((0.6, 0, 0, 0, 10, 10), (0.5, 1, 50, 50, 60, 60))
    other = detections((0.2, 0, 2, 0, 12, 10), (0.4, 2, 50, 50, 60, 60))
    merged = fuse([one, other])
    # a mean weighted 3 to 1, with the mean score 0.4; seen by one view of two: half the score
    assert merged.labels.tolist() == [0, 1, 2]
    assert merged.scores.tolist() == pytest.approx([0.4, 0.25, 0.2])
    assert merged.boxes[0].tolist() == pytest.approx([0.5, 0, 10.5, 10])
    assert merged.boxes[1].tolist() == [50, 50, 60, 60]
    assert merged.queries.tolist() == [0, 1, 1]


def test_fuse_joins_the_nearest_and_follows_the_mean():
    views = [
        detections((0.8, 0, 0, 0, 10, 10), (0.6, 0, 4, 0, 14, 10)),
        detections((0.7, 0, 3, 0, 13, 10)),  # overlaps the second more: 9/11 against 7/13
        detections((0.5, 0, 5, 0, 15, 10)),
    ]
    merged = fuse(views)
    assert len(merged) == 2
    assert merged.scores.tolist() == pytest.approx([(0.7 + 0.6 + 0.5) / 3, 0.8 / 3])
    x = (0.7 * 3 + 0.6 * 4 + 0.5 * 5) / 1.8
    assert merged.boxes[0].tolist() == pytest.approx([x, 0, x + 10, 10])


def test_fuse_is_not_misled_by_a_views_duplicates():
    """DETR's low-scored second queries for one object would halve the mean score."""
    one = detections((0.9, 0, 0, 0, 10, 10), (0.1, 0, 0, 0, 10, 10), (0.1, 0, 0, 0, 10, 9))
    merged = fuse([one, detections((0.7, 0, 0, 0, 10, 10))])
    assert merged.scores.tolist() == pytest.approx([0.8])


def test_merging_nothing():
    for merge in (fuse, suppress):
        merged = merge([detections(), detections()])
        assert len(merged) == 0 and merged.boxes.shape == (0, 4)
        merged = merge([detections(), detections((0.6, 1, 0, 0, 4, 4))])
        assert len(merged) == 1
    same = fuse([detections((0.6, 1, 0, 0, 4, 4))] * 3)
    assert same.scores.tolist() == pytest.approx([0.6])


# Classes


SMALL = {"num_classes": 5, "backbone": "small", "embed_dim": 32, "num_heads": 2, "ffn_dim": 32}
WITH_FIVE_CLASSES = {
    "one stage": dataclasses.replace(TINY, num_classes=5),
    "two stages": dataclasses.replace(TINY, num_classes=5, two_stage=True),
    "no object": DETRConfig(**SMALL, num_queries=6, encoder_layers=1, decoder_layers=2),
}


@pytest.mark.parametrize("kind", WITH_FIVE_CLASSES)
def test_a_model_of_some_classes_keeps_their_logits(kind):
    torch.manual_seed(0)
    model = build_model(WITH_FIVE_CLASSES[kind]).eval()
    for head in model.class_heads:
        torch.nn.init.normal_(head.weight)
    names = [{"id": i, "name": str(i)} for i in range(5)]
    few, _ = with_classes(model, names, [names[i] for i in (4, 0, 2)])
    batch = Batch.from_images([View(TO_TENSOR).of(picture())])
    with torch.no_grad():
        before, after = model(batch), few(batch)
    kept = [4, 0, 2, 5] if kind == "no object" else [4, 0, 2]
    torch.testing.assert_close(after.logits, before.logits[..., kept])
    torch.testing.assert_close(after.boxes, before.boxes)
    assert not few.training


def test_a_detector_for_the_datas_categories():
    names = ["N/A", "cat", "dog"]
    detector = Detector(DeformableDETR(TINY), [{"id": i, "name": n} for i, n in enumerate(names)])
    wanted = [{"id": 17, "name": "dog"}, {"id": 90, "name": "cat"}]
    fitting = detector.for_categories(wanted)
    assert fitting.categories == wanted and fitting.model.config.num_classes == 2
    head, old = fitting.model.class_heads[0], detector.model.class_heads[0]
    assert torch.equal(head.weight, old.weight[[2, 1]])
    with pytest.raises(ValueError, match="such as 'cow'"):
        detector.for_categories([*wanted, {"id": 1, "name": "cow"}])
