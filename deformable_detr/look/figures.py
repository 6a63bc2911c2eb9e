"""What a detector looked at, drawn: samples, attention and gradients over the image.
Chapter looking."""

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from deformable_detr.boxes import cxcywh_to_xyxy
from deformable_detr.layers.attention import Sampling
from deformable_detr.look.attention import Attention

Picture = np.ndarray | Image.Image
GREEN = "#00C000"


def draw_sampling_points(
    axes: Axes,
    image: Picture,
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
    points = sampling.locations[image_index, index].reshape(-1, 2).float().cpu()
    points = points * torch.tensor([width, height])
    weights = sampling.weights[image_index, index].reshape(-1).float().cpu()
    heaviest_last = weights.argsort()  # on top
    points, weights = points[heaviest_last], weights[heaviest_last]
    _draw_image(axes, image, label)
    drawn = axes.scatter(
        *points.t().numpy(),
        c=weights.numpy(),
        cmap="plasma",
        vmin=0,
        s=(4 + 50 * weights / weights.max()).numpy(),
        edgecolors="white",
        linewidths=0.3,
    )
    axes.figure.colorbar(drawn, ax=axes, label="attention weight", shrink=0.8)
    _mark(axes, reference, box)


def draw_token_attention(
    axes: Axes,
    image: Picture,
    attention: Attention,
    point: tuple[float, float],
    padded_size: tuple[int, int],
    image_index: int = 0,
    label: str = "",
) -> None:
    """Where the encoder's token at a point looked, the mean of its heads (Fig. 3 of DETR).

    attention: of one layer's self-attention, over one map. point: (x, y) in pixels of the image,
    drawn as a green cross; its token is the one in whose cell it lies. padded_size: (H, W) of the
    batch's images. ValueError where the point is not in the image.
    """
    height, width = np.asarray(image).shape[:2]
    if not (0 <= point[0] < width and 0 <= point[1] < height):
        raise ValueError(f"point must lie in the image of {width} x {height} pixels, got {point}")
    rows, columns = _map_shape(attention)
    row = int(point[1] * rows / padded_size[0])
    column = int(point[0] * columns / padded_size[1])
    weights = attention.weights[image_index, :, row * columns + column]
    _draw_weights(axes, image, weights, (rows, columns), padded_size, label)
    _mark(axes, point, None)


def draw_query_attention(
    axes: Axes,
    image: Picture,
    attention: Attention,
    query: int,
    padded_size: tuple[int, int],
    image_index: int = 0,
    box: tuple[float, float, float, float] | None = None,
    label: str = "",
) -> None:
    """Where an object query looked, the mean of its heads (Fig. 6 of DETR).

    attention: of one decoder layer's cross-attention, over one map. box: what the query found, xyxy
    in pixels of the image, drawn as a green rectangle. padded_size: (H, W) of the batch's images.
    """
    weights = attention.weights[image_index, :, query]
    _draw_weights(axes, image, weights, _map_shape(attention), padded_size, label)
    _mark(axes, None, box)


def draw_gradient_norms(
    axes: list[Axes], image: Picture, norms: dict[str, Tensor], box: Tensor
) -> None:
    """Five pictures, one for each item of `gradient_norms`, over the image in grey (Fig. 5).

    axes: five. box: (4,) cxcywh, normalised to the image without padding, drawn as a rectangle.
    """
    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    x0, y0, x1, y1 = (cxcywh_to_xyxy(box) * torch.tensor([width, height] * 2)).tolist()
    for axis, (name, norm) in zip(axes, norms.items(), strict=True):
        norm = norm[:height, :width].float().cpu().numpy()
        axis.imshow(_gray(pixels))
        axis.imshow(norm, cmap="inferno", alpha=0.7, vmax=np.quantile(norm, 0.998))
        _mark(axis, None, (x0 - 0.5, y0 - 0.5, x1 - 0.5, y1 - 0.5))  # pixel centres are integers
        axis.set(title=name)
        axis.set_axis_off()


def _map_shape(attention: Attention) -> tuple[int, int]:
    """(H, W) of the only map that is looked at."""
    shapes = attention.spatial_shapes
    if shapes is None or len(shapes) != 1:
        given = "none" if shapes is None else f"{len(shapes)} maps"
        raise ValueError(f"attention must be to the tokens of one map, got {given}")
    return shapes[0]


def _draw_weights(
    axes: Axes,
    image: Picture,
    weights: Tensor,
    shape: tuple[int, int],
    padded_size: tuple[int, int],
    label: str,
) -> None:
    """Weights (M, H * W) over the image: the heavier a cell, the less of the image shows."""
    mean = weights.float().mean(0).view(shape).cpu().numpy()
    height, width = padded_size
    scale = Normalize(0, mean.max())
    _draw_image(axes, image, label, gray=True)
    axes.imshow(
        mean,
        cmap="plasma",
        norm=scale,
        alpha=0.7 * scale(mean),
        extent=(0, width, height, 0),
        interpolation="nearest",
    )
    axes.figure.colorbar(
        ScalarMappable(scale, "plasma"), ax=axes, label="attention weight", shrink=0.8
    )


def _draw_image(axes: Axes, image: Picture, label: str, gray: bool = False) -> None:
    """The image, a little paler; (0, 0) is the corner of its first pixel."""
    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    pixels = _gray(pixels) if gray else pixels
    axes.imshow(pixels, extent=(0, width, height, 0), alpha=0.8)
    axes.set(xlim=(0, width), ylim=(height, 0), title=label)
    axes.set_axis_off()


def _gray(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3) without colour; not (H, W), which would be stretched to all of black and white."""
    return np.broadcast_to(pixels.mean(-1, keepdims=True), pixels.shape).astype(pixels.dtype)


def _mark(
    axes: Axes,
    point: tuple[float, float] | None,
    box: tuple[float, float, float, float] | None,
) -> None:
    """A green cross at (x, y), and a green rectangle around a box xyxy."""
    if point is not None:
        axes.plot(*point, marker="+", color=GREEN, markersize=14, markeredgewidth=2.5)
    if box is not None:
        x0, y0, x1, y1 = box
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color=GREEN, lw=2))
