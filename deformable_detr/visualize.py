"""Pictures of what a detector finds and of what it looks at (Figs. 5 and 6 of the paper)."""

import random
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.font_manager import findfont
from matplotlib.patches import Rectangle
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.overrides import TorchFunctionMode

from deformable_detr.attention import MSDeformAttn, Sampling
from deformable_detr.boxes import cxcywh_to_xyxy
from deformable_detr.datasets import CocoDataset
from deformable_detr.detector import DeformableDETR
from deformable_detr.structures import Batch, Detections

# Okabe and Ito's colours, which colour-blind readers tell apart
PALETTE = ["#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#000000"]
SHORTEST_SIDE = 384  # smaller pictures are enlarged, so that their labels can be read,
LONGEST_SIDE = 4096  # but not beyond this
SHEET_SIDE, SHEET_COLUMNS = 384, 4  # pixels of a sheet's pictures, and how many are in a row
ITEMS = ("x", "y", "w", "h", "score")


@dataclass
class SamplingRecord:
    """The Sampling of every encoder and decoder layer in one forward pass."""

    encoder: list[Sampling] = field(default_factory=list)
    decoder: list[Sampling] = field(default_factory=list)


@contextmanager
def record_sampling(model: DeformableDETR) -> Iterator[SamplingRecord]:
    """While open, a forward pass leaves in the record where its attention looked.

    with record_sampling(model) as record:
        model(batch)
    record.decoder[-1].locations  # (B, Q, M, L, K, 2)
    """
    record = SamplingRecord()

    def hook(into: list[Sampling]) -> object:
        def after(module: MSDeformAttn, inputs: tuple, _: object) -> None:
            query, references, _, spatial_shapes, *_ = inputs
            with torch.no_grad():
                into.append(module.sampling(query, references, spatial_shapes))

        return after

    handles = [
        layer.attention.register_forward_hook(hook(record.encoder))
        for layer in model.encoder.layers
    ]
    handles += [
        layer.cross_attention.register_forward_hook(hook(record.decoder))
        for layer in model.decoder.layers
    ]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def draw_detections(
    image: Image.Image, detections: Detections, names: Sequence[str] | Mapping[int, str]
) -> Image.Image:
    """A copy of a picture with boxes, names and scores; small pictures are enlarged.

    detections: boxes in pixels of the image. names: of the classes, by label.
    """
    scale = min(round(SHORTEST_SIDE / min(image.size)), LONGEST_SIDE // max(image.size))
    scale = max(1, scale)
    size = (image.width * scale, image.height * scale)
    picture = image.convert("RGB").resize(size, Image.Resampling.NEAREST)
    labels = detections.labels.tolist()
    found = zip(labels, detections.scores.tolist(), strict=True)
    texts = [f"{names[label]} {score:.2f}" for label, score in found]
    draw_boxes(picture, (detections.boxes * scale).tolist(), labels, texts)
    return picture


@cache
def caption_font(size: int) -> ImageFont.FreeTypeFont:
    """Of that many pixels; with accents, Greek, Cyrillic, Arabic and more, but no Chinese."""
    return ImageFont.truetype(findfont("DejaVu Sans"), size)  # matplotlib brings it


def draw_boxes(
    picture: Image.Image,
    boxes: list[list[float]],
    labels: list[int],
    texts: list[str],
    colours: list[str] | None = None,
) -> None:
    """Draw boxes, xyxy in pixels, on an RGB picture, each with its text; the first on top.

    colours: of the boxes, such as "#E69F00"; by default those of their labels in PALETTE.
    """
    draw, size = ImageDraw.Draw(picture), picture.size
    font = caption_font(max(12, min(size) // 30))
    width = max(2, min(size) // 200)
    colours = colours or [PALETTE[label % len(PALETTE)] for label in labels]
    for box, text, colour in reversed(list(zip(boxes, texts, colours, strict=True))):
        x0, y0, x1, y1 = box
        x1, y1 = max(x0, x1), max(y0, y1)
        draw.rectangle((x0, y0, x1, y1), outline=colour, width=width)
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        place_x = min(max(x0, 0), max(0, size[0] - right))
        place_y = y0 - bottom - 2 if y0 - bottom - 2 >= 0 else min(y0, size[1] - bottom - 2)
        draw.rectangle(
            (place_x + left, place_y + top - 2, place_x + right, place_y + bottom + 2), fill=colour
        )
        dark = sum(Image.new("RGB", (1, 1), colour).getpixel((0, 0))) < 330
        draw.text((place_x, place_y), text, fill="white" if dark else "black", font=font)


def picture_sheet(dataset: CocoDataset, count: int = 24, seed: int = 0) -> Image.Image:
    """Random images of a data set with their boxes and names, side by side: the first thing to do
    with new data is to look at it.

    Each image fills a square, its file's name above it; one that cannot be read says why. Crowds
    are marked as such. ValueError where the data set has no image, or count is below 1.
    """
    if min(count, len(dataset)) < 1:
        raise ValueError(f"a sheet needs at least one image, got {min(count, len(dataset))}")
    chosen = sorted(random.Random(seed).sample(dataset.image_ids, min(count, len(dataset))))
    side, line = SHEET_SIDE, 20  # pixels of the picture and of the file's name
    columns = min(SHEET_COLUMNS, len(chosen))
    rows = -(-len(chosen) // columns)
    sheet = Image.new("RGB", (columns * side, rows * (side + line)), "white")
    draw, font = ImageDraw.Draw(sheet), caption_font(12)
    for i, image_id in enumerate(chosen):
        x, y = i % columns * side, i // columns * (side + line)
        try:
            sheet.paste(_annotated(dataset, image_id, side - 4), (x, y + line))
        except (FileNotFoundError, ValueError) as error:
            draw.text((x + 4, y + line), textwrap.fill(str(error), side // 8), "black", font)
        name = f"{dataset.coco.imgs[image_id]['file_name']} (id {image_id})"
        draw.text((x + 4, y + 2), name[-side // 7 :], "black", font)
    return sheet


def _annotated(dataset: CocoDataset, image_id: int, side: int) -> Image.Image:
    """An image of a data set with its annotations, its longer side of that many pixels."""
    image = dataset.load_image(image_id)
    scale = side / max(image.size)
    size = [max(1, round(n * scale)) for n in image.size]
    picture = image.resize(size, Image.Resampling.BILINEAR)
    boxes, labels, texts = [], [], []
    for annotation in dataset.coco.imgToAnns[image_id]:
        x, y, width, height = (n * scale for n in annotation["bbox"])
        label = dataset.label_of[annotation["category_id"]]
        crowd = " (crowd)" if annotation["iscrowd"] else ""
        boxes.append([x, y, x + width, y + height])
        labels.append(label)
        texts.append(f"{dataset.categories[label]['name']}{crowd}")
    draw_boxes(picture, boxes, labels, texts)
    return picture


def draw_sampling_points(
    axes: Axes,
    image: np.ndarray | Image.Image,
    sampling: Sampling,
    index: int,
    padded_size: tuple[int, int],
    image_index: int = 0,
    reference: tuple[float, float] | None = None,
    box: tuple[float, float, float, float] | None = None,
    label: str = "",
) -> None:
    """The points that one query or token sampled, all heads and levels in one picture (Fig. 6).

    Each point is a filled circle whose colour and area are its attention weight; points outside the
    picture are left out. sampling: of one layer; index: of the query or token. padded_size: (H, W)
    of the batch's images, to which the locations are relative. reference: (x, y), drawn as a green
    cross, and box: xyxy, as a green rectangle, both in pixels of the image.
    """
    height, width = padded_size
    points = sampling.locations[image_index, index].reshape(-1, 2).cpu() * torch.tensor(
        [width, height]
    )
    weights = sampling.weights[image_index, index].reshape(-1).cpu()
    order = weights.argsort()  # the heaviest on top
    pixels = np.asarray(image)
    axes.imshow(pixels, extent=(0, pixels.shape[1], pixels.shape[0], 0), alpha=0.8)
    drawn = axes.scatter(
        *points[order].t().numpy(),
        c=weights[order].numpy(),
        cmap="plasma",
        vmin=0,
        s=(4 + 50 * weights[order] / weights.max()).numpy(),
        edgecolors="white",
        linewidths=0.3,
    )
    axes.figure.colorbar(drawn, ax=axes, label="attention weight", shrink=0.8)
    if reference is not None:
        axes.plot(*reference, marker="+", color="#00C000", markersize=14, markeredgewidth=2.5)
    if box is not None:
        x0, y0, x1, y1 = box
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color="#00C000", lw=2))
    axes.set(xlim=(0, pixels.shape[1]), ylim=(pixels.shape[0], 0), title=label)
    axes.set_axis_off()


class FollowReferences(TorchFunctionMode):
    """While open, `detach` does nothing, so that gradients flow on through references."""

    def __torch_function__(
        self, function: object, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        """Call `function`, unless it would cut the graph."""
        if function is Tensor.detach:
            return args[0]
        return function(*args, **(kwargs or {}))


def gradient_norms(
    model: torch.nn.Module, batch: Batch, query: int, label: int, image_index: int = 0
) -> dict[str, Tensor]:
    """How much each pixel moves each item of one detection: |d item / d pixel| (A.5, Fig. 5).

    The norm is over the three colours. The items are the box's centre x and y, width w and height
    h, each in [0, 1] relative to the image without its padding, and the class score in [0, 1].
    A refining model is trained with its references detached (A.4). Here they are followed, because
    pixels act through them too: only then do finite differences agree (chapter 9).
    Returns (H, W) for each item, of the padded image.
    """
    images = batch.images.clone().requires_grad_(True)
    with FollowReferences():
        output = model(Batch(images, batch.mask, batch.sizes))
    items = [*output.boxes[image_index, query], output.logits[image_index, query, label].sigmoid()]
    norms = {}
    for name, item in zip(ITEMS, items, strict=True):
        (gradient,) = torch.autograd.grad(item, images, retain_graph=True)
        norms[name] = gradient[image_index].norm(dim=0)
    return norms


def draw_gradient_norms(
    axes: list[Axes], image: np.ndarray | Image.Image, norms: dict[str, Tensor], box: Tensor
) -> None:
    """Five pictures, one for each item of `gradient_norms`, over a pale copy of the image.

    axes: five. box: (4,) cxcywh, normalised to the image without padding, drawn as a rectangle.
    """
    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    x0, y0, x1, y1 = (cxcywh_to_xyxy(box) * torch.tensor([width, height] * 2)).tolist()
    for axis, (name, norm) in zip(axes, norms.items(), strict=True):
        norm = norm[:height, :width].cpu().numpy()
        axis.imshow(pixels.mean(-1), cmap="gray", alpha=0.35)
        axis.imshow(norm, cmap="inferno", alpha=0.75, vmax=np.quantile(norm, 0.998))
        axis.add_patch(
            Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, color="#00C000", lw=1.5)
        )
        axis.set(title=name)
        axis.set_axis_off()
