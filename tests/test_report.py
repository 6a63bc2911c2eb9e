"""Reports of hand-made detections, where every number is known by hand.

The data set has five objects of 20 x 16 pixels, alone in their images: red, green, blue, red,
green, with ids 1000 to 1004; the sixth image is empty.
"""

import json
import math
import random
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest

from deformable_detr import DeformableDETR
from deformable_detr.data.coco import CocoDataset, find_split
from deformable_detr.evaluation.coco import score
from deformable_detr.evaluation.mistakes import KINDS, judge, judge_all
from deformable_detr.evaluation.report import analyse, analyse_results, choose_threshold
from deformable_detr.evaluation.report_page import write_html
from tests.conftest import TINY, save_annotations

OTHER = {3: 7, 7: 20, 20: 3}  # red for green, green for blue, blue for red


@pytest.fixture
def dataset(coco):
    return CocoDataset(*find_split(coco, "train"))


def truth(dataset, dx=0.0, swap=False, score=0.9):
    return [
        {
            "image_id": a["image_id"],
            "category_id": OTHER[a["category_id"]] if swap else a["category_id"],
            "bbox": [a["bbox"][0] + dx, *a["bbox"][1:]],
            "score": score,
        }
        for a in dataset.coco.dataset["annotations"]
    ]


def kinds(report):
    return {kind: count for kind, count in report.errors.counts.items() if count}


def gains(report):
    return {kind: gain for kind, gain in report.errors.gains.items() if abs(gain) > 1e-9}


def annotations_of(coco):
    return json.loads((coco / "annotations" / "train.json").read_text())


def test_a_perfect_detector(dataset):
    report = analyse_results(truth(dataset), dataset)
    assert report.metrics.ap == 1
    assert kinds(report) == {"correct": 5} and gains(report) == {}
    assert report.errors.precision == report.errors.recall == 1 and report.errors.objects == 5
    assert report.confusion.names == ["red", "green", "blue", "background"]
    assert report.confusion.counts.tolist() == np.diag([2, 2, 1, 0]).tolist()
    assert report.worst == [] and report.confusion.most() == []
    for curve in report.curves:
        assert curve.ap50 == pytest.approx(1) and len(curve.precision) == 101
        assert set(curve.scores) == {0.9}


def test_everything_shifted_is_an_error_of_place(dataset):
    """By 10 of 20 pixels: IoU 10/30."""
    report = analyse_results(truth(dataset, dx=10), dataset)
    assert kinds(report) == {"place": 5} and report.metrics.ap50 == 0
    assert gains(report) == {"place": pytest.approx(1)}
    assert report.errors.precision == report.errors.recall == 0
    # neither object nor detection has a partner
    assert report.confusion.counts.tolist() == [
        [0, 0, 0, 2],
        [0, 0, 0, 2],
        [0, 0, 0, 1],
        [2, 2, 1, 0],
    ]
    assert [image.errors() for image in report.worst] == [1] * 5
    (judged,) = report.worst[0].judged
    assert judged.object_id == 1000 and judged.truth == judged.label == 0


def test_a_small_shift_is_none(dataset):
    """By 4 of 20 pixels: IoU 16/24, found at 0.5 but not at 0.75."""
    report = analyse_results(truth(dataset, dx=4), dataset)
    assert kinds(report) == {"correct": 5} and report.metrics.ap75 == 0


def test_wrong_classes(dataset):
    report = analyse_results(truth(dataset, swap=True), dataset)
    assert kinds(report) == {"class": 5}
    assert gains(report) == {"class": pytest.approx(1)}
    assert report.confusion.counts.tolist() == [[0, 2, 0, 0], [0, 0, 2, 0], [1, 0, 0, 0], [0] * 4]
    assert report.confusion.most(2) == [("red", "green", 2), ("green", "blue", 2)]
    assert "2  red, green" in report.table()


def test_another_class_near_an_object_is_both_and_the_object_missed(dataset):
    report = analyse_results(truth(dataset, dx=10, swap=True), dataset)
    assert kinds(report) == {"both": 5, "missed": 5}


def test_duplicates(dataset):
    """Better ones first, and once more below: two of three detections too many."""
    more = truth(dataset, dx=1, score=0.8) + truth(dataset, dx=2, score=0.7)
    report = analyse_results(more + truth(dataset), dataset)
    assert kinds(report) == {"correct": 5, "duplicate": 10}
    assert report.errors.precision == pytest.approx(1 / 3) and report.errors.recall == 1
    assert gains(report) == {}  # they come after all objects are found
    assert report.confusion.counts[-1].tolist() == [4, 4, 2, 0]  # no object is left for them
    assert [each.score for each in report.worst[0].judged] == [0.9, 0.8, 0.7]


def test_background_counts_against_what_follows(dataset):
    """One red detection of nothing above two of red: precision 1/2, 2/3 and so 2/3 throughout."""
    empty = dataset.image_ids[-1]
    nothing = {"image_id": empty, "category_id": 3, "bbox": [0, 0, 9, 9], "score": 0.95}
    report = analyse_results([*truth(dataset), nothing], dataset)
    assert kinds(report) == {"correct": 5, "background": 1}
    assert report.curves[0].ap50 == pytest.approx(2 / 3)
    assert report.metrics.ap50 == pytest.approx((2 / 3 + 1 + 1) / 3)
    assert gains(report) == {"background": pytest.approx(1 / 9)}
    assert report.confusion.counts[-1].tolist() == [1, 0, 0, 0]
    assert [image.image_id for image in report.worst] == [empty]


def test_missed_objects(dataset):
    """Red and green have two objects each; the first of either is missed."""
    report = analyse_results(truth(dataset)[2:], dataset)
    assert kinds(report) == {"correct": 3, "missed": 2}
    assert report.errors.recall == pytest.approx(3 / 5)
    ap50 = (2 * 51 / 101 + 1) / 3  # a recall of 0.5 is reached by 51 of 101
    assert report.metrics.ap50 == pytest.approx(ap50)
    assert gains(report) == {"missed": pytest.approx(1 - ap50)}
    assert report.confusion.counts[:, -1].tolist() == [1, 1, 0, 0]
    assert report.curves[0].scores[49:52] == [0.9, 0.9, 0]


def test_an_object_that_an_error_means_is_not_missed_as_well(dataset):
    first, *_ = truth(dataset, dx=10)
    report = analyse_results([first, *truth(dataset)[1:]], dataset)
    assert kinds(report) == {"correct": 4, "place": 1}


def test_an_error_whose_object_is_found_gains_only_by_going(dataset):
    """A better but misplaced detection of each object that is found as well."""
    report = analyse_results(truth(dataset) + truth(dataset, dx=10, score=0.95), dataset)
    assert kinds(report) == {"correct": 5, "place": 5}
    assert report.metrics.ap50 == pytest.approx(1 / 2)
    assert gains(report) == {"place": pytest.approx(1 / 2)}


def test_the_threshold_decides_what_counts(dataset):
    results = truth(dataset)[:2] + truth(dataset, score=0.3)[2:]
    report = analyse_results(results, dataset)
    assert kinds(report) == {"correct": 2, "missed": 3}
    assert report.metrics.ap50 == 1 and gains(report) == {}  # these are over all scores
    assert kinds(analyse_results(results, dataset, threshold=0.3)) == {"correct": 5}
    chosen = analyse_results(results, dataset, threshold=None)
    assert kinds(chosen) == {"correct": 5} and chosen.threshold == pytest.approx(0.15)


def test_a_detection_on_a_crowd_does_not_count(coco):
    content = annotations_of(coco)
    crowd = {"id": 1, "image_id": 105, "category_id": 3, "bbox": [0, 0, 40, 40], "area": 1600}
    content["annotations"].append(crowd | {"iscrowd": 1})
    save_annotations(coco, content)
    dataset = CocoDataset(*find_split(coco, "train"))
    inside = {"image_id": 105, "category_id": 3, "bbox": [5, 5, 10, 10], "score": 0.99}
    report = analyse_results([*truth(dataset)[:5], inside], dataset)
    assert kinds(report) == {"correct": 5} and report.errors.objects == 5
    assert report.metrics.ap50 == 1
    other = analyse_results([*truth(dataset)[:5], inside | {"category_id": 7}], dataset)
    assert kinds(other) == {"correct": 5, "background": 1}


def test_two_objects_take_the_nearest_detection_each():
    def box(x, category=1, **more):
        return {"id": x, "category_id": category, "bbox": [x, 0, 10, 10], "iscrowd": 0} | more

    objects = [box(0), box(6), box(100, 2)]
    detections = [box(5, score=0.9), box(1, score=0.8), box(2, score=0.7), box(101, score=0.6)]
    found = judge(detections, objects, {1: 0, 2: 1})
    assert [(each.kind, each.object_id) for each in found] == [
        ("correct", 6),  # IoU 9/11, with the other 5/15
        ("correct", 0),
        ("duplicate", 0),
        ("class", 100),
    ]


def test_ap50_agrees_with_pycocotools_on_random_detections(dataset):
    """The gains start from our own AP50; both kinds of sums must be one number."""
    from deformable_detr.evaluation.mistakes import _ap50, _corrected, count_objects

    rng = random.Random(0)
    results = [
        detection
        | {"bbox": [value + rng.gauss(0, 3) for value in detection["bbox"][:2]] + [20, 16]}
        for _ in range(8)
        for detection in truth(dataset, swap=rng.random() < 0.3, score=rng.random())
    ]
    judged = [each for image in judge_all(results, dataset) for each in image.judged]
    ours = _ap50(_corrected(judged, ""), count_objects(dataset), Counter())
    assert 0.1 < ours < 0.99
    assert ours == pytest.approx(score(results, dataset).ap50)
    report = analyse_results(results, dataset)
    assert set(report.errors.gains) == set(KINDS)
    assert all(0 <= gain <= 1 - ours for gain in report.errors.gains.values())


def test_the_threshold_with_the_best_f1(dataset):
    """Five correct at 0.9, 0.8 ... 0.5 and four of nothing at 0.65, 0.55, 0.2, 0.1."""
    empty = dataset.image_ids[-1]
    results = [r | {"score": 0.9 - i / 10} for i, r in enumerate(truth(dataset))]
    results += [
        {"image_id": empty, "category_id": 3, "bbox": [0, 0, 9, 9], "score": s}
        for s in (0.65, 0.55, 0.2, 0.1)
    ]
    # F1 = 2 TP / (detections + objects): 3 of 3 is 6/8, 4 of 5 8/10, 5 of 7 10/12
    assert choose_threshold(results, dataset) == pytest.approx((0.5 + 0.2) / 2)
    # without the last object's detection, 3 of 3 gives 6/8 and 4 of 5 8/10
    assert choose_threshold(results[:4] + results[5:], dataset) == pytest.approx((0.6 + 0.55) / 2)


def test_a_threshold_does_not_part_equal_scores(dataset):
    """Each of nine detections of nothing as sure as the five correct ones."""
    empty = dataset.image_ids[-1]
    nothing = {"image_id": empty, "category_id": 3, "bbox": [0, 0, 9, 9], "score": 0.8}
    results = truth(dataset, score=0.8)[:4] + [truth(dataset)[4]] + [nothing] * 9
    assert choose_threshold(results, dataset) == pytest.approx(0.4)  # 10/19 beats 2/6


def test_no_detections(dataset):
    report = analyse_results([], dataset, threshold=None)
    assert report.threshold == choose_threshold([], dataset) == 0.5
    assert kinds(report) == {"missed": 5} and gains(report) == {"missed": 1}
    assert math.isnan(report.errors.precision) and report.errors.recall == 0
    assert report.to_dict()["errors"]["precision"] is None
    assert "n/a" in report.table()


def test_nothing_correct_leaves_the_middle(dataset):
    assert choose_threshold(truth(dataset, dx=10), dataset) == 0.5


@pytest.mark.parametrize("gone", [("images",), (), ("images", "categories")], ids=str)
def test_data_without_images_objects_or_classes(coco, tmp_path, gone):
    content = annotations_of(coco) | {"annotations": []} | {kind: [] for kind in gone}
    save_annotations(coco, content)
    dataset = CocoDataset(*find_split(coco, "train"))
    report = analyse_results([], dataset, threshold=None)
    assert report.errors.objects == 0 and kinds(report) == {}
    assert all(math.isnan(gain) for gain in report.errors.gains.values())
    assert math.isnan(report.metrics.ap) and math.isnan(report.errors.recall)
    assert all(curve.precision == [] and math.isnan(curve.ap50) for curve in report.curves)
    report.write_json(tmp_path / "report.json")
    write_html(report, tmp_path / "report.html")
    assert "No image has an error." in (tmp_path / "report.html").read_text()


def test_a_class_without_objects_is_left_out_of_the_mean(dataset):
    annotations = dataset.coco.dataset["annotations"]
    for annotation in [a for a in annotations if a["category_id"] == 20]:
        annotations.remove(annotation)
        dataset.coco.imgToAnns[annotation["image_id"]].remove(annotation)
        del dataset.coco.anns[annotation["id"]]
    dataset.coco.createIndex()
    report = analyse_results(truth(dataset)[1:], dataset)
    assert report.curves[2].precision == [] and len(report.curves[0].precision) == 101
    assert report.to_dict()["curves"][2]["ap50"] is None
    assert sum(report.errors.gains.values()) == pytest.approx(1 - report.metrics.ap50)


class Page(HTMLParser):
    """What a page refers to, and what it says in place of its pictures."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.alternatives = Counter(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags[tag] += 1
        self.sources += [attributes[k] for k in ("src", "href") if k in attributes]
        if tag == "img":
            self.alternatives.append(attributes["alt"])
        if tag == "svg":
            self.alternatives.append(attributes["aria-label"])


def test_the_page_stands_alone_and_says_what_it_shows(dataset, tmp_path):
    dataset.categories[0]["name"] = "<red> & 'co'"
    report = analyse_results(truth(dataset, swap=True), dataset)
    write_html(report, tmp_path / "deep" / "report.html")
    text = (tmp_path / "deep" / "report.html").read_text("utf-8")
    page = Page(text)
    assert page.tags["img"] == 5 and page.tags["svg"] == 3
    assert page.tags["script"] == page.tags["link"] == 0 and "url(" not in text
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    assert "http" not in text.replace("http-equiv", "")
    assert "prefers-color-scheme: dark" in text
    assert "<red>" not in text
    assert "class: green for <red> & 'co' 0.90" in page.alternatives
    assert "Precision over recall of blue: precision 0.00, 0.00, 0.00 at recall 0, 0.5, 1" in (
        page.alternatives
    )


def test_a_report_is_not_lost_for_half_a_letter(dataset, tmp_path):
    """A lone surrogate, of which UTF-8 has none: in a name, and in what a report is of."""
    dataset.categories[0]["name"] = "red \ud800"
    report = analyse_results(truth(dataset, swap=True), dataset, about={"data": "blood \udcff"})
    write_html(report, tmp_path / "report.html")
    report.write_json(tmp_path / "report.json")
    text = (tmp_path / "report.html").read_text("utf-8")
    assert "red \\ud800" in text and "<dd>blood \\udcff</dd>" in text
    assert json.loads((tmp_path / "report.json").read_text())["confusion"]["names"][0][:3] == "red"
    assert "red" in report.table()


@pytest.mark.parametrize("width", [320, 400, 1200])
def test_the_page_fits_the_window(dataset, tmp_path, width, chromium):
    """Of a telephone too, with long names; only the table of confusions scrolls by itself."""
    dataset.categories[0]["name"] = "erythrocyte_" * 8
    about = {"model": "/models/" + "a_long_folder/" * 9 + "best.safetensors"}
    report = analyse_results(truth(dataset, swap=True), dataset, about=about)
    report.remarks.append("12 images have up to 412 objects: " + "unbroken" * 20)
    write_html(report, tmp_path / "report.html")
    page = chromium.new_page(viewport={"width": width, "height": 800})
    page.goto((tmp_path / "report.html").as_uri())
    needed = page.evaluate("document.documentElement.scrollWidth")
    page.close()
    assert needed <= width


def test_categories_may_have_names_for_ids(coco):
    path = coco / "annotations" / "train.json"
    content = json.loads(path.read_text())
    for entry in content["categories"]:
        entry["id"] = f"c{entry['id']}"
    for annotation in content["annotations"]:
        annotation["category_id"] = f"c{annotation['category_id']}"
    save_annotations(coco, content)
    dataset = CocoDataset(*find_split(coco, "train"))
    report = analyse_results(truth(dataset), dataset)
    assert report.metrics.ap == 1 and report.errors.counts["correct"] == 5


def test_json_and_table(dataset, tmp_path):
    report = analyse_results(truth(dataset)[1:] + truth(dataset, dx=10)[:1], dataset)
    report.write_json(tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["metrics"]["ap50"] == report.metrics.ap50
    assert content["errors"]["counts"] == report.errors.counts
    assert content["worst"][0]["judged"][0]["kind"] == "place"
    assert content["confusion"]["names"][-1] == "background"
    lines = [" ".join(line.split()) for line in report.table().splitlines()]
    # red has a precision of 1/2 up to a recall of 1/2: (1 - 51/101/2) / 3 = 0.249 is to be won
    assert "precision 0.800" in lines and "correct 4" in lines
    assert any(line.startswith("place 1 +0.249") for line in lines)
    assert lines[-1] == "100 100.png: 1 place"
    # which figures know of the threshold
    assert lines[0] == "over all scores, on 6 images" and lines[1].startswith("AP ")
    threshold = lines.index("at the threshold: scores from 0.500 on, and IoU 0.5")
    assert lines[threshold + 1] == "precision 0.800"
    assert "detections count AP50 if mended, over all scores" in lines


def test_what_cannot_be_written_says_so_and_leaves_what_was_there(dataset, tmp_path, monkeypatch):
    report = analyse_results(truth(dataset), dataset)
    path = tmp_path / "report.html"
    path.write_text("before")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match=r"cannot write .*report\.html: disk full"):
        write_html(report, path)
    assert path.read_text() == "before" and [p.name for p in tmp_path.glob(".report*")] == []


def test_a_model_is_run_once_and_stays_as_it_was(dataset, monkeypatch):
    model = DeformableDETR(TINY)
    runs = []
    model.register_forward_hook(lambda *_: runs.append(1))
    report = analyse(model, dataset, batch_size=3, threshold=None, progress=False)
    assert len(runs) == 2 and model.training
    assert report.metrics.images == 6 and 0 <= report.threshold <= 1
    assert sum(report.errors.counts.values()) >= 5
    assert report.confusion.counts[:-1].sum() == 5  # each object stands in one place


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan")])
def test_a_threshold_out_of_range_is_refused(dataset, threshold):
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\], or None"):
        analyse(DeformableDETR(TINY), dataset, threshold=threshold)


def test_detections_on_unknown_images_are_refused(dataset):
    with pytest.raises(ValueError, match="image 7, which the data set lacks"):
        analyse_results([truth(dataset)[0] | {"image_id": 7}], dataset)


def test_another_number_of_classes_is_refused(dataset):
    dataset.categories.pop()
    with pytest.raises(ValueError, match="3 classes, the data has 2"):
        analyse(DeformableDETR(TINY), dataset, progress=False)
