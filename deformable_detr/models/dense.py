"""What detectors with dense attention share: one map, layers in which every query looks at every
token, learned queries. Chapter pixels_to_boxes."""

from dataclasses import dataclass

from torch import nn

from deformable_detr.backbones import build_backbone
from deformable_detr.layers.dense_attention import DenseAttention
from deformable_detr.layers.position import build_position_encoding
from deformable_detr.losses.scoring import SCORINGS
from deformable_detr.models.base import (
    BaseDetector,
    DetectorConfig,
    Sets,
    for_each_image,
    xavier,
)
from deformable_detr.models.decoder import Decoder, DecoderLayer
from deformable_detr.models.encoder import Encoder, EncoderLayer
from deformable_detr.models.heads import BoxHead, ClassHead
from deformable_detr.models.tokens import SingleScaleTokens
from deformable_detr.options import option, with_default
from deformable_detr.structures import Queries, Target, Tokens


@dataclass(frozen=True)
class DenseConfig(DetectorConfig):
    """What decides the shape of every detector with dense attention."""

    num_queries: int = with_default(DetectorConfig, "num_queries", 100)
    ffn_dim: int = with_default(DetectorConfig, "ffn_dim", 2048)
    scoring: str = option("softmax", '"softmax", with a class for no object, or "focal"')

    def __post_init__(self) -> None:
        if self.scoring not in SCORINGS:
            raise ValueError(f"scoring must be one of {', '.join(SCORINGS)}, got {self.scoring!r}")
        super().__post_init__()


class DenseDetector(BaseDetector):
    """One map of the backbone, dense attention in encoder and decoder, learned queries whose
    content starts at zero, boxes without references."""

    def __init__(self, config: DenseConfig, pretrained_backbone: bool = False) -> None:
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
        self.query_embed = nn.Embedding(self.learned_queries(), C)
        # of all layers
        self.class_heads = nn.ModuleList([ClassHead(C, config.num_classes, self.scoring)])
        self.box_heads = nn.ModuleList([BoxHead(C)])

    def _attention(self) -> nn.Module:
        c = self.config
        return DenseAttention(c.embed_dim, c.num_heads, c.dropout)

    def queries(self, memory: Tokens, targets: list[Target] | None) -> tuple[Queries, Sets]:
        """Learned positions, and contents of zero."""
        (position,) = for_each_image(memory, self.query_embed.weight)
        return Queries(position.new_zeros(position.shape), position), {}
