"""What a detector looked at, and Figs. 5 and 6 of the paper drawn from it. Chapter looking."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from deformable_detr.look import overlays


@dataclass
class Explanation:
    """What a detection, a decoder query or an encoder token looked at.

    All places are in pixels of the picture, (0, 0) its top left corner, in the frame of the boxes.
    points: (N, M, L, K, 2) as (x, y), of N layers, M heads, L levels and K points. weights: (N, M,
    L, K), summing to one in each layer and head. references: what each layer looked around, (N, 4)
    xyxy; a point is a box without a size. map_shapes: (H, W) of the levels' maps. gradients: how
    much each pixel moves each item, a norm over the colours, (h, w) in the size in which the model
    saw the picture; those of "x", "y", "w" and "h" in pixels, that of "score" in its unit, all per
    standard deviation of colour (of ImageNet). query, name, score in [0, 1] and box, (4,) xyxy: of
    the detection. token: (level, row, column) of a token, which has none of these and no gradients.
    """

    image: Image.Image = field(repr=False)
    points: np.ndarray = field(repr=False)
    weights: np.ndarray = field(repr=False)
    references: np.ndarray = field(repr=False)
    map_shapes: list[tuple[int, int]]
    gradients: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    query: int | None = None
    name: str | None = None
    score: float | None = None
    box: np.ndarray | None = None
    token: tuple[int, int, int] | None = None

    @property
    def title(self) -> str:
        """What is explained, such as "seven 0.93"."""
        if self.token is None:
            return f"{self.name} {self.score:.2f}"
        return "token at row {1}, column {2} of level {0}".format(*self.token)

    def columns(self) -> dict[str, np.ndarray]:
        """A row for each point, as for pandas.DataFrame: x, y, weight, the reference_x and
        reference_y of its layer, and which layer, head, level and point it is."""
        place = np.indices(self.weights.shape).reshape(4, -1)
        centres = self.references.reshape(-1, 2, 2).mean(1)[place[0]]
        x, y = self.points.reshape(-1, 2).T
        found = {"x": x, "y": y, "weight": self.weights.ravel()}
        found |= {"reference_x": centres[:, 0], "reference_y": centres[:, 1]}
        return found | dict(zip(("layer", "head", "level", "point"), place, strict=True))

    def draw_points(
        self,
        axes: Axes | None = None,
        layer: int = -1,
        head: int | None = None,
        level: int | None = None,
        whole: bool = False,
    ) -> Axes:
        """Fig. 6: where a layer looked, by all heads on all levels or by one. whole: the whole
        picture, instead of the part around. ValueError where there is none of that number."""
        numbers = {"layer": layer, "head": head, "level": level}
        for (name, i), many in zip(numbers.items(), self.weights.shape, strict=False):
            if i is not None and not -many <= i < many:
                raise ValueError(f"{name} must be 0 to {many - 1}, got {i}")
        axes = axes or Figure(figsize=(5, 5), layout="constrained").subplots()
        points, weights = self.points[layer], self.weights[layer]  # (M, L, K, ...)
        levels = np.broadcast_to(np.arange(weights.shape[1])[:, None], weights.shape)
        heads, rows = (slice(None) if i is None else [i] for i in (head, level))
        parts = [array[heads][:, rows] for array in (points, weights, levels)]
        overlays.draw_points(axes, self.image, *parts, self.references[layer], self.box)
        overlays.show(axes, None if whole else self.window())
        return axes

    def draw_gradients(self, axes: Sequence[Axes] | None = None, whole: bool = False) -> list[Axes]:
        """Fig. 5: which pixels move x, y, w, h and the score. axes: five. ValueError where there
        are no gradients."""
        if not self.gradients:
            raise ValueError("there are no gradients: explain a detection, with gradients=True")
        if axes is None:
            axes = Figure(figsize=(15, 3.4), layout="constrained").subplots(1, 5)
        for axis, (name, norm) in zip(axes, self.gradients.items(), strict=True):
            overlays.draw_gradient(axis, self.image, norm, self.box)
            overlays.show(axis, None if whole else self.window())
            axis.set_title(overlays.TITLES[name])
        return list(axes)

    def window(self) -> tuple[float, float, float, float]:
        """xyxy, square if the picture is: the part around the box and the points that count."""
        points, weights = self.points[-1].reshape(-1, 2), self.weights[-1].ravel()
        ends = [points[weights >= 0.2 * weights.max()], self.references[-1].reshape(-1, 2)]
        if self.box is not None:
            ends.append(self.box.reshape(2, 2))
        return overlays.around(np.concatenate(ends), self.image.size)

    def draw(
        self, layer: int | None = None, head: int | None = None, level: int | None = None
    ) -> Figure:
        """Both figures, as far as there are both; of all layers the first and the last."""
        figure = Figure(figsize=(15, 9 if self.gradients else 5.2), layout="constrained")
        figure.suptitle(self.title)
        rows = figure.subfigures(2, 1, height_ratios=(5, 3.5)) if self.gradients else [figure]
        layers = sorted({0, len(self.points) - 1}) if layer is None else [layer]
        whole, *panels = rows[0].subplots(1, 1 + len(layers))
        overlays.draw_whole(whole, self.image, self.box, self.window())
        for axes, number in zip(panels, layers, strict=True):
            self.draw_points(axes, number, head, level).set_title(f"layer {number}")
        if self.gradients:
            self.draw_gradients(rows[1].subplots(1, 5))
        return figure
