"""Dense attention, in which every query looks at every key. Chapter 2 builds it."""

from torch import Tensor, nn

from deformable_detr.structures import Queries, Tokens


class DenseAttention(nn.MultiheadAttention):
    """torch's multi-head attention, as layers of encoder and decoder call it.

    Positions are added to queries and keys, never to values (DETR, Appendix A.3).
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0) -> None:
        if embed_dim % num_heads:
            raise ValueError(
                f"embed_dim must be divisible by num_heads, got {embed_dim} and {num_heads}"
            )
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
        """Among the queries themselves, but where their attention_mask forbids it. Returns
        (B, Q, C)."""
        located = queries.content + queries.position
        # half of a tensor of width 2 * C has strides that a batch of 2 has too: torch.export would
        # take that for a rule
        content = queries.content.contiguous()
        update, _ = self(
            located,
            located,
            content,
            attn_mask=queries.attention_mask,
            need_weights=False,
        )
        return update
