"""The feed-forward half of a transformer's layer. Chapter pixels_to_boxes builds it in."""

import torch
from torch import Tensor, nn

ROWS = 2048  # tokens whose wide form a processor's caches hold, at the paper's 1,024 numbers


class Dropout(nn.Dropout):
    """torch's, with a mask of one byte for each number also on a CPU, where its own is of four."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape; in training, a number is zero with probability p, else divided by 1 - p."""
        if not self.training or not self.p:
            return x
        return torch.native_dropout(x, self.p, True)[0]


class FeedForward(nn.Module):
    """Two linear layers, added to the input and normalised."""

    def __init__(self, embed_dim: int, ffn_dim: int, dropout: float) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(embed_dim, ffn_dim), nn.Linear(ffn_dim, embed_dim)
        self.norm = nn.LayerNorm(embed_dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C). Hooks see what goes out of linear1 after the relu, and on a CPU
        that infers, in parts of ROWS tokens."""
        whole = torch.is_grad_enabled() or x.device.type != "cpu" or torch.compiler.is_compiling()
        if whole or x.numel() <= ROWS * x.shape[-1]:
            return self._feed(x)
        parts = x.flatten(0, -2).split(ROWS)
        return torch.cat([self._feed(part) for part in parts]).view(x.shape)

    def _feed(self, x: Tensor) -> Tensor:
        # relu after dropout, in place: the same numbers, of which one large map is kept, not two
        inner = self.dropout(self.linear1(x)).relu_()
        return self.norm(x + self.dropout(self.linear2(inner)))
