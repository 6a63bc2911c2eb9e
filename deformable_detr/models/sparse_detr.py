"""Sparse DETR (Roh et al., 2022). Chapter "Fewer tokens"."""

from dataclasses import dataclass

from deformable_detr.models.selection import TokenStage
from deformable_detr.models.sparse_encoder import SparselyEncoded, SparseOptions
from deformable_detr.models.two_stage import TwoStageConfig


@dataclass(frozen=True)
class SparseDETRConfig(SparseOptions, TwoStageConfig):
    """Everything that decides the detector's shape; the defaults are those of the paper's smallest
    share."""


class SparseDETR(SparselyEncoded):
    """The detector of "Sparse DETR: Efficient End-to-End Object Detection with Learnable Sparsity".

    Its encoder updates few tokens; see `sparse_encoder`. Its queries are tokens, chosen by class,
    as Efficient DETR's. pretrained_backbone loads torchvision's ImageNet weights.
    """

    config: SparseDETRConfig

    def make_first_stage(self) -> TokenStage:
        """One that chooses by class, and passes tokens on."""
        c = self.config
        return TokenStage(c.embed_dim, c.num_classes, self.scoring, c.anchor_size)
