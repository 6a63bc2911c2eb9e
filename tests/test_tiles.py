"""Large images in pieces: places, what several pieces show of one object, memory."""

import pytest
import torch
from PIL import Image

from deformable_detr import Detections
from deformable_detr.cli import main
from deformable_detr.data.tiles import tile_places
from deformable_detr.inference.predict import predict
from deformable_detr.inference.tiles import detect_tiles, merge_tiles
from tests.finder import make_finder, picture


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("size", [(100, 40), (101, 200), (30, 20), (64, 64), (65, 1)])
def test_tiles_cover_an_image_and_overlap(size, overlap):
    width, height = size
    places = tile_places(width, height, 64, overlap)
    covered = torch.zeros(height, width, dtype=torch.int64)
    for x0, y0, x1, y1 in places:
        assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
        assert (x1 - x0, y1 - y0) == (min(64, width), min(64, height))
        covered[y0:y1, x0:x1] += 1
    assert covered.min() >= 1
    # an object as large as the overlap is whole in some tile, wherever it lies
    side = int(64 * overlap)
    for x in range(0, width - side, 7):
        for y in range(0, height - side, 7):
            corners = x, y, x + side, y + side
            assert any(
                t[0] <= corners[0]
                and t[1] <= corners[1]
                and corners[2] <= t[2]
                and corners[3] <= t[3]
                for t in places
            )


def test_how_many_tiles():
    assert tile_places(100, 64, 64, 0.0) == [(0, 0, 64, 64), (36, 0, 100, 64)]
    assert len(tile_places(8000, 6000, 800)) == 13 * 10
    for wrong in ((0, 0.1), (10, 1.0), (10, -0.1)):
        with pytest.raises(ValueError, match="tiles need a side"):
            tile_places(10, 10, *wrong)


def scene(size=(300, 200), boxes=((10, 20, 50, 60), (150, 30, 170, 44), (240, 150, 270, 180))):
    image = Image.new("RGB", size, (90, 90, 90))
    for i, box in enumerate(boxes):
        image.paste(tuple(255 * (i % 3 == c) for c in range(3)), box)
    return image, boxes


def test_objects_are_found_where_they_are_each_once():
    """Each tile shows one object at most, which is what the detector can find."""
    image, boxes = scene()
    (found,) = predict(make_finder(), image, tiles=100)
    assert sorted(found.boxes.round().tolist()) == sorted(map(list, boxes))
    assert sorted(found.names) == ["blue", "green", "red"]
    assert found.size == (200, 300)
    (whole,) = predict(make_finder(), picture(), tiles=100)
    assert whole.boxes[0].tolist() == pytest.approx([6, 10, 30, 22], abs=1e-4)


def detections(*rows):
    """Of (score, label, x0, y0, x1, y1)."""
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return Detections(table[:, 0], table[:, 1].long(), table[:, 2:], torch.arange(len(table)))


def test_a_whole_object_stays_and_not_its_part_in_another_tile():
    """Even where the part has the higher score; objects within one tile all stay."""
    whole = detections((0.6, 0, 10, 0, 50, 40), (0.3, 0, 12, 2, 48, 38))
    part = detections((0.9, 0, 10, 0, 30, 40), (0.5, 1, 10, 0, 30, 40))
    cut = [torch.tensor([False, False]), torch.tensor([True, True])]
    merged = merge_tiles([whole, part], cut)
    assert merged.scores.tolist() == pytest.approx([0.6, 0.5, 0.3])
    assert merged.labels.tolist() == [0, 1, 0]
    assert len(merge_tiles([detections(), detections()], [torch.zeros(0).bool()] * 2)) == 0


def test_an_object_larger_than_a_tile_is_found_in_the_whole_image():
    asked = []

    def look(images):
        asked.extend(image.size for image in images)
        whole = [detections((0.5, 0, 10, 10, 250, 190)) for _ in images]
        return [
            each if image.size == (300, 200) else detections((0.9, 0, 0, 0, *image.size))
            for each, image in zip(whole, images, strict=True)
        ]

    found = detect_tiles(look, Image.new("RGB", (300, 200)), 100, batch_size=4, whole=True)
    assert asked.count((300, 200)) == 1 and asked.count((100, 100)) == 12
    assert [10, 10, 250, 190] in found.boxes.tolist()
    middle = [box for box in found.boxes.tolist() if box[0] > 10 and box[2] < 250 and box[1] > 10]
    assert not [box for box in middle if box[3] < 190]  # parts of it are gone


def test_no_more_than_a_batch_of_tiles_at_once():
    most = []
    detect_tiles(
        lambda images: most.append(len(images)) or [detections()] * len(images),
        Image.new("RGB", (1000, 900)),
        100,
        batch_size=3,
    )
    assert max(most) == 3 and sum(most) == len(tile_places(1000, 900, 100))


def test_on_the_command_line(tmp_path, capsys):
    from deformable_detr import DeformableDETR
    from deformable_detr.weights.ours import save_model
    from tests.conftest import TINY
    from tests.finder import CATEGORIES

    save_model(DeformableDETR(TINY), tmp_path / "m.safetensors", CATEGORIES, {"threshold": 0.0})
    scene()[0].save(tmp_path / "a.png")
    arguments = ["--model", str(tmp_path / "m.safetensors"), "--output", str(tmp_path / "found")]
    assert main(["predict", str(tmp_path / "a.png"), *arguments, "--tiles", "100"]) == 0
    count = int(capsys.readouterr().out.split(" found")[0].split()[-1])
    assert count > 18  # which is as much as one look gives
    again = [*arguments, "--tiles", "100", "--top-k", "5"]
    assert main(["predict", str(tmp_path / "a.png"), *again]) == 0
    assert ": 5 found: " in capsys.readouterr().out  # of the image, not of each tile
