"""A class for every pixel: the digits' ink as the generator writes it, and how masks are read."""

import hashlib
import importlib
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from deformable_detr.data.masks import NO_CLASS, MaskDataset, read_mask
from deformable_detr.data.transforms import TO_TENSOR

SPLITS = ("train", "val", "test")
FIRST_10 = {  # of the masks of each split's first ten images
    "train": "af51a73ff8d3c409e2f8ca72101edf0610818df6c98c34a00e1cae785780988a",
    "val": "810398d1019aca5f77b684c6d486149ab9cc501e995337f6fb23730ca0109e07",
    "test": "fb92fea830cf9498c184fa6c606af78de7a28a8e815c084150176454be916e3d",
}


@pytest.fixture(scope="module")
def generator():
    return importlib.import_module("make_digits")  # data/ is on pytest's path


# The generator


@pytest.mark.parametrize("split", SPLITS)
def test_the_first_masks_are_the_same_everywhere(generator, split):
    masks = [generator.make_mask(i, split) for i in range(10)]
    assert hashlib.sha256(np.stack(masks).tobytes()).hexdigest() == FIRST_10[split]


def test_an_image_is_the_same_with_its_mask(generator):
    pixels, digits = generator.make_image(3, "val")
    again, same = generator.make_image(3, "val", np.zeros((128, 128), np.uint8))
    assert np.array_equal(pixels, again) and digits == same


def test_masks_are_the_ink_of_the_boxes(generator):
    """A digit's ink reaches every side of its box, but where a later digit lies over it; outside of
    all boxes there is none."""
    reached = sides = 0
    for index in range(20):
        mask = generator.make_mask(index, "train")
        _, digits = generator.make_image(index, "train")
        outside = np.ones_like(mask, bool)
        for label, (x, y, w, h) in digits:
            own = mask[y : y + h, x : x + w] == label + 1
            reached += sum(side.any() for side in (own[0], own[-1], own[:, 0], own[:, -1]))
            sides += 4
            outside[y : y + h, x : x + w] = False
        assert not mask[outside].any()
        assert set(np.unique(mask)) == {0} | {label + 1 for label, _ in digits}
    assert sides > 300 and reached > 0.98 * sides


def test_ink_is_what_is_half_opaque(generator, monkeypatch):
    """On a black scene without noise, a white digit's mask is what is half white."""
    monkeypatch.setattr(generator, "choose_colour", lambda rng, under: np.full(3, 255))
    rng = np.random.Generator(np.random.PCG64(3))
    for _ in range(20):
        scene, classes = np.zeros((128, 128, 3), np.int64), np.zeros((128, 128), np.uint8)
        label, _ = generator.draw_digit(rng, scene, "val", [], classes)
        assert np.array_equal(classes == label + 1, scene[..., 0] >= 127)


@pytest.fixture
def command(generator, tmp_path, monkeypatch):
    """The command with two images a split, which writes to tmp_path / "digits"."""
    monkeypatch.setattr(generator, "SPLITS", dict.fromkeys(SPLITS, 2))
    monkeypatch.setattr(generator, "HERE", tmp_path)

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["make_digits.py", "--workers", "1", *options])
        return generator.main()

    (tmp_path / "digits.sha256.json").write_text("{}")
    assert run() == 1
    (tmp_path / "digits.sha256.json").write_text(
        (tmp_path / "digits" / "checksums.json").read_text()
    )
    return run


def test_the_command_adds_masks_to_what_is_there(command, generator, tmp_path, capsys):
    made = tmp_path / "digits"
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*.*")}
    assert not (made / "masks").exists()
    assert command("--masks") == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}
    added = [path for path in made.rglob("*.*") if path not in before]
    assert len(added) == 6 and {path.parent.parent for path in added} == {made / "masks"}
    data = MaskDataset(made / "train", made / "masks" / "train", 11)
    image, mask = data[1]
    assert len(data) == 2 and image.shape == (3, 128, 128)
    assert np.array_equal(mask.numpy(), generator.make_mask(1, "train"))
    capsys.readouterr()
    assert command("--masks") == 0
    assert f"{made / 'masks'} is there already" in capsys.readouterr().out


def test_an_interrupted_run_leaves_no_half_of_the_masks(command, generator, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(generator, "partial", stop)
    with pytest.raises(KeyboardInterrupt):
        command("--masks")
    assert not [path for path in (tmp_path / "digits").iterdir() if "masks" in path.name]


def test_samples_have_no_masks(command, capsys):
    with pytest.raises(SystemExit):
        command("--samples", "--masks")
    assert "not allowed with argument" in capsys.readouterr().err


# Reading


@pytest.fixture
def pair(tmp_path):
    """One picture of 5 x 3 pixels and its mask."""
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    pixels = np.arange(45, dtype=np.uint8).reshape(3, 5, 3)
    Image.fromarray(pixels).save(tmp_path / "images" / "a.png")
    classes = np.array([[0, 1, 2, 0, NO_CLASS], [0, 0, 0, 0, 1], [2, 2, 2, 2, 2]], np.uint8)
    Image.fromarray(classes).save(tmp_path / "masks" / "a.png")
    return tmp_path / "images", tmp_path / "masks", classes


def test_a_sample(pair):
    images, masks, classes = pair
    image, mask = MaskDataset(images, masks, 3)[0]
    assert image.dtype == torch.float32 and mask.dtype == torch.int64
    assert image.shape == (3, 3, 5) and mask.tolist() == classes.tolist()
    logits = torch.zeros(1, 3, 3, 5)
    loss = torch.nn.functional.cross_entropy(logits, mask[None], ignore_index=NO_CLASS)
    assert loss.item() == pytest.approx(np.log(3))


def test_transforms_see_both(pair):
    """Classes are not made between two classes when a mask is resized."""
    images, masks, classes = pair
    transform = v2.Compose([v2.RandomHorizontalFlip(1.0), v2.Resize((9, 15)), TO_TENSOR])
    image, mask = MaskDataset(images, masks, 3, transform)[0]
    assert image.shape == (3, 9, 15)
    assert np.array_equal(mask.numpy(), classes[:, ::-1].repeat(3, 0).repeat(3, 1))


def test_masks_with_a_palette(pair):
    """As Pascal VOC has them: what counts is the number, not its colour."""
    _, masks, classes = pair
    mask = Image.fromarray(classes).convert("P")
    mask.putpalette(list(range(255, -1, -1)) * 3)
    mask.save(masks / "a.png")
    with Image.open(masks / "a.png") as saved:
        assert saved.mode == "P"
    assert np.array_equal(read_mask(masks / "a.png", (5, 3), 3), classes)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((5, 3), np.uint8), "must be of its picture's size, 5 x 3, got 3 x 5"),
        (np.zeros((3, 5, 3), np.uint8), "must have 8 bits a pixel, its class, got the mode RGB"),
        (np.zeros((3, 5), np.uint16), "must have 8 bits a pixel, its class, got the mode I;16"),
        (
            np.full((3, 5), 3, np.uint8),
            "has class 3 in row 0 and column 0, expected 0 to 2, or",
        ),
        (np.eye(3, 5, 4, np.uint8) * 9, "has class 9 in row 0 and column 4, expected 0 to 2"),
    ],
)
def test_wrong_masks(pair, mask, message):
    images, masks, _ = pair
    Image.fromarray(mask).save(masks / "a.png")
    with pytest.raises(ValueError, match=message) as error:
        MaskDataset(images, masks, 3)[0]
    assert "\n" not in str(error.value) and str(masks / "a.png") in str(error.value)


@pytest.mark.parametrize("content", [b"", b"no picture", "half"])
def test_what_is_no_mask(pair, content):
    images, masks, _ = pair
    path = masks / "a.png"
    path.write_bytes(path.read_bytes()[:45] if content == "half" else content)
    with pytest.raises(ValueError, match="cannot read mask") as error:
        MaskDataset(images, masks, 3)[0]
    assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda i, m: (m / "a.png").rename(m / "b.png"), FileNotFoundError, "a.png has no mask in"),
        (
            lambda i, m: (m / "b.png").write_bytes(b""),
            FileNotFoundError,
            "b.png has no picture in",
        ),
        (lambda i, m: (i / "a.png").unlink(), FileNotFoundError, "no pictures in .*images"),
        (
            lambda i, m: (i / "a.jpg").write_bytes(b""),
            ValueError,
            "2 pictures in .*images are called a, expected one",
        ),
    ],
)
def test_pictures_and_masks_come_in_pairs(pair, change, kind, message):
    images, masks, _ = pair
    change(images, masks)
    with pytest.raises(kind, match=message) as error:
        MaskDataset(images, masks, 3)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("count", [0, 256])
def test_number_of_classes(pair, count):
    with pytest.raises(ValueError, match=f"num_classes must be from 1 to 255, got {count}"):
        MaskDataset(*pair[:2], count)
