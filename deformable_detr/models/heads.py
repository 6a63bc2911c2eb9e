"""What becomes of a query: logits of its class, and a box. Chapter pixels_to_boxes."""

import torch
from torch import Tensor, nn

from deformable_detr.boxes import inverse_sigmoid
from deformable_detr.losses.scoring import Scoring


class ClassHead(nn.Linear):
    """A linear layer from a query to one logit for each output of a scoring.

    class_agnostic: it only has to tell objects from background, by output 0, whatever the others
    are.
    """

    def __init__(
        self, embed_dim: int, num_classes: int, scoring: Scoring, class_agnostic: bool = False
    ) -> None:
        super().__init__(embed_dim, scoring.outputs(num_classes))
        self.class_agnostic = class_agnostic
        scoring.reset_bias(self.bias)


class BoxHead(nn.Module):
    """Three linear layers from a query to its box (A.3)."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(embed_dim, size) for size in (embed_dim,) * 2 + (4,))

    def reset_last_layer(self) -> None:
        """Predict zeros, so that boxes start at their references."""
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def start_small(self) -> None:
        """Boxes from points start with sides of sigmoid(-2) = 0.12, as in the official code; A.4
        says 0.1."""
        nn.init.constant_(self.layers[-1].bias[2:], -2.0)

    def forward(self, queries: Tensor) -> Tensor:
        """(..., C) to (..., 4), to be added to the inverse sigmoid of a reference."""
        for layer in self.layers[:-1]:
            queries = layer(queries).relu()
        return self.layers[-1](queries)


def in_full(head: nn.Module, x: Tensor) -> Tensor:
    """What a head makes of x without autocast: coordinates need more than bfloat16's 8 bits, which
    are four pixels in a thousand."""
    if not torch.is_autocast_enabled(x.device.type):
        return head(x)
    with torch.autocast(x.device.type, enabled=False):
        return head(x.float())


def move(references: Tensor | None, delta: Tensor, eps: float = 1e-5) -> Tensor:
    """Boxes from references and what a head predicts, added before the sigmoid (A.3, A.4).

    references: (..., 2) or (..., 4) in [0, 1]; None: there are none, as in DETR. delta: (..., 4).
    eps: as in `inverse_sigmoid`. Returns (..., 4) cxcywh in (0, 1).
    """
    if references is None:
        return delta.sigmoid()
    start = inverse_sigmoid(references.to(delta), eps)
    if references.shape[-1] == 2:  # a point has no size to start from
        start = torch.cat([start, torch.zeros_like(start)], -1)
    return (start + delta).sigmoid()
