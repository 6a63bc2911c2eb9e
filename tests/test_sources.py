"""What people give to be looked at, and what of it cannot be."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image

from deformable_detr.data.images import read_image
from deformable_detr.inference import remarks
from deformable_detr.inference.predict import predict, predict_each
from tests.finder import make_finder, picture


@pytest.fixture(scope="module")
def finder():
    return make_finder()


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
    with pytest.warns(UserWarning, match="3 files passed over: ") as warned:
        found = predict(finder, tmp_path)
    assert all(name in str(warned[0].message) for name in ("b.png", "c.jpg", "d.png"))
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
    with pytest.raises(FileNotFoundError, match="1 subfolder in it not searched"):
        predict(finder, tmp_path / "empty")
    for wrong in ({}, 7, None, bytearray(b"x")):
        with pytest.raises(TypeError, match=f"got {type(wrong).__name__}"):
            predict(finder, wrong)


PIXELS = np.asarray(picture())  # (48, 64, 3), uint8
FLOATS = PIXELS / 255
AS_TENSOR = torch.from_numpy(PIXELS.copy()).permute(2, 0, 1)


def as_bytes(name="PNG"):
    stored = io.BytesIO()
    picture().save(stored, name)
    return stored.getvalue()


@pytest.mark.parametrize(
    ("given", "count"),
    [
        (FLOATS, 1),
        (FLOATS.astype(np.float32), 1),
        (FLOATS.astype(np.float16), 1),
        (np.stack([PIXELS] * 2), 2),
        (np.stack([FLOATS] * 3), 3),
        (AS_TENSOR, 1),
        (AS_TENSOR / 255, 1),
        ((AS_TENSOR / 255).bfloat16(), 1),
        (torch.stack([AS_TENSOR] * 2), 2),
        ([AS_TENSOR.double().div(255).requires_grad_(), PIXELS], 2),
        (as_bytes(), 1),
        ([as_bytes("TIFF"), as_bytes("BMP")], 2),
        ((image for image in (picture(), PIXELS)), 2),
    ],
    ids=range(13),
)
def test_pixels_and_bytes_are_pictures(finder, given, count):
    found = predict(finder, given)
    assert len(found) == count
    for each in found:
        # bfloat16 has eight bits, of which the mean of two colours keeps its side
        assert each.boxes[0].tolist() == pytest.approx([6, 10, 30, 22], abs=1e-4)
        assert each.names == ["green"] and each.size == (48, 64)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (PIXELS.astype(float), r"floats must lie in \[0, 1\], got 0 to 255 in \(48, 64, 3\)"),
        (FLOATS - 0.5, r"floats must lie in \[0, 1\], got -0.5 to 0.5"),
        (FLOATS * np.nan, r"floats must lie in \[0, 1\], got nan to nan"),
        (FLOATS[:0], r"floats must lie in \[0, 1\]"),
        (AS_TENSOR.permute(1, 2, 0), r"tensor must be .*, got \(48, 64, 3\)"),
        (AS_TENSOR[0], r"tensor must be .*, got \(48, 64\)"),
        (PIXELS.transpose(2, 0, 1), r"uint8 or uint16 and .*, got uint8 and \(3, 48, 64\)"),
        (PIXELS > 7, "got bool and"),
        (AS_TENSOR.long(), "got int64 and"),
        (b"", "cannot read an image from 0 bytes"),
        (as_bytes()[:60], "cannot read an image from 60 bytes"),
        (b"text", "cannot read an image from 4 bytes: it is none of .*JPEG, .*WEBP$"),
        (as_bytes("EPS"), "bytes: it is none of"),  # which Pillow has Ghostscript read, a program
    ],
    ids=range(13),
)
def test_other_pixels_are_refused_in_one_line(finder, given, message):
    with pytest.raises(ValueError, match=message) as refused:
        predict(finder, given)
    assert "\n" not in str(refused.value)


def test_a_folder_says_what_it_passes_over(finder, tmp_path):
    """Pictures of a kind that is not read; .jfif, .avif and .jp2 are."""
    picture().save(tmp_path / "a.jfif", "JPEG")
    for name in ("b.avif", "c.jp2"):
        picture().save(tmp_path / name)
    (tmp_path / "d.heic").write_bytes(b"something")
    (tmp_path / "annotations.json").write_text("{}")
    with pytest.warns(UserWarning, match=r"^1 file passed over: .*d\.heic") as warned:
        found = predict(finder, tmp_path)
    assert len(warned) == 1 and [each.path.name for each in found] == ["a.jfif", "b.avif", "c.jp2"]


def test_first_frames_only_is_said(finder, tmp_path):
    frames = [picture(), picture((2, 3, 12, 40), colour=2)]
    for name in ("a.gif", "b.tif", "c.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    picture().save(tmp_path / "d.gif")
    with pytest.warns(UserWarning, match=r"a\.gif has 2 frames, and 2 more such files: the first"):
        found = predict(finder, tmp_path)
    assert [each.names for each in found] == [["green"]] * 4


def test_a_large_picture_is_hinted_at(finder, tmp_path):
    shrinking = dataclasses.replace(finder, transforms="coco", short_side=48)
    picture(size=(256, 192)).save(tmp_path / "a.png")
    message = r"a\.png has 256 x 192 pixels, 4\.0 times the 48 that the model knows.*--tiles 48"
    with pytest.warns(UserWarning, match=message):
        predict(shrinking, tmp_path / "a.png")
    predict(shrinking, tmp_path / "a.png", tiles=64)
    predict(shrinking, picture(size=(256, 191)))
    predict(finder, tmp_path / "a.png")
    with pytest.warns(UserWarning, match=r"image has 600 x 512 pixels, 4\.0 times the 128 that"):
        predict(finder, [picture(size=(600, 512)), picture()])


def test_too_large_for_a_model_that_does_not_shrink(finder, tmp_path, monkeypatch):
    monkeypatch.setattr(remarks, "MOST_PIXELS", 64 * 48)
    picture().save(tmp_path / "a.png")
    picture(size=(65, 48)).save(tmp_path / "b.png")
    message = r"b\.png has 65 x 48 pixels, more than the 3,072 that are seen at once: --tiles"
    with pytest.warns(UserWarning, match=message):
        assert len(predict(finder, tmp_path)) == 1
    with pytest.raises(ValueError, match=message):
        predict(finder, tmp_path / "b.png")
    assert len(predict(finder, tmp_path / "b.png", tiles=60)) == 1


def test_results_come_in_order_and_each_size_by_itself(finder, tmp_path, monkeypatch):
    """Unlike sizes never share a batch, in a folder with one that cannot be read."""
    sizes = [(64, 48), (50, 48), (64, 48), (50, 48), (64, 48), (70, 40)]
    for i, size in enumerate(sizes):
        picture(size=size).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes(b"no picture")
    seen, forward = [], type(finder.model).forward
    monkeypatch.setattr(
        type(finder.model),
        "forward",
        lambda model, batch: seen.append(tuple(batch.images.shape)) or forward(model, batch),
    )
    skipped = []
    found = list(predict_each(finder, tmp_path, batch_size=2, on_skip=skipped.append))
    assert [each.path.stem for each in found] == ["0", "1", "3", "4", "5"]
    assert [each.size for each in found] == [(h, w) for w, h in sizes[:2] + sizes[3:]]
    assert sorted(seen) == [(1, 3, 40, 70), (2, 3, 48, 50), (2, 3, 48, 64)]
    assert len(skipped) == 1
