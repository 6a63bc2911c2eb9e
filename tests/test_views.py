"""Several views of an image, and what they show merged."""

import numpy as np
import pytest
import torch

from deformable_detr import Detections
from deformable_detr.inference.predict import predict
from deformable_detr.inference.views import View, fuse, make_views, suppress
from tests.finder import make_finder, picture


@pytest.fixture(scope="module")
def finder():
    return make_finder()


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
    for wrong in ((), (1.0, 0.0), (float("inf"),), (float("nan"), 1.0), (1e9,), (-1.0,)):
        with pytest.raises(ValueError, match="scales must be one or more numbers above 0"):
            make_views("coco", wrong)
    with pytest.raises(ValueError, match=r"0\.01 of a short side of 800 pixels is below 32"):
        make_views("coco", (1, 0.01))


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
