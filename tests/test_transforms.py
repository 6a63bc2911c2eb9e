"""Transforms with boxes: pixels, sizes, and what the official code rounds."""

import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from deformable_detr.data import transforms
from deformable_detr.data.preparation import PREPARATIONS


@pytest.mark.parametrize("name", ["digits_train_transform", "coco_train_transform"])
def test_boxes_follow_the_pixels(tmp_path, name):
    """A single red square: after any transform its box is where the bright pixels are."""
    image = Image.new("RGB", (160, 120))
    image.paste((255, 255, 255), (40, 30, 90, 80))
    transform = getattr(transforms, name)()
    box = tv_tensors.BoundingBoxes([[40.0, 30, 90, 80]], format="XYXY", canvas_size=(120, 160))
    seen = 0
    for seed in range(25):
        torch.manual_seed(seed)
        picture, boxes, _ = transform(image, box, torch.tensor([0]))
        level = picture.as_subclass(torch.Tensor).mean(0)
        # inverted pictures have the square dark; a corner tells, unless the square fills it
        x0, y0, x1, y1 = boxes[0].tolist()
        if (x1 - x0) * (y1 - y0) == 0:
            continue
        h, w = level.shape
        inside = torch.zeros(h, w, dtype=torch.bool)
        inside[round(y0) : round(y1), round(x0) : round(x1)] = True
        if inside.all():
            continue
        seen += 1
        middle = level[int((y0 + y1) / 2), int((x0 + x1) / 2)]
        like_middle = (level - middle).abs() < 0.3
        # zooming out leaves black around the picture, as its ground is
        wrong = (like_middle != inside).float().mean()
        assert wrong < 0.03, (seed, boxes, wrong)
    assert seen > 10


def test_digits_keep_their_size_and_coco_obeys_1333():
    image = Image.new("RGB", (500, 200))
    box = tv_tensors.BoundingBoxes([[0.0, 0, 9, 9]], format="XYXY", canvas_size=(200, 500))
    for seed in range(8):
        torch.manual_seed(seed)
        picture, _, _ = transforms.digits_train_transform()(image, box, torch.tensor([0]))
        assert picture.shape == (3, 200, 500)
        picture, _, _ = transforms.coco_train_transform()(image, box, torch.tensor([0]))
        assert max(picture.shape) <= 1333
    picture = transforms.coco_eval_transform()(image)
    assert picture.shape == (3, 533, 1332)


def test_a_smaller_short_side_makes_all_of_cocos_sizes_smaller():
    image = Image.new("RGB", (640, 480))
    box = tv_tensors.BoundingBoxes([[0.0, 0, 9, 9]], format="XYXY", canvas_size=(480, 640))
    shorts = set()
    for seed in range(40):
        torch.manual_seed(seed)
        picture, _, _ = PREPARATIONS["coco"].train_transform(400)(image, box, torch.tensor([0]))
        shorts.add(min(picture.shape[1:]))
        assert max(picture.shape) <= 667
    assert shorts <= {*range(240, 401, 16)} and len(shorts) > 8
    assert PREPARATIONS["strong"].eval_transform(400)(image).shape == (3, 400, 533)
    assert PREPARATIONS["digits"].eval_transform(400)(image).shape == (3, 480, 640)


@pytest.mark.parametrize(
    ("size", "short", "longest", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1066)),  # 1066.7, cut off
        ((640, 427), 800, 1333, (1199, 800)),  # upright
        ((480, 480), 800, None, (800, 800)),
        ((400, 600), 400, None, (400, 600)),  # as it is
        ((200, 500), 800, 1333, (533, 1332)),  # the longer side decides: 533.2, 533 * 500 / 200
        ((1, 3000), 800, 1333, (1, 1333)),  # a side is a pixel at least, the other as it should be
        ((30, 1300), 600, None, (600, 16384)),  # unlike there: a crop comes next, of 600 at most
        ((333, 500), 512, 1333, (512, 768)),
    ],
)
def test_sides_are_rounded_as_in_the_official_code(size, short, longest, expected):
    transform = transforms.RandomShortSide([short], longest)
    box = tv_tensors.BoundingBoxes([[0, 0, size[1], size[0]]], format="XYXY", canvas_size=size)
    picture, box = transform(Image.new("RGB", size[::-1]), box)
    assert picture.size == expected[::-1]
    assert box.tolist() == [[0, 0, expected[1], expected[0]]]


def test_the_shorter_side_is_never_a_pixel_short():
    for height in range(300, 641):
        for side in range(480, 801, 32):
            if 640 * side <= 1333 * height:
                transform = transforms.RandomShortSide([side], 1333)
                assert transform.make_params([torch.empty(3, height, 640)])["size"][0] == side
