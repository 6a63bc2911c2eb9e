"""How images are prepared goes out with a model, in every format, and comes in again."""

import dataclasses
import json
import logging
import re

import pytest
import torch
from PIL import Image

from deformable_detr import DeformableDETR, DeformableDETRConfig
from deformable_detr.data.transforms import STD
from deformable_detr.inference.detector import Detector, load_detector
from deformable_detr.inference.postprocess import postprocess
from deformable_detr.models import DETR, DETRConfig
from deformable_detr.structures import Batch
from deformable_detr.weights.images import from_preprocessor
from deformable_detr.weights.published import load_pretrained
from tests.test_huggingface import randomise

transformers = pytest.importorskip("transformers", minversion="5.0")

SMALL = {
    "num_classes": 5,
    "num_queries": 20,
    "backbone": "resnet18",
    "embed_dim": 64,
    "num_heads": 4,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "ffn_dim": 64,
}
MODELS = {
    "deformable_detr": lambda: DeformableDETR(DeformableDETRConfig(**SMALL, refine=True)),
    "detr": lambda: DETR(DETRConfig(**SMALL)),
}
CATEGORIES = [{"id": i, "name": f"class {i}"} for i in range(5)]


def detector(model="deformable_detr", **options):
    torch.manual_seed(0)
    made = MODELS[model]().eval()
    randomise(made)
    return Detector(made, CATEGORIES, 0.004, **({"short_side": 160} | options))


def picture():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 255, (10, 12, 3), dtype=torch.uint8, generator=generator)
    return Image.fromarray(pixels.numpy()).resize((97, 78), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("options", [{}, {"transforms": "digits"}], ids=["resized", "as it is"])
def test_transformers_pipeline_finds_what_we_find(tmp_path, model, options):
    """Loads what it needs, and sees the image in the size that the detector was trained at."""
    ours = detector(model, **options)
    ours.save_pretrained(tmp_path, "huggingface")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    seen = processor(images=picture(), return_tensors="pt")["pixel_values"][0]
    # Pillow and torchvision round a few pixels to neighbouring levels of grey
    level = 1.01 / 255 / min(STD)
    torch.testing.assert_close(seen, ours.eval_transform()(picture()), atol=level, rtol=0)
    assert min(seen.shape[1:]) == (78 if options else 160)
    pipeline = transformers.pipeline("object-detection", model=str(tmp_path))
    theirs = pipeline(picture(), threshold=0.004)
    # from the same pixels: a level of grey changes scores by some thousandths
    with torch.no_grad():
        output = ours.model(Batch.from_images([seen]))
    (found,) = postprocess(output, [(78, 97)], threshold=0.004)
    assert len(found) >= 5 and abs(len(theirs) - len(found)) <= 1  # at the threshold itself
    theirs = sorted(theirs, key=lambda each: -each["score"])
    for each, score, label, box in zip(
        theirs, found.scores.tolist(), found.labels.tolist(), found.boxes.tolist(), strict=False
    ):
        assert each["score"] == pytest.approx(score, abs=1e-5)
        assert each["label"] == f"class {label}"
        # theirs are whole pixels, and neither is cut at the picture's border
        assert list(each["box"].values()) == pytest.approx(box, abs=1.01)


@pytest.mark.parametrize("format", ["ours", "huggingface", "official"])
@pytest.mark.parametrize(
    "options", [{"short_side": 480}, {"transforms": "strong"}, {"transforms": "digits"}], ids=str
)
def test_threshold_transforms_and_size_travel(tmp_path, format, options):
    before = detector(**options)
    path = tmp_path / {"ours": "a.safetensors", "huggingface": "a", "official": "a.pth"}[format]
    before.save_pretrained(path, format)
    after = load_detector(path)
    assert after.card() == before.card()
    image = picture()
    assert torch.equal(after.eval_transform()(image), before.eval_transform()(image))


def folder(tmp_path, **changes):
    """A folder as others write it: without a card of ours."""
    detector().save_pretrained(tmp_path, "huggingface")
    (tmp_path / "card.json").unlink()
    path = tmp_path / "preprocessor_config.json"
    content = {k: v for k, v in (json.loads(path.read_text()) | changes).items() if v is not ...}
    path.write_text(json.dumps(content))
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "short_side", "said"),
    [
        ({}, 160, None),
        ({"size": {"shortest_edge": 480, "longest_edge": 800}}, 480, None),
        ({"size": 600, "max_size": 1000}, 600, None),
        ({"size": ...}, 800, None),
        ({"size": {"shortest_edge": 480, "longest_edge": 600}}, 480, "at most 600 pixels, here 80"),
        ({"size": {"height": 640, "width": 512}}, 512, "640 x 512 pixels, here a shorter side"),
        ({"image_mean": [0.5, 0.5, 0.5]}, 160, "its image_mean is .0.5, 0.5, 0.5., here"),
        ({"image_std": "grey"}, 160, "its image_std is 'grey', here"),
        ({"do_normalize": False}, 160, "its do_normalize is False, here True"),
        ({"resample": 3}, 160, "its resample is 3, here 2"),
    ],
    ids=str,
)
def test_a_difference_is_said_in_one_line(tmp_path, caplog, changes, short_side, said):
    caplog.set_level(logging.WARNING)
    found = load_detector(folder(tmp_path, **changes))
    assert found.short_side == short_side and found.transforms == "coco"
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == (said is not None)
    for message in messages:
        assert "prepares images otherwise" in message and "\n" not in message
        assert re.search(said, message)


def test_images_that_are_not_resized(tmp_path):
    assert load_detector(folder(tmp_path, do_resize=False)).transforms == "digits"


@pytest.mark.parametrize("size", [{}, "large", {"shortest_edge": -1}, None, {"shortest_edge": "8"}])
def test_a_size_that_means_nothing_is_refused(tmp_path, size):
    with pytest.raises(ValueError, match="not one we can use: its size is"):
        load_detector(folder(tmp_path, size=size))
    with pytest.raises(ValueError, match="its size is"):
        from_preprocessor({"size": size})


def test_a_size_beyond_reason_is_refused(tmp_path):
    for size in (10**5, 8):
        with pytest.raises(ValueError, match=f"short_side must be from 32 to 4096, got {size}"):
            load_detector(folder(tmp_path, size={"shortest_edge": size}))


@pytest.mark.parametrize("text", ["[1]", "{", "null", '"\\ud800"'])
def test_a_broken_file_is_refused_in_one_line(tmp_path, text):
    path = folder(tmp_path)
    for name in ("preprocessor_config.json", "card.json"):
        before = (path / name).read_text() if (path / name).exists() else "{}"
        (path / name).write_text(text)
        with pytest.raises(ValueError, match=name) as refused:
            load_detector(path)
        assert "\n" not in str(refused.value)
        (path / name).write_text(before)


def test_a_folder_without_either_is_prepared_as_published(tmp_path):
    path = folder(tmp_path)
    (path / "preprocessor_config.json").unlink()
    assert load_pretrained(path).card == {}
    assert load_detector(path).short_side == 800


def test_a_detector_prints_short():
    text = repr(dataclasses.replace(detector(), categories=[{"id": 0, "name": "a\n"}] * 200))
    assert len(text) < 200 and "\n" not in text and "200 classes" in text and "160" in text
    assert str(detector()) == repr(detector())
