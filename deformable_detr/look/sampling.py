"""Where attention looked: its samples recorded, and drawn (Fig. 6 of the paper)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from PIL import Image

from deformable_detr.layers.attention import MSDeformAttn, Sampling
from deformable_detr.models.deformable_detr import DeformableDETR


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
