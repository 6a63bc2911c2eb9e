"""Dense attention, in which every query looks at every key. Chapter attention builds it."""

import torch
from torch import Tensor, nn

from deformable_detr.structures import Queries, Tokens


class DenseAttention(nn.MultiheadAttention):
    """torch's multi-head attention, as layers of encoder and decoder call it.

    Positions are added to queries and keys, never to values (DETR, Appendix A.3).
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0) -> None:
        check_heads(embed_dim, num_heads)
        super().__init__(embed_dim, num_heads, dropout=dropout, batch_first=True)

    def attend(self, queries: Queries, memory: Tokens) -> Tensor:
        """From queries to all tokens that are no padding. Returns (B, Q, C)."""
        update, _ = self(
            queries.content + queries.position,
            memory.features + memory.position,
            memory.features,
            key_padding_mask=memory.padding_mask,
            need_weights=False,
        )
        return update

    def mix(self, queries: Queries) -> Tensor:
        """Among the queries themselves, each group of them by itself, but where their masks forbid
        it. Returns (B, Q, C)."""
        mask, located = queries.attention_mask, queries.content + queries.position
        # half of a tensor of width 2 * C has strides that a batch of 2 has too: torch.export would
        # take that for a rule
        content = queries.content.contiguous()
        if queries.groups > 1 and mask is None:  # beside the images, as if each were one
            folded = len(content) * queries.groups, -1, content.shape[2]
            content, located = content.reshape(folded), located.reshape(folded)
        elif queries.groups > 1:
            mask = mask | between_groups(queries)
        update, _ = self(
            located,
            located,
            content,
            attn_mask=mask,
            key_padding_mask=queries.padding_mask,
            need_weights=False,
        )
        return update.reshape(queries.content.shape)


def check_heads(embed_dim: int, num_heads: int) -> None:
    """ValueError unless the width can be shared out among the heads."""
    if num_heads < 1 or embed_dim % num_heads:
        raise ValueError(
            f"embed_dim must be divisible by num_heads, got {embed_dim} and {num_heads}"
        )


def between_groups(queries: Queries) -> Tensor:
    """(Q, Q) bool, True where two queries are of different groups; denoising ones are of none."""
    start = queries.denoising.size if queries.denoising else 0
    total = queries.content.shape[1]
    group = torch.arange(total - start, device=queries.content.device)
    group = group // ((total - start) // queries.groups)
    apart = group.new_zeros(total, total, dtype=torch.bool)
    apart[start:, start:] = group[:, None] != group
    return apart
