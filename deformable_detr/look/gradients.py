"""Which pixels move which item of a detection: gradient norms (Fig. 5 of the paper). Chapter 9."""

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from deformable_detr.losses.scoring import scoring_of
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
    scores = scoring_of(output).scores(output.logits[image_index, query])
    items = [*output.boxes[image_index, query], scores[label]]
    norms = {}
    for name, item in zip(ITEMS, items, strict=True):
        (gradient,) = torch.autograd.grad(item, images, retain_graph=True)
        norms[name] = gradient[image_index].norm(dim=0)
    return norms
