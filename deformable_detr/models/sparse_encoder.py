"""An encoder that updates a share of the tokens, those that the decoder will read (Roh et al.,
2022). Chapter "Fewer tokens"."""

import dataclasses
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deformable_detr.layers.attention import MSDeformAttn, Sampling
from deformable_detr.layers.reading import tokens_read
from deformable_detr.models.base import Sets, xavier
from deformable_detr.models.encoder import rows
from deformable_detr.models.heads import BoxHead, ClassHead, in_full
from deformable_detr.models.two_stage import TwoStage
from deformable_detr.options import option
from deformable_detr.structures import Output, Predictions, Queries, Tokens


@dataclass(frozen=True)
class SparseOptions:
    """How many tokens are updated, beside the other options of a configuration."""

    rho: float = option(0.1, "share of the tokens that the encoder updates, in (0, 1]", "rho")
    encoder_losses: bool = option(
        True, "layers of the encoder, but the last, predict in training", "use_enc_aux_loss"
    )
    scored_padding: bool = option(
        False,
        "padding has its part in the mean over tokens and in the loss of the scorer, as in the "
        "official code, so that scores depend on it",
    )
    half_cell: bool = option(
        False,
        "what the decoder reads is drawn half a cell to the right and below, as in the official "
        "code",
    )

    def __post_init__(self) -> None:
        if not 0 < self.rho <= 1:
            raise ValueError(f"rho must be in (0, 1], got {self.rho}")
        super().__post_init__()


@dataclass(frozen=True)
class ScoredTokens(Tokens):
    """A memory of which it is known how likely each token is to be read, scores (B, S), how many of
    an image's were updated, keep (B,), and what the layers of a decoder have read so far."""

    scores: Tensor
    keep: Tensor
    read: list[Sampling] = field(default_factory=list)


class Scorer(nn.Module):
    """A number for each token, from half of its own features and the mean of all others' halves."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        C = embed_dim
        self.features = nn.Sequential(nn.LayerNorm(C), nn.Linear(C, C), nn.GELU())
        self.score = nn.Sequential(
            *(nn.Linear(C, C // 2), nn.GELU()),
            *(nn.Linear(C // 2, C // 4), nn.GELU()),
            nn.Linear(C // 4, 1),
        )

    def forward(self, tokens: Tensor, absent: Tensor | None) -> Tensor:
        """tokens: (B, S, C). absent: (B, S), True where a token has no part in the mean; None is
        nowhere. Returns (B, S) logits."""
        own, shared = self.features(tokens).chunk(2, -1)
        if absent is None:
            mean = shared.mean(1, keepdim=True)
        else:
            present = (~absent).to(shared).unsqueeze(-1)
            mean = (shared * present).sum(1, keepdim=True) / present.sum(1, keepdim=True)
        return self.score(torch.cat([own, mean.expand_as(own)], -1)).squeeze(-1)


class ReadingAttention(MSDeformAttn):
    """Deformable attention that leaves in the memory what it has read of it, in training."""

    def attend(self, queries: Queries, memory: ScoredTokens) -> Tensor:
        """As MSDeformAttn's."""
        if not self.training:
            return super().attend(queries, memory)
        update, sampling = super().attend(queries, memory, return_sampling=True)
        memory.read.append(sampling)
        return update


class SparselyEncoded(TwoStage):
    """A two-stage detector whose encoder updates the share rho of an image's tokens, and whose
    decoder can read all.

    A scorer chooses them. It learns to tell the tokens that the decoder reads most, with as many
    called so as are updated. The choice passes no gradient.
    """

    config: SparseOptions

    def __init__(self, config: SparseOptions, pretrained_backbone: bool = False) -> None:
        super().__init__(config, pretrained_backbone)
        C, layers = config.embed_dim, range(config.encoder_layers - 1)
        self.scorer = Scorer(C)
        xavier(self.scorer)
        layers = layers if config.encoder_losses else ()
        self.encoder_class_heads = nn.ModuleList(
            ClassHead(C, config.num_classes, self.scoring) for _ in layers
        )
        self.encoder_box_heads = nn.ModuleList(BoxHead(C) for _ in layers)
        for head in self.encoder_box_heads:
            head.reset_last_layer()

    def cross_attention(self) -> nn.Module:
        """One that is watched."""
        c = self.config
        return ReadingAttention(c.embed_dim, c.num_levels, c.num_heads, c.num_points)

    def encode(self, tokens: Tokens) -> tuple[Tokens, Sets]:
        """The memory with its scores, and in training what the encoder's layers predict."""
        located = dataclasses.replace(tokens, features=tokens.features + tokens.position)
        features, anchors = self.first_stage.prepare(located)
        scores = self.scorer(features, None if self.config.scored_padding else tokens.padding_mask)
        keep = self.number_kept(tokens)
        chosen, kept = choose(scores, tokens.padding_mask, keep, self.config.rho)
        parts = tokens, [chosen] * len(self.encoder.layers), kept
        sets = {}
        if self.training and self.encoder_class_heads:
            *memories, memory = self.encoder(*parts, every_layer=True)
            anchors = rows(anchors, chosen)
            for i, each in enumerate(memories):
                sets[f"encoder_{i}"] = self.predict(i, rows(each.features, chosen), anchors, kept)
        else:
            memory = self.encoder(*parts)
        return ScoredTokens(**vars(memory), scores=scores, keep=keep), sets

    def number_kept(self, tokens: Tokens) -> Tensor:
        """(B,), how many of an image's tokens are updated: one more than the share."""
        total = (~tokens.padding_mask).sum(1)
        return ((total * self.config.rho).long() + 1).minimum(total)

    def predict(self, layer: int, content: Tensor, anchors: Tensor, kept: Tensor) -> Predictions:
        """What a layer of the encoder says of the updated tokens, (B, N, C)."""
        boxes = (in_full(self.encoder_box_heads[layer], content) + anchors).sigmoid()
        return Predictions(self.encoder_class_heads[layer](content), boxes, counted=kept)

    def output(
        self, layers: list[Predictions], queries: Queries, memory: ScoredTokens, others: Sets
    ) -> Output:
        """In training also the scorer's loss."""
        output = super().output(layers, queries, memory, others)
        return dataclasses.replace(output, losses=self.losses(memory)) if self.training else output

    def losses(self, memory: ScoredTokens) -> dict[str, Tensor]:
        """The scorer's cross-entropy, for each image the mean over its tokens."""
        c, absent, scores = self.config, memory.padding_mask, memory.scores
        if c.scored_padding:
            scores = scores.masked_fill(absent, scores.min())
            absent = torch.zeros_like(absent)
        read = tokens_read(memory.read, c.half_cell)
        chosen, kept = choose(read, absent, memory.keep, c.rho)
        wanted = torch.zeros_like(scores).scatter(1, chosen, kept.to(scores))
        loss = F.binary_cross_entropy_with_logits(scores, wanted, reduction="none")
        loss = loss.masked_fill(absent, 0).sum(1) / (~absent).sum(1)
        return {"scorer": loss.mean()}


def choose(scores: Tensor, absent: Tensor, keep: Tensor, rho: float) -> tuple[Tensor, Tensor]:
    """The tokens with the highest scores, (B, N) int64, best first, and which of them count, (B, N)
    bool: an image's first `keep`. scores, absent: (B, S). N: what an image without padding needs,
    and one more, because keep was rounded elsewhere."""
    S = scores.shape[1]
    scores = scores.detach().masked_fill(absent, -torch.inf)
    chosen = scores.topk(min(int(S * rho) + 2, S), dim=1).indices
    return chosen, torch.arange(chosen.shape[1], device=keep.device) < keep.unsqueeze(1)
