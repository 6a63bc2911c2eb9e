"""Two stages: every token proposes a box, and the best become the queries. Chapter refinement."""

import math

import torch
from torch import Tensor, nn

from deformable_detr.layers.position import sine_embedding
from deformable_detr.losses.scoring import Scoring
from deformable_detr.models.base import for_each_image
from deformable_detr.models.encoder import rows
from deformable_detr.models.heads import BoxHead, ClassHead, in_full
from deformable_detr.models.tokens import token_centres
from deformable_detr.ops.sizes import smaller
from deformable_detr.structures import Predictions, Queries, Tokens


class FirstStage(nn.Module):
    """The proposals of all tokens, and the queries made of the best (Appendix A.4).

    A member of the family changes `score`, by which tokens are chosen, `make_queries`, with
    `build_queries` for what they are made by, and `supervised`, which proposals are trained.
    """

    class_agnostic = True  # its head tells objects from background only

    def __init__(
        self, embed_dim: int, num_classes: int, scoring: Scoring, anchor_size: float = 0.05
    ) -> None:
        super().__init__()
        self.embed_dim, self.anchor_size = embed_dim, anchor_size
        self.output = nn.Linear(embed_dim, embed_dim)
        self.output_norm = nn.LayerNorm(embed_dim)
        self.build_queries()
        self.class_head = ClassHead(embed_dim, num_classes, scoring, self.class_agnostic)
        self.box_head = BoxHead(embed_dim)

    def build_queries(self) -> None:
        """The parameters that queries are made by."""
        self.query = nn.Linear(2 * self.embed_dim, 2 * self.embed_dim)
        self.query_norm = nn.LayerNorm(2 * self.embed_dim)

    def reset_parameters(self) -> None:
        """The official initialisation."""
        nn.init.xavier_uniform_(self.output.weight)
        self.reset_queries()
        self.box_head.reset_last_layer()

    def reset_queries(self) -> None:
        """What `build_queries` has made, as it is before training."""
        nn.init.xavier_uniform_(self.query.weight)

    def forward(self, memory: Tokens, num_queries: int) -> tuple[Queries, Predictions]:
        """The queries that the decoder starts from, and the proposals that are trained.

        Q is num_queries, or the number of tokens where a small image has fewer. The references are
        the proposed boxes, (B, Q, 4), detached.
        """
        proposals = self.propose(memory)
        scores = self.score(proposals.logits, memory)
        chosen = scores.topk(smaller(num_queries, scores.shape[1]), dim=1).indices
        references = rows(proposals.boxes.detach(), chosen)
        queries = self.make_queries(references, chosen, memory)
        return queries, self.supervised(proposals, chosen)

    def propose(self, memory: Tokens) -> Predictions:
        """The class logits (B, S, outputs) and boxes (B, S, 4) cxcywh of all tokens.

        A token that is padding, or whose anchor comes within 1 % of the border, is blanked: its
        box is (1, 1, 1, 1).
        """
        features, start = self.prepare(memory)
        boxes = (in_full(self.box_head, features) + start).sigmoid()
        return Predictions(
            self.class_head(features), boxes, class_agnostic=self.class_head.class_agnostic
        )

    def prepare(self, memory: Tokens) -> tuple[Tensor, Tensor]:
        """What proposals are made of: features (B, S, C), and the logits (B, S, 4) of anchors."""
        anchors, usable = token_anchors(memory, self.anchor_size)
        start = (anchors / (1 - anchors)).log().masked_fill(~usable.unsqueeze(-1), torch.inf)
        return self.project(memory.features, usable), start

    def project(self, features: Tensor, usable: Tensor) -> Tensor:
        """Tokens (B, N, C) as the heads want them, blank where they are not usable, (B, N)."""
        return self.output_norm(self.output(features.masked_fill(~usable.unsqueeze(-1), 0)))

    def score(self, logits: Tensor, memory: Tokens) -> Tensor:
        """(B, S), by which tokens are chosen: here the logit of class 0."""
        return logits[..., 0]

    def supervised(self, proposals: Predictions, chosen: Tensor) -> Predictions:
        """Those proposals that training judges: here all of them."""
        return proposals

    def make_queries(self, references: Tensor, chosen: Tensor, memory: Tokens) -> Queries:
        """Queries whose content and position come from the sine code of their boxes.

        references: (B, Q, 4). chosen: (B, Q) int64, the tokens that proposed them.
        """
        waves = sine_embedding(references * 2 * math.pi, self.embed_dim // 2)  # (B, Q, 2 * C)
        waves = waves.to(memory.features.dtype)  # not the weights', which may be quantised
        position, content = self.query_norm(self.query(waves)).chunk(2, dim=-1)
        return Queries(content, position, references)


class ClassStage(FirstStage):
    """A first stage that knows classes: tokens are chosen by their best one (Efficient DETR)."""

    class_agnostic = False

    def score(self, logits: Tensor, memory: Tokens) -> Tensor:
        """The best class's logit; tokens that are not usable come last, so that their number, which
        depends on the padding, decides nothing."""
        _, usable = token_anchors(memory, self.anchor_size)
        return logits.max(-1).values.masked_fill(~usable, -torch.inf)


class TokenStage(ClassStage):
    """The chosen tokens themselves become queries, with their gradient; their boxes' sine code
    becomes the position."""

    def build_queries(self) -> None:
        """From the code to a position."""
        self.query = nn.Linear(2 * self.embed_dim, self.embed_dim)
        self.query_norm = nn.LayerNorm(self.embed_dim)

    def make_queries(self, references: Tensor, chosen: Tensor, memory: Tokens) -> Queries:
        """Tokens as they leave the encoder, not projected."""
        waves = sine_embedding(references * 2 * math.pi, self.embed_dim // 2)  # (B, Q, 2 * C)
        position = self.query_norm(self.query(waves.to(memory.features.dtype)))
        return Queries(rows(memory.features, chosen), position, references)


class AnchorStage(ClassStage):
    """The chosen tokens' boxes become queries (DINO, section 3.4), whose positions the decoder
    makes. Only the chosen are trained.

    contents: how many learned contents there are, one for each rank, which is mixed query
    selection; 0 is pure query selection, in which a projected token becomes the content, detached.
    """

    def __init__(self, *arguments: object, contents: int = 0) -> None:
        super().__init__(*arguments)
        self.content = nn.Embedding(contents, self.embed_dim) if contents else None

    def build_queries(self) -> None:
        """Boxes are all that is needed."""

    def reset_queries(self) -> None:
        """Contents are drawn from a normal distribution, as torch does."""

    def make_queries(self, references: Tensor, chosen: Tensor, memory: Tokens) -> Queries:
        """Of small images with few tokens, the first ranks."""
        if self.content is not None:
            content = self.content.weight[: chosen.shape[1]]
            return Queries(*for_each_image(memory, content), None, references)
        _, usable = token_anchors(memory, self.anchor_size)
        tokens = rows(memory.features, chosen)
        content = self.project(tokens, usable.gather(1, chosen))
        return Queries(content.detach(), None, references)

    def supervised(self, proposals: Predictions, chosen: Tensor) -> Predictions:
        """The chosen."""
        return Predictions(rows(proposals.logits, chosen), rows(proposals.boxes, chosen))


def token_anchors(tokens: Tokens, size: float = 0.05) -> tuple[Tensor, Tensor]:
    """The box that each token starts from: its centre, and size * 2^l as its sides on level l.

    Returns (B, S, 4) cxcywh relative to the image without its padding, and (B, S), True where the
    token is no padding and all four numbers lie in (0.01, 0.99).
    """
    centres = token_centres(tokens.spatial_shapes, tokens.valid_ratios)
    sizes = [
        centres.new_full((height * width, 2), size * 2**level)
        for level, (height, width) in enumerate(tokens.spatial_shapes)
    ]
    anchors = torch.cat([centres, torch.cat(sizes).expand_as(centres)], -1)
    inside = ((anchors > 0.01) & (anchors < 0.99)).all(-1)
    return anchors, inside & ~tokens.padding_mask
