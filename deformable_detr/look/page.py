"""What a detector looked at as one HTML page, without scripts or other files. Chapter looking."""

import base64
from collections.abc import Sequence
from html import escape
from io import BytesIO

import torch
from matplotlib.figure import Figure
from PIL import Image

from deformable_detr.look.document import document
from deformable_detr.look.explanation import Explanation
from deformable_detr.look.measures import EDGE, energy_shares, weight_shares
from deformable_detr.look.overlays import SHARES, TITLES
from deformable_detr.look.pictures import draw_detections
from deformable_detr.structures import Detections

COLUMNS, INCHES, DPI = 3, 4.2, 90  # panels in a row, their side, and pixels of an inch
STYLE = """
:root { color-scheme: light dark; --text: #1b1b1b; --back: #ffffff; --line: #8a8a8a; }
@media (prefers-color-scheme: dark) { :root { --text: #e8e8e8; --back: #161616; --line: #9a9a9a; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back);
  max-width: 68rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; background: white; border-radius: 4px; }
.wide { overflow-x: auto; }
.wide img { min-width: 44rem; }
figcaption { max-width: 46rem; }
table { border-collapse: collapse; margin: .8rem 0; }
th, td { padding: .15rem .6rem; border-bottom: 1px solid var(--line); text-align: left; }
td { text-align: right; font-variant-numeric: tabular-nums; }
"""
READING = f"""<h2>How to read this page</h2>
<p><strong>Points.</strong> In each layer of the decoder a query reads the feature maps at a few
points and adds up what it finds. Each mark is such a point of one head. The larger its area, the
larger its attention weight; its shape and colour say which map it reads: level 0 is the finest. The
dashed rectangle (or the cross alone) is the reference, which the layer started from; the solid
rectangle is the box that was found in the end.</p>
<p><strong>Gradients.</strong> For each number of the detection, how much would it move if a pixel
changed a little? Where the picture keeps its colours, much; where it is pale, hardly. The thick
contour holds {SHARES[1]:.0%} of the gradient's energy, the thin one {SHARES[0]:.0%}.</p>
<p><strong>What neither says.</strong> A large weight says that a sample was read, not that it
mattered. A gradient is about small changes of single pixels; what happens when a part of the object
is covered is another question.</p>"""


Which = dict[str, int | None]  # the layer, head and level to be drawn; None is all


def page(
    subject: str,
    found: dict[str, Explanation],
    tokens: Sequence[Explanation | None],
    which: Which,
) -> str:
    """The whole page.

    subject: what was looked at. found: by name, such as "detection 0"; or none. tokens: of the
    encoder, one for each of these or None; or where there are none of these, by themselves.
    """
    sections = [f"<h1>What the detector looked at</h1><p>{escape(subject)}</p>"]
    if found:
        sections += [_overview(found)]
    shown = [*found.values(), *filter(None, tokens)]
    sections += [READING, _maps(shown[0])]
    for (name, seen), token in zip(found.items(), tokens, strict=False):
        sections += [_detection(name, seen, which)]
        if token:
            sections += [_token(token, which)]
    if not found:
        sections += [f"<h2>A {token.title}</h2>{_token(token, which)}" for token in tokens]
    return document("What the detector looked at", STYLE, sections)


def picture(found: Sequence[Explanation], which: Which) -> Image.Image:
    """Both figures of each, one below the other."""
    drawn = [Image.open(png(seen.draw(**which))) for seen in found]
    sheet = Image.new("RGB", (drawn[0].width, sum(each.height for each in drawn)), "white")
    place = 0
    for each in drawn:
        sheet.paste(each, (0, place))
        place += each.height
    return sheet


def _maps(seen: Explanation) -> str:
    shapes = "; ".join(f"level {i}: {h} x {w}" for i, (h, w) in enumerate(seen.map_shapes))
    return f"<p>Cells of the feature maps (height x width): {shapes}.</p>"


def _overview(found: dict[str, Explanation]) -> str:
    """The picture with the boxes that are explained."""
    seen = list(found.values())
    boxes = torch.stack([torch.from_numpy(each.box) for each in seen]).float()
    scores, labels = torch.tensor([each.score for each in seen]), torch.arange(len(seen))
    drawn = draw_detections(
        seen[0].image, Detections(scores, labels, boxes, labels), [each.name for each in seen]
    )
    said = "; ".join(f"{name}: {each.title}" for name, each in found.items())
    return _image(drawn, f"The picture with boxes of {said}", f"What is explained: {said}.")


def _detection(name: str, seen: Explanation, which: Which) -> str:
    """Points of each layer, gradients, and what lies where."""
    drawn, (x0, y0, x1, y1) = draw_layers(seen, which), seen.box
    layer = (-1 if which["layer"] is None else which["layer"]) % len(seen.points)
    weights = weight_shares(seen, layer)
    points = _image(
        drawn,
        f"Sampling points of the decoder for {seen.title}",
        f"Where the decoder looked. In layer {layer} {weights['inside']:.0%} of the weight lies in "
        f"the box, and {weights['sides'] + weights['ends']:.0%} near its edges (within {EDGE} "
        "half-sides, inside or outside).",
    )
    return (
        f"<h2>{escape(f'{name.capitalize()}: {seen.title}')}</h2><p>Query {seen.query}; box from "
        f"({x0:.0f}, {y0:.0f}) to ({x1:.0f}, {y1:.0f}) in pixels.</p>{points}"
        + (_gradients(seen) if seen.gradients else "")
    )


def _gradients(seen: Explanation) -> str:
    figure = Figure(figsize=(15, 3.4), layout="constrained")
    axes = figure.subplots(1, 5)
    seen.draw_gradients(axes)
    caption = "Which pixels move each number of it; thick lines hold half of the energy."
    rows = []
    for item, shares in energy_shares(seen).items():
        name = TITLES.get(item, "share of the whole picture")
        cells = "".join(f"<td>{value:.0%}</td>" for value in shares.values())
        rows.append(f"<tr><th scope='row'>{name}</th>{cells}</tr>")
    heads = ("gradient energy of", "in the box", "at left and right", "at top and bottom")
    head = "".join(f"<th scope='col'>{text}</th>" for text in heads)
    picture = _image(figure, f"Gradient norms of {seen.title}", caption)
    return f"{picture}<table><tr>{head}</tr>{''.join(rows)}</table>"


def _token(seen: Explanation, which: Which) -> str:
    caption = f"Where the encoder's {seen.title} looked. Tokens read around their place, the cross."
    said = f"Sampling points of the encoder, {seen.title}"
    return _image(draw_layers(seen, which), said, caption)


def draw_layers(seen: Explanation, which: Which) -> Figure:
    """The points of each layer, or of one."""
    layers = range(len(seen.points)) if which["layer"] is None else [which["layer"]]
    columns = min(COLUMNS, len(layers))
    rows = -(-len(layers) // columns)
    figure = Figure(figsize=(INCHES * columns, (INCHES + 0.5) * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, layer in zip(panels, layers, strict=False):
        seen.draw_points(axes, **which | {"layer": layer})
        axes.set_title(f"layer {layer % len(seen.points)}")
    for axes in panels[len(layers) :]:
        axes.set_axis_off()
    return figure


def png(picture: Figure | Image.Image) -> BytesIO:
    """As a PNG file's content."""
    buffer = BytesIO()
    if isinstance(picture, Figure):
        picture.savefig(buffer, format="png", dpi=DPI)
    else:
        picture.save(buffer, "PNG")
    return buffer


def _image(picture: Figure | Image.Image, said: str, caption: str) -> str:
    """A figure of the page, in which its picture is."""
    data = base64.b64encode(png(picture).getvalue()).decode()
    wide = isinstance(picture, Figure) and picture.get_figwidth() > 2 * INCHES
    frame = "wide" if wide else "whole"  # the former scrolls on a small screen
    return (
        f"<figure><div class='{frame}'><img src='data:image/png;base64,{data}' "
        f"alt='{escape(said, quote=True)}'></div>"
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
