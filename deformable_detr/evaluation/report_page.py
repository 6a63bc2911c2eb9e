"""A report as one HTML page: no scripts, no other files, for light and dark screens.
Chapter your_own_data."""

import base64
from collections.abc import Iterable
from html import escape
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageDraw

from deformable_detr.data.names import counted
from deformable_detr.evaluation.mistakes import FOUND, KINDS, ImageReport, Judged
from deformable_detr.evaluation.report import MEASURES, OVER_ALL, Confusion, Curve, Report, figure
from deformable_detr.files import write_atomically
from deformable_detr.look.document import document
from deformable_detr.look.pictures import draw_boxes

COLOURS = {  # Okabe and Ito's, which colour-blind readers tell apart
    "correct": "#009E73",
    "class": "#E69F00",
    "place": "#56B4E9",
    "both": "#F0E442",
    "duplicate": "#CC79A7",
    "background": "#D55E00",
    "missed": "#0072B2",
}
SIDES = (384, 800)  # pictures are enlarged to the first, shrunk to the second, in pixels
STYLE = """
:root { color-scheme: light dark; --text: #1b1b1b; --back: #ffffff; --line: #8a8a8a;
  --curve: #0072b2; --shade: 0 114 178; }
@media (prefers-color-scheme: dark) { :root { --text: #e8e8e8; --back: #161616; --line: #9a9a9a;
  --curve: #56b4e9; --shade: 86 180 233; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back);
  max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: .8rem 0; }
dl { display: grid; grid-template-columns: auto 1fr; gap: .1rem 1rem; }
dt { font-weight: bold; }
dd { margin: 0; }
h1, dd, p, figcaption, th[scope=row] { overflow-wrap: anywhere; }
.wide th { min-width: 6.5rem; max-width: 9rem; overflow-wrap: anywhere; }
th, td { padding: .15rem .6rem; border-bottom: 1px solid var(--line); text-align: left; }
td.number { white-space: nowrap; text-align: right; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: 1rem; }
.pictures { grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); }
figure { margin: 0; }
img, svg { width: 100%; height: auto; }
.frame { fill: none; stroke: var(--line); }
.line { fill: none; stroke: var(--curve); stroke-width: 2; }
.key { display: inline-block; width: 1em; height: 1em; border: 1px solid var(--text); }
th small { display: block; font-weight: normal; }
@media (max-width: 32rem) { th, td { padding: .15rem .3rem; } }
"""


def write_html(report: Report, path: Path | str) -> None:
    """Write the page, atomically.

    Reads the worst images: ValueError or FileNotFoundError where one cannot be read. OSError where
    the page cannot be written.
    """
    # a name may hold half a letter, which is no text in UTF-8
    text = page(report).encode("utf-8", "backslashreplace")
    write_atomically(path, lambda temporary: Path(temporary).write_bytes(text))


def page(report: Report) -> str:
    """The whole page. ValueError or FileNotFoundError where one of the worst images is unread."""
    errors = report.errors
    rates = [("precision", figure(errors.precision)), ("recall", figure(errors.recall))]
    metrics = [(name, figure(value)) for name, value in report.metrics.rows().items()]
    at = f"at IoU {FOUND} and scores from {report.threshold:.3f} on"
    sections = [
        f"<h1>Detections on {counted(report.metrics.images, 'image')}</h1>{_about(report)}",
        f"<h2>COCO metrics, {OVER_ALL}</h2>{_remarks(report)}"
        f"{_table(('figure', 'value'), metrics)}",
        f"<h2>Detections and errors</h2><p>Counts {at}. The last column is the AP50 that would be "
        f"won if these errors alone were mended, over all scores. {' '.join(MEASURES)}</p>"
        f"{_table(('rate', 'value'), rates)}{_error_table(report)}",
        f"<h2>Precision over recall</h2><p>At IoU {FOUND}; recall to the right, precision "
        "upwards, both from 0 to 1.</p>"
        f"<div class='grid'>{''.join(map(_curve, report.curves))}</div>",
        f"<h2>Confusions</h2><p>Each row holds the objects of one class, each column what they "
        f"were detected as, {at}. The row background counts every detection left without an object "
        "of its own, whatever its kind: of nothing, out of place, or of an object that another "
        f"detection has.</p><div class='wide'>{_confusion_table(report.confusion)}</div>",
        f"<h2>Worst images</h2><p>Those with the most errors {at}. Thin white boxes are the "
        "annotated objects.</p>" + _pictures(report),
    ]
    return document("Detection report", STYLE, sections)


def _about(report: Report) -> str:
    """What was measured: names and what they are."""
    rows = (f"<dt>{escape(k)}</dt><dd>{escape(text)}</dd>" for k, text in report.about.items())
    return f"<dl>{''.join(rows)}</dl>" if report.about else ""


def _remarks(report: Report) -> str:
    return "".join(f"<p><strong>{escape(text)}.</strong></p>" for text in report.remarks)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Names in the first column, numbers in the others; all of it escaped."""
    cells = "".join(f"<th scope='col'>{escape(name)}</th>" for name in head)
    lines = [f"<tr>{cells}</tr>"]
    for name, *values in rows:
        numbers = "".join(f"<td class='number'>{escape(value)}</td>" for value in values)
        lines.append(f"<tr><th scope='row'>{escape(name)}</th>{numbers}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _error_table(report: Report) -> str:
    head = ("kind", "count", "AP50 if mended")
    lines = ["".join(f"<th scope='col'>{name}</th>" for name in head)]
    for kind, colour in COLOURS.items():
        gain = report.errors.gains.get(kind)
        key = f"<span class='key' style='background: {colour}'></span> {kind}"
        lines.append(
            f"<th scope='row'>{key}<small>{KINDS.get(kind, 'finds an object of its class')}</small>"
            f"</th><td class='number'>{report.errors.counts[kind]}</td>"
            f"<td class='number'>{'' if gain is None else figure(gain, '+.3f')}</td>"
        )
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _curve(curve: Curve) -> str:
    """A class's curve as a drawing of 100 x 100 units, recall to the right, precision upwards."""
    name, ap50 = escape(curve.name), figure(curve.ap50)
    points = " ".join(f"{x},{100 - 100 * y:.1f}" for x, y in enumerate(curve.precision))
    ends = [figure(curve.precision[i], ".2f") for i in (0, 50, 100)] if curve.precision else []
    said = f"precision {', '.join(ends)} at recall 0, 0.5, 1" if ends else "no objects"
    return (
        "<figure><svg viewBox='-2 -2 104 104' role='img' "
        f"aria-label='Precision over recall of {name}: {said}'>"
        f"<rect class='frame' width='100' height='100'/><polyline class='line' points='{points}'/>"
        f"</svg><figcaption>{name}: AP50 {ap50}</figcaption></figure>"
    )


def _confusion_table(confusion: Confusion) -> str:
    """Darker where more of the row's objects are."""
    names = [escape(name) for name in confusion.names]
    lines = ["<th></th>" + "".join(f"<th scope='col'>{name}</th>" for name in names)]
    for name, row in zip(names, confusion.counts.tolist(), strict=True):
        whole = max(sum(row), 1)
        cells = "".join(
            f"<td class='number' style='background: rgb(var(--shade) / {count / whole / 2:.2f})'>"
            f"{count}</td>"
            for count in row
        )
        lines.append(f"<th scope='row'>{name}</th>{cells}")
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _pictures(report: Report) -> str:
    if not report.worst:
        return "<p>No image has an error.</p>"
    names = report.confusion.names
    figures = []
    for image in report.worst:
        said = escape("; ".join(_caption(each, names) for each in image.judged))
        figures.append(
            f"<figure><img src='{_data_uri(draw(report, image))}' alt='{said}'>"
            f"<figcaption>{escape(str(image))}</figcaption></figure>"
        )
    return f"<div class='grid pictures'>{''.join(figures)}</div>"


def _caption(each: Judged, names: list[str]) -> str:
    """What stands beside a box: its kind, its class, for a wrong class the right one, the score."""
    text = names[each.label] if each.kind == "correct" else f"{each.kind}: {names[each.label]}"
    if each.truth not in (None, each.label):
        text += f" for {names[each.truth]}"
    return text if each.score is None else f"{text} {each.score:.2f}"


def draw(report: Report, image: ImageReport) -> Image.Image:
    """A picture with the annotated objects, thin and white, and what was detected or missed."""
    picture = report.dataset.load_image(image.image_id)
    width, height = picture.size
    scale = min(max(1, SIDES[0] / min(width, height)), SIDES[1] / max(width, height))
    picture = picture.resize((max(1, round(width * scale)), max(1, round(height * scale))))
    brush = ImageDraw.Draw(picture)
    for annotation in report.dataset.coco.imgToAnns[image.image_id]:
        brush.rectangle(_corners(annotation["bbox"], scale), outline="white")
    judged = sorted(image.judged, key=lambda each: each.kind == "correct")  # errors on top
    draw_boxes(
        picture,
        [_corners(each.box, scale) for each in judged],
        [each.label for each in judged],
        [_caption(each, report.confusion.names) for each in judged],
        [COLOURS[each.kind] for each in judged],
    )
    return picture


def _corners(box: list[float], scale: float) -> tuple[float, ...]:
    """xywh to left, top, right, bottom in pixels of the picture."""
    x, y, width, height = (value * scale for value in box)
    return x, y, x + max(width, 0), y + max(height, 0)


def _data_uri(picture: Image.Image) -> str:
    """A picture as text that stands in for a file's address."""
    buffer = BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
