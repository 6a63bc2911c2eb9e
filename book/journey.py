"""The first page's picture, one digit from a point to a detection: `python book/journey.py`."""

import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from PIL import Image
from readme import detect

from deformable_detr.data.images import read_image
from deformable_detr.look.sampling import record_sampling
from deformable_detr.weights.ours import load_model

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "data" / "results" / "journey.png"
POINT, CELL = "#E69F00", 32  # orange, as sampling points everywhere in the book; pixels


def draw_point(axes: Axes, image: Image.Image) -> None:
    """A point between pixels at the digit's end, much enlarged."""
    axes.imshow(image)
    axes.plot(51.25, 61.5, "o", color=POINT, ms=11, mec="black")
    axes.set(xlim=(46.5, 55.5), ylim=(66.5, 57.5))
    axes.set_title("1. a point between pixels")


def draw_cells(axes: Axes, image: Image.Image) -> None:
    """The picture as attention sees it at stride 32: a list of cells."""
    axes.imshow(image)
    for cell in range(image.width // CELL * (image.height // CELL)):
        row, column = divmod(cell, image.width // CELL)
        corner = (column * CELL - 0.5, row * CELL - 0.5)
        axes.add_patch(Rectangle(corner, CELL, CELL, fill=False, edgecolor="white"))
        axes.text(corner[0] + 4, corner[1] + 4, cell, color="white", fontsize=8, va="top")
    axes.set_title("2. cells that attention compares")


def draw_places(axes: Axes, image: Image.Image, points: np.ndarray, weights: np.ndarray) -> None:
    """Where the last layer looked for the digit; larger means more weight."""
    axes.imshow(0.4 * np.asarray(image) / 255 + 0.6)
    size = 6 + 160 * weights / weights.max()
    axes.scatter(*points.T, s=size, color=POINT, edgecolors="black", linewidths=0.5)
    axes.set(xlim=(-0.5, image.width - 0.5), ylim=(image.height - 0.5, -0.5))
    axes.set_title("3. places that it chose")


def draw_box(axes: Axes, image: Image.Image, box: list[float], label: str) -> None:
    """The detection that came of it."""
    axes.imshow(image)
    x0, y0, x1, y1 = box
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor="white", lw=2))
    axes.text(x0, y0 - 3, label, color="white", fontsize=11, va="bottom", weight="bold")
    axes.set_title("4. what it found")


def main() -> int:
    """Write the picture."""
    matplotlib.use("Agg")
    plt.style.use(ROOT / "chapters" / "book.mplstyle")
    image = read_image(ROOT / "data" / "samples" / "000010.png")
    model, categories = load_model(ROOT / "data" / "checkpoints" / "digits.safetensors")
    with record_sampling(model) as record:
        found = detect(model, image)
    best = int(found.scores.argmax())
    query, last = int(found.queries[best]), record.decoder[-1]
    points = last.locations[0, query].reshape(-1, 2) * torch.tensor(image.size) - 0.5  # in pixels
    weights = last.weights[0, query].flatten()
    label = f"{categories[int(found.labels[best])]['name']} {found.scores[best]:.2f}"
    _, axes = plt.subplots(1, 4, figsize=(11, 3))
    draw_point(axes[0], image)
    draw_cells(axes[1], image)
    draw_places(axes[2], image, points.numpy(), weights.numpy())
    draw_box(axes[3], image, found.boxes[best].tolist(), label)
    for axis in axes:
        axis.set(xticks=[], yticks=[])
    plt.savefig(PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
