"""Which pixels move which item of a detection: gradient norms (Fig. 5 of the paper)."""

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor
from torch.overrides import TorchFunctionMode

from deformable_detr.boxes import cxcywh_to_xyxy
from deformable_detr.structures import Batch

ITEMS = ("x", "y", "w", "h", "score")


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
