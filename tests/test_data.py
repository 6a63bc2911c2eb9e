"""The digits in scenes: the same on every machine, and no piece of one split in another."""

import hashlib
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deformable_detr.data.checks import check_dataset

DATA = Path(__file__).parents[1] / "data"
SPLITS = ("train", "val", "test")
FIRST_30 = {  # of the pixels of each split's first 30 images and of their digits
    "train": "5a410a63fb7010db7aacfeaa9d6035d93b26aac75b18605f74c1ac5561d4e386",
    "val": "8ba4e0d0b08d47307dee22e9572bcf1822d4a3e592886bb5184e5ac03b3696c3",
    "test": "aea83435b39b6b6770344dcd3afd75a8214bea75e2fac3764af37561a1193b6f",
}


@pytest.fixture(scope="module")
def generator():
    return importlib.import_module("make_digits")  # data/ is on pytest's path


@pytest.mark.parametrize("split", SPLITS)
def test_the_first_images_are_the_same_everywhere(generator, split):
    made = [generator.make_image(i, split) for i in range(30)]
    hashes = [hashlib.sha256(pixels.tobytes()).hexdigest() for pixels, _ in made]
    content = generator.annotations(split, [digits for _, digits in made])
    assert generator.checksum(hashes, content) == FIRST_30[split]


@pytest.mark.parametrize("split", SPLITS)
def test_the_whole_set_is_what_was_pinned(generator, split):
    root = DATA / "digits"
    if not root.exists():
        pytest.skip("no data/digits: run `python data/make_digits.py`")
    content = json.loads((root / "annotations" / f"{split}.json").read_text())
    hashes = []
    for image in content["images"]:
        with Image.open(root / split / image["file_name"]) as picture:
            hashes.append(hashlib.sha256(np.asarray(picture).tobytes()).hexdigest())
    pinned = json.loads((DATA / "digits.sha256.json").read_text())
    assert generator.checksum(hashes, content) == pinned[split]


def test_no_glyph_and_no_piece_of_a_photograph_is_in_two_splits(generator):
    inks = {s: {image.tobytes() for image in generator.glyphs(s)[0]} for s in SPLITS}
    counts = [len(generator.glyphs(s)[0]) for s in SPLITS]
    assert sum(counts) == 1797 and min(counts) > 170
    strips = zip(*(generator.photographs(split) for split in SPLITS), strict=True)
    for name, pieces in zip(generator.PHOTOGRAPHS, strips, strict=True):
        wide = pieces[0].shape[0] == pieces[1].shape[0]  # cut along the width
        path = generator.photograph_path(name)
        with Image.open(path) as picture:  # side by side they are the photograph again
            assert np.array_equal(np.concatenate(pieces, int(wide)), picture.convert("RGB")), name
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        # two people may write the same 8 x 8 digit; it is rare
        assert len(inks[one] & inks[other]) <= 2
    for split in SPLITS:
        assert set(generator.glyphs(split)[1]) == set(range(10))


def test_boxes_are_tight_around_the_ink(generator, monkeypatch):
    """On a black scene without noise, a white digit's box is the extent of what is half white."""
    monkeypatch.setattr(generator, "choose_colour", lambda rng, under: np.full(3, 255))
    rng = np.random.Generator(np.random.PCG64(3))
    heights = []
    for _ in range(200):
        scene = np.zeros((128, 128, 3), np.int64)
        _, (x, y, w, h) = generator.draw_digit(rng, scene, "val", [])
        seen = scene[..., 0] >= 127
        rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
        assert (rows[0], rows[-1] + 1) == (y, y + h)
        assert (columns[0], columns[-1] + 1) == (x, x + w)
        heights.append(h)
    assert min(heights) >= 5 and max(heights) <= 72
    assert 0.4 < np.mean(np.array(heights) < 25) < 0.65  # log-uniform: half below the middle, 25


def test_scenes_have_one_to_eight_digits_that_hardly_overlap(generator):
    for index in range(40):
        _, digits = generator.make_image(index, "train")
        assert 1 <= len(digits) <= 8
        for i, (_, (x, y, w, h)) in enumerate(digits):
            assert x >= 0 and y >= 0 and x + w <= 128 and y + h <= 128
            for _, (a, b, c, d) in digits[:i]:
                width, height = min(x + w, a + c) - max(x, a), min(y + h, b + d) - max(y, b)
                assert max(width, 0) * max(height, 0) <= 0.1 * min(w * h, c * d)


def test_the_samples_are_the_first_of_the_test_split(generator):
    content = json.loads((DATA / "samples" / "annotations.json").read_text())
    assert len(content["images"]) == 24
    assert check_dataset(DATA / "samples", DATA / "samples" / "annotations.json") == []
    digits = []
    for i, image in enumerate(content["images"]):
        pixels, found = generator.make_image(i, "test")
        digits.append(found)
        with Image.open(DATA / "samples" / image["file_name"]) as picture:
            assert np.array_equal(np.asarray(picture), pixels)
    assert generator.annotations("test", digits) == content


@pytest.fixture
def command(generator, tmp_path, monkeypatch):
    """The command with three images a split, which writes to tmp_path / "digits"."""
    monkeypatch.setattr(generator, "SPLITS", dict.fromkeys(SPLITS, 3))
    monkeypatch.setattr(generator, "HERE", tmp_path)
    hashes, pinned = {}, tmp_path / "digits.sha256.json"
    for split in SPLITS:
        made = [generator.make_image(i, split) for i in range(3)]
        pixels = [hashlib.sha256(image.tobytes()).hexdigest() for image, _ in made]
        content = generator.annotations(split, [digits for _, digits in made])
        hashes[split] = generator.checksum(pixels, content)
    pinned.write_text(json.dumps(hashes))

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["make_digits.py", *options])
        return generator.main()

    return run


def test_the_command_makes_the_set_whatever_the_number_of_workers(command, tmp_path, capsys):
    made = tmp_path / "digits"
    assert command("--workers", "2") == 0
    for split in SPLITS:
        faults = check_dataset(made / split, made / "annotations" / f"{split}.json")
        assert {fault.kind for fault in faults} <= {"unused category"}  # three images are few
        assert len(list((made / split).glob("*.png"))) == 3
    first = {path: path.stat().st_mtime_ns for path in made.rglob("*.png")}
    assert command() == 0 and "is there already" in capsys.readouterr().out
    assert first == {path: path.stat().st_mtime_ns for path in made.rglob("*.png")}
    assert command("--workers", "1", "--force") == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["digits", "digits.sha256.json"]


def test_an_older_set_is_replaced_and_another_folder_never(command, tmp_path, capsys):
    old = tmp_path / "digits"
    old.mkdir()
    (old / "checksums.json").write_text('{"train": "of another version"}')
    assert command("--workers", "1") == 0
    assert (old / "test" / "000003.png").exists()
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("mine")
    for options in ([], ["--force"]):
        with pytest.raises(SystemExit):
            command("--output", str(precious), *options)
        assert "is not what this command makes" in capsys.readouterr().err
    assert [path.name for path in precious.iterdir()] == ["thesis.txt"]


def test_pixels_that_differ_from_the_pinned_ones_are_an_error(command, tmp_path, capsys):
    (tmp_path / "digits.sha256.json").write_text("{}")
    assert command("--workers", "1") == 1
    assert "error: expected checksums" in capsys.readouterr().err


def test_an_interrupted_run_leaves_nothing(command, generator, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(generator, "write_split", stop)
    with pytest.raises(KeyboardInterrupt):
        command()
    assert [path.name for path in tmp_path.iterdir()] == ["digits.sha256.json"]
