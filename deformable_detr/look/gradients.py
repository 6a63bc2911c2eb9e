"""Which pixels move which item of a detection: gradient norms (Fig. 5 of the paper).
Chapter looking."""

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from deformable_detr.losses.scoring import scoring_of
from deformable_detr.structures import Batch, Output

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
    pixels act through them too: only then do finite differences agree (chapter looking).
    Returns (H, W) for each item, of the padded image.
    """
    images = batch.images.clone().requires_grad_(True)
    with FollowReferences():
        output = model(Batch(images, batch.mask, batch.sizes))
    gradients = item_gradients(output, images, query, label, image_index)
    return {name: gradient.norm(dim=0) for name, gradient in gradients.items()}


def item_gradients(
    output: Output, images: Tensor, query: int, label: int, image_index: int = 0
) -> dict[str, Tensor]:
    """d item / d pixel of one detection, (3, H, W) for each item. output: of these images, whose
    graph is kept."""
    scores = scoring_of(output).scores(output.logits[image_index, query])
    items = [*output.boxes[image_index, query], scores[label]]
    return {
        name: torch.autograd.grad(item, images, retain_graph=True)[0][image_index]
        for name, item in zip(ITEMS, items, strict=True)
    }
