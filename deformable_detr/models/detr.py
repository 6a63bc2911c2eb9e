"""DETR, the detector with dense attention that the others descend from (Carion et al., 2020)."""

from dataclasses import dataclass

from torch import nn

from deformable_detr.backbones import build_backbone
from deformable_detr.layers.dense_attention import DenseAttention
from deformable_detr.layers.position import build_position_encoding
from deformable_detr.losses.scoring import SCORINGS
from deformable_detr.models.base import BaseDetector, Sets, check_counts, xavier
from deformable_detr.models.decoder import Decoder, DecoderLayer
from deformable_detr.models.encoder import Encoder, EncoderLayer
from deformable_detr.models.heads import BoxHead, ClassHead
from deformable_detr.models.tokens import SingleScaleTokens
from deformable_detr.options import option
from deformable_detr.structures import Queries, Target, Tokens


@dataclass(frozen=True)
class DETRConfig:
    """Everything that decides the detector's shape; the defaults are the paper's base model."""

    num_classes: int = option(91, "classes; the data's, where there is data")
    num_queries: int = option(
        100, "object queries: boxes that an image can have", "num_queries", "num_queries"
    )
    backbone: str = option("resnet50", 'a key of BACKBONES: "small", or a ResNet', "backbone")
    dilation: bool = option(
        False, "the backbone's last stage at stride 16 (DC5)", "dilation", "dilation"
    )
    embed_dim: int = option(256, "C, the width of tokens and queries", "hidden_dim", "d_model")
    num_heads: int = option(
        8, "heads", "nheads", ("encoder_attention_heads", "decoder_attention_heads")
    )
    encoder_layers: int = option(6, "layers of the encoder", "enc_layers", "encoder_layers")
    decoder_layers: int = option(6, "layers of the decoder", "dec_layers", "decoder_layers")
    ffn_dim: int = option(
        2048, "width inside a layer", "dim_feedforward", ("encoder_ffn_dim", "decoder_ffn_dim")
    )
    dropout: float = option(0.1, "in [0, 1)", "dropout", "dropout")
    position: str = option(
        "sine", '"sine" or "learned"', "position_embedding", "position_embedding_type"
    )
    position_size: int = option(50, "rows and columns that learned positions cover")
    scoring: str = option("softmax", '"softmax", with a class for no object, or "focal"')

    def __post_init__(self) -> None:
        if self.scoring not in SCORINGS:
            raise ValueError(f"scoring must be one of {', '.join(SCORINGS)}, got {self.scoring!r}")
        check_counts(self)


class DETR(BaseDetector):
    """The detector of "End-to-End Object Detection with Transformers".

    One map of the backbone, dense attention in encoder and decoder, learned queries whose content
    starts at zero, boxes without references. pretrained_backbone loads torchvision's ImageNet
    weights.
    """

    def __init__(self, config: DETRConfig, pretrained_backbone: bool = False) -> None:
        super().__init__(config, SCORINGS[config.scoring]())
        C = config.embed_dim
        self.backbone = build_backbone(config.backbone, config.dilation, pretrained_backbone)
        position = build_position_encoding(config.position, C, config.position_size, centre=1.0)
        self.neck = SingleScaleTokens(self.backbone.channels, C, position)
        width = C, config.ffn_dim, config.dropout
        self.encoder = Encoder(
            [EncoderLayer(self._attention(), *width) for _ in range(config.encoder_layers)]
        )
        self.decoder = Decoder(
            [
                DecoderLayer(self._attention(), self._attention(), *width)
                for _ in range(config.decoder_layers)
            ],
            norm=nn.LayerNorm(C),
        )
        xavier(self.encoder, self.decoder)
        self.query_embed = nn.Embedding(config.num_queries, C)
        # of all layers
        self.class_heads = nn.ModuleList([ClassHead(C, config.num_classes, self.scoring)])
        self.box_heads = nn.ModuleList([BoxHead(C)])

    def _attention(self) -> nn.Module:
        c = self.config
        return DenseAttention(c.embed_dim, c.num_heads, c.dropout)

    def queries(self, memory: Tokens, targets: list[Target] | None) -> tuple[Queries, Sets]:
        """Learned positions, and contents of zero."""
        position = self.query_embed.weight.expand(len(memory.features), -1, -1)
        return Queries(position.new_zeros(position.shape), position), {}
