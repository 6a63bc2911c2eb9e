"""Pictures of every depth and shape, and what is no picture: what is read, and what is said."""

import io
import json
import os
import struct
import sys
import threading
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from deformable_detr.data import picture_checks, transforms
from deformable_detr.data.checks import check_dataset
from deformable_detr.data.coco import CocoDataset, collate, find_split
from deformable_detr.data.images import open_image, read_image
from deformable_detr.data.split_checks import check_splits
from deformable_detr.models import build_model
from tests.conftest import TINY, save_annotations, write_coco

CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}  # by PNG's type of colour: grey, RGB, grey and RGB with alpha


def png(pixels):
    """A PNG file of 16 bits, (H, W, C) big-endian; Pillow writes grey ones only."""
    height, width, channels = pixels.shape
    kind = {count: kind for kind, count in CHANNELS.items()}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff(pixels, order="<", compressed=False):
    """A TIFF file of 16-bit colours, (H, W, 3), in either order of bytes."""
    height, width, channels = pixels.shape
    data = pixels.astype(f"{order}u2").tobytes()
    data = zlib.compress(data) if compressed else data
    tags = [  # number, type (3: short, 4: long), count, value
        *((256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, 8 + 2 + 10 * 12 + 4)),
        *((259, 3, 1, 8 if compressed else 1), (262, 3, 1, 2), (273, 4, 1, 8 + 2 + 10 * 12 + 10)),
        *((277, 3, 1, channels), (278, 3, 1, height), (279, 4, 1, len(data)), (284, 3, 1, 1)),
    ]
    entries = b""
    for number, kind, count, value in tags:
        short = kind == 3 and count == 1
        packed = struct.pack(f"{order}HH", value, 0) if short else struct.pack(f"{order}I", value)
        entries += struct.pack(f"{order}HHI", number, kind, count) + packed
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    return start + entries + b"\0" * 4 + struct.pack(f"{order}HHH", 16, 16, 16) + data


def colours(largest, channels=3):
    pixels = np.random.default_rng(0).integers(0, largest + 1, (9, 7, channels))
    pixels[0, 0] = largest
    return pixels.astype(np.uint16)


DEPTHS = {8: 255, 12: 4095, 16: 65535}
KINDS = ["grey", "rgb", "rgba", "la", "<", ">", "< zip", "> zip", "array", "grey tif"]


@pytest.mark.parametrize("bits", DEPTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_sixteen_bits_are_read_as_what_they_hold(tmp_path, kind, bits):
    """Of 8 or 12 bits, the upper eight of 16 are nearly empty: the picture would be black."""
    pixels = colours(DEPTHS[bits], 1 if kind in ("grey", "la", "grey tif") else 3)
    alpha = np.full_like(pixels[..., :1], 65535)
    path = tmp_path / ("x.png" if kind in ("grey", "rgb", "rgba", "la") else "x.tif")
    if kind == "array":
        path = pixels
    elif kind == "grey tif":
        Image.fromarray(pixels[..., 0]).save(path)
    elif path.suffix == ".tif":
        path.write_bytes(tiff(pixels, kind[0], "zip" in kind))
    else:
        path.write_bytes(png(np.dstack([pixels, alpha]) if kind in ("rgba", "la") else pixels))
    expected = np.broadcast_to(pixels >> (bits - 8), (9, 7, 3))
    sources = [path]
    if kind != "array":  # also as Pillow opens it, from the disk and from memory
        sources += [Image.open(path), Image.open(io.BytesIO(path.read_bytes()))]
    for source in sources:
        opened = open_image(source)
        assert np.array_equal(np.asarray(opened.image), expected) and opened.bits == bits


def test_what_was_done_is_said_once_and_black_stays_black(tmp_path, monkeypatch):
    monkeypatch.setattr("deformable_detr.data.images.__warningregistry__", {}, raising=False)
    for name, pixels in (("a", colours(4095)), ("b", colours(4000)), ("c", colours(0))):
        (tmp_path / f"{name}.png").write_bytes(png(pixels))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for name in "abc":
            image = read_image(tmp_path / f"{name}.png")
            read_image(Image.new("RGB", (3, 3)))
    (line,) = said
    assert "numbers end below 4096 is read as one of 12 bits" in str(line.message)
    assert "\n" not in str(line.message)
    assert image.getextrema() == ((0, 0),) * 3


def rewrite(root, change, split="train"):
    content = json.loads((root / "annotations" / f"{split}.json").read_text())
    change(content)
    save_annotations(root, content, split)


def faults_of(root, split="train"):
    return check_dataset(*find_split(root, split))


def test_check_says_of_how_many_bits_pictures_are_and_which_are_dark(coco):
    for i, largest in enumerate((4095, 4095, 255, 65535, 700)):
        pixels = np.repeat(np.repeat(colours(largest), 8, 0), 10, 1)[:48, :64]
        (coco / "train" / f"{100 + i}.png").write_bytes(png(pixels))
    kinds = {(fault.kind, fault.message): fault.fatal for fault in faults_of(coco)}
    assert kinds == {
        (
            "bit depth",
            "of 16 bits, but no number reaches 256: read as of 8 bits, unlike 4 others of 16: "
            "1 of 6 images, such as image 102",
        ): False,
        (
            "bit depth",
            "of 16 bits, but no number reaches 4096: read as of 12 bits, unlike 2 others of 16: "
            "3 of 6 images, such as image 100",
        ): False,
        (
            "dark image",
            "nowhere brighter than 43 of 255: 1 of 6 images, such as image 104",
        ): False,
    }


def turn(path, orientation, size=None):
    exif = Image.Exif()
    exif[0x0112] = orientation
    with Image.open(path) as image:
        image.convert("RGB").resize(size or image.size).save(path, exif=exif)


def test_boxes_in_pixels_of_the_file_that_exif_turns_are_seen(coco):
    """Stated is 64 x 48, as the file is stored; it is shown as 48 x 64."""
    turn(coco / "train" / "100.png", 6)
    (fault,) = faults_of(coco)
    assert fault.fatal and fault.image_id == 100
    assert "is 48 x 64, not 64 x 48: its EXIF turns it; are its boxes, too" in fault.message
    rewrite(coco, lambda c: c["images"][0].update(width=48, height=64))
    assert [f.kind for f in faults_of(coco)] in ([], ["box cut"], ["box outside"])


def test_very_large_images_are_better_cut(coco, monkeypatch):
    assert not [fault for fault in faults_of(coco) if fault.kind == "large image"]
    monkeypatch.setattr(picture_checks, "SHORT_SIDE", 15)  # 48 pixels are more than 3 x 15
    (fault,) = (fault for fault in faults_of(coco) if fault.kind == "large image")
    assert "deformable-detr tile cuts them: 6 of 6 images" in fault.message and not fault.fatal


@pytest.mark.parametrize("orientation", [2, 3, 4])
def test_a_picture_that_exif_turns_within_its_size_is_a_warning(coco, orientation):
    turn(coco / "train" / "101.png", orientation)
    (fault,) = faults_of(coco)
    assert (fault.kind, fault.fatal, fault.image_id) == ("turned image", False, 101)


def test_sizes_of_minus_one_are_not_stated(coco):
    """The files' own are taken: a box outside of them is still seen. All in one line."""

    def change(content):
        for image in content["images"]:
            image.update(width=-1, height=0)
        content["annotations"][0]["bbox"] = [90, 3, 4, 80]

    rewrite(coco, change)
    faults = {fault.kind: fault for fault in faults_of(coco)}
    assert "not stated: 6 of 6 images, such as image 100" in faults["image size"].message
    assert not faults["image size"].fatal and faults["box outside"].fatal
    assert set(faults) == {"image size", "box outside"}


def within(seconds, work):
    """What `work` returns; AssertionError where it does not end."""
    result = []
    thread = threading.Thread(target=lambda: result.append(work()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert result, "it hangs"
    return result[0]


@pytest.mark.skipif(sys.platform == "win32", reason="has no named pipes")
def test_a_pipe_in_the_place_of_a_file_does_not_hang(coco):
    for path in (coco / "train" / "102.png", coco / "annotations" / "val.json"):
        path.unlink()
        os.mkfifo(path)
    (fault,) = within(60, lambda: faults_of(coco))
    assert fault.kind == "corrupt image" and "102.png: it is no file" in fault.message

    def read():
        with pytest.raises(ValueError, match=r"val\.json is no file"):
            check_dataset(coco / "val", coco / "annotations" / "val.json")
        return True

    assert within(60, read)


def dds():
    """A texture whose pixels Pillow does not know: it raises NotImplementedError."""
    head = struct.pack("<7I", 124, 0x1007, 4, 4, 0, 0, 0) + b"\0" * 44
    head += struct.pack("<II4s5I", 32, 4, b"ABCD", 0, 0, 0, 0, 0)
    return b"DDS " + head + struct.pack("<5I", 0x1000, 0, 0, 0, 0) + b"\0" * 64


def test_whatever_a_decoder_raises_is_one_line(coco, monkeypatch):
    path = coco / "train" / "100.png"
    path.write_bytes(dds())
    (fault,) = faults_of(coco)
    assert fault.kind == "corrupt image" and "it is none of " in fault.message
    for error in (NotImplementedError("a"), KeyError(3), AssertionError(), RuntimeError("a\nb")):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(Image, "open", fail)
        with pytest.raises(ValueError, match=r"cannot read image .*101\.png: .") as raised:
            read_image(coco / "train" / "101.png")
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["x" * 5000 + ".png", "a\0b.png", "a/" * 3000 + ".png"], ids=repr)
def test_names_that_no_file_can_have_are_missing(coco, name):
    rewrite(coco, lambda c: c["images"][0].update(file_name=name))
    (fault,) = faults_of(coco)
    assert fault.fatal and fault.image_id == 100 and len(str(fault)) < 700
    places = {split: find_split(coco, split) for split in ("train", "val")}
    assert {f.kind for f in check_splits(places)} == {"in two splits"}


def test_files_that_are_all_missing_are_one_line_with_what_is_there(coco):
    rewrite(coco, lambda c: [i.update(file_name=f"no/{i['id']}.jpg") for i in c["images"]])
    (fault,) = faults_of(coco)
    assert (fault.kind, fault.fatal) == ("missing image", True)
    assert "none of 6 images is there; the first, no/100.jpg, was expected at " in str(fault)
    assert "holds 6 pictures, such as 10" in str(fault)


THIN = [(20_000, 1), (1, 20_000), (20_000, 3)]


@pytest.mark.parametrize("size", THIN, ids=str)
def test_a_line_of_pixels_is_said_and_does_not_grow(tmp_path, size):
    """Its short side would become 800 pixels, its long one 16 million."""
    write_coco(tmp_path, images=1)
    Image.new("RGB", size, "white").save(tmp_path / "train" / "100.png")
    rewrite(tmp_path, lambda c: c["images"][0].update(width=size[0], height=size[1]))
    kinds = {fault.kind for fault in faults_of(tmp_path)}
    assert "thin image" in kinds
    image = Image.new("RGB", size)
    box = tv_tensors.BoundingBoxes([[0.0, 0, 1, 1]], format="XYXY", canvas_size=size[::-1])
    for name in ("coco", "strong"):
        for seed in range(12):
            torch.manual_seed(seed)
            transform = getattr(transforms, f"{name}_train_transform")()
            picture, *_ = transform(image, box, torch.tensor([0]))
            assert max(picture.shape) <= 2 * 1333
    assert max(transforms.coco_eval_transform()(image).shape) <= 2 * 1333


def test_a_batch_that_would_be_padded_to_both_sides_is_said(tmp_path):
    write_coco(tmp_path, images=3)
    for name, size in (("100", (20_000, 8)), ("101", (8, 20_000))):
        Image.new("RGB", size, "white").save(tmp_path / "train" / f"{name}.png")
    (fault,) = (fault for fault in faults_of(tmp_path) if fault.kind == "padding")
    assert "image 100 is 20000 wide and image 101 is 20000 high" in str(fault)


def test_images_below_a_cell_of_the_maps_are_said_and_can_be_learned(tmp_path):
    """One cell has no variance: batch normalisation raises in training."""
    write_coco(tmp_path, images=2)
    for name in ("100", "101"):
        Image.new("RGB", (7, 5), "white").save(tmp_path / "train" / f"{name}.png")

    def change(content):
        content["annotations"][0].update(bbox=[1, 1, 4, 3], area=12)
        [image.update(width=7, height=5) for image in content["images"]]

    rewrite(tmp_path, change)
    (fault,) = (fault for fault in faults_of(tmp_path) if fault.kind == "small image")
    assert "smaller than 32 pixels both ways" in str(fault) and "2 of 2 images" in str(fault)
    model = build_model(TINY)
    for training in (True, False):
        transform = (
            transforms.digits_train_transform() if training else transforms.digits_eval_transform()
        )
        dataset = CocoDataset(*find_split(tmp_path, "train"), transform)
        output = model.train(training)(collate([dataset[0]]))
        assert output.boxes.isfinite().all()
    boxes = dataset[0][1].boxes  # the last one keeps the proportions
    torch.testing.assert_close(boxes[0], torch.tensor([3 / 7, 2.5 / 5, 4 / 7, 3 / 5]))
