"""Pictures with boxes: what a detector finds, and what is in a data set.
Chapters looking and your_own_data."""

import random
import textwrap
from collections.abc import Callable, Mapping, Sequence

from PIL import Image, ImageDraw

from deformable_detr.data.coco import CocoDataset
from deformable_detr.data.names import printable
from deformable_detr.look.fonts import caption_font
from deformable_detr.structures import Detections

# Okabe and Ito's colours, which colour-blind readers tell apart
PALETTE = ["#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#000000"]
SHORTEST_SIDE = 384  # smaller pictures are enlarged, so that their labels can be read,
LONGEST_SIDE = 4096  # but not beyond this
SHEET_SIDE, SHEET_COLUMNS = 384, 4  # pixels of a sheet's pictures, and how many are in a row


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
    height, width = max(12, min(size) // 30), max(2, min(size) // 200)  # of letters, of lines
    colours = colours or [PALETTE[label % len(PALETTE)] for label in labels]
    for box, text, colour in reversed(list(zip(boxes, texts, colours, strict=True))):
        x0, y0, x1, y1 = box
        x1, y1 = max(x0, x1), max(y0, y1)
        draw.rectangle((x0, y0, x1, y1), outline=colour, width=width)
        text = printable(text)
        font = caption_font(height, text)
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        place_x = min(max(x0, 0), max(0, size[0] - right))
        place_y = y0 - bottom - 2 if y0 - bottom - 2 >= 0 else min(y0, size[1] - bottom - 2)
        draw.rectangle(
            (place_x + left, place_y + top - 2, place_x + right, place_y + bottom + 2), fill=colour
        )
        dark = sum(Image.new("RGB", (1, 1), colour).getpixel((0, 0))) < 330
        draw.text((place_x, place_y), text, fill="white" if dark else "black", font=font)


def picture_sheet(
    dataset: CocoDataset,
    count: int = 24,
    seed: int = 0,
    on_error: Callable[[str], object] = lambda text: None,
) -> Image.Image:
    """Random images of a data set with their boxes and names, side by side: the first thing to do
    with new data is to look at it.

    Each image fills a square, its file's name above it; one that cannot be read says why, and
    on_error is called with that. Crowds are marked as such. ValueError where the data set has no
    image, or count is below 1.
    """
    if min(count, len(dataset)) < 1:
        raise ValueError(f"a sheet needs at least one image, got {min(count, len(dataset))}")
    places = random.Random(seed).sample(range(len(dataset)), min(count, len(dataset)))
    chosen = [dataset.image_ids[i] for i in sorted(places)]  # ids may be numbers and texts, mixed
    side, line = SHEET_SIDE, 20  # pixels of the picture and of the file's name
    columns = min(SHEET_COLUMNS, len(chosen))
    rows = -(-len(chosen) // columns)
    sheet = Image.new("RGB", (columns * side, rows * (side + line)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image_id in enumerate(chosen):
        x, y = i % columns * side, i // columns * (side + line)
        try:
            sheet.paste(_annotated(dataset, image_id, side - 4), (x, y + line))
        except (FileNotFoundError, ValueError) as error:
            on_error(str(error))
            text = textwrap.fill(str(error), side // 8)
            draw.text((x + 4, y + line), text, "black", caption_font(12, text))
        name = f"{dataset.coco.imgs[image_id]['file_name']} (id {image_id})"
        name = printable(name)[-side // 7 :]
        draw.text((x + 4, y + 2), name, "black", caption_font(12, name))
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
