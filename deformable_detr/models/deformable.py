"""What detectors with deformable attention share: several levels, layers that sample.
Chapter pixels_to_boxes."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from deformable_detr.backbones import build_backbone
from deformable_detr.layers.attention import MSDeformAttn
from deformable_detr.layers.dense_attention import DenseAttention
from deformable_detr.layers.position import build_position_encoding
from deformable_detr.losses.scoring import Scoring
from deformable_detr.models.base import BaseDetector, DetectorConfig, xavier
from deformable_detr.models.decoder import Decoder, DecoderLayer
from deformable_detr.models.encoder import Encoder, EncoderLayer
from deformable_detr.models.exact_tokens import ExactTokens
from deformable_detr.models.heads import BoxHead, ClassHead
from deformable_detr.models.tokens import MultiScaleTokens
from deformable_detr.options import option


@dataclass(frozen=True)
class DeformableConfig(DetectorConfig):
    """What decides the shape of every detector with deformable attention."""

    num_levels: int = option(
        4,
        "feature levels: 1 uses the backbone's last map, 2 and 3 its last maps, and each beyond is "
        "a convolution of stride 2 on the one before",
        "num_feature_levels",
        "num_feature_levels",
    )
    num_points: int = option(
        4,
        "points per head and level",
        ("enc_n_points", "dec_n_points"),
        ("encoder_n_points", "decoder_n_points"),
    )
    deformable_stages: int = option(
        0, "of a ResNet's last stages, to 3, how many have deformable convolutions"
    )
    exact_padding: bool = option(
        False,
        "leave padding out to the pixel, of places and of the projections' norms; the official "
        "code does not, which costs AP where images are small or of unlike sizes",
    )

    may_be_zero: ClassVar[tuple[str, ...]] = ("deformable_stages",)  # the backbone checks that


class DeformableDetector(BaseDetector):
    """Backbone, tokens of several levels, encoder, decoder and heads, from a configuration.

    A member replaces the parts that it makes otherwise: `attention`, `cross_attention`,
    `self_attention`, `encoder_layer`, `make_decoder`, `position_encoding`; and says where queries
    come from, in `build_queries` and `queries`.
    """

    def __init__(
        self,
        config: DeformableConfig,
        pretrained_backbone: bool = False,
        scoring: Scoring | None = None,
    ) -> None:
        super().__init__(config, scoring)
        C = config.embed_dim
        self.backbone = self.make_backbone(pretrained_backbone)
        parts = self.backbone.channels, config.num_levels, C, self.position_encoding()
        if config.exact_padding:
            self.neck = ExactTokens(*parts, self.backbone.strides)
        else:
            self.neck = MultiScaleTokens(*parts)
        self.encoder = Encoder([self.encoder_layer(i) for i in range(config.encoder_layers)])
        self.decoder = self.make_decoder(
            [
                DecoderLayer(self.self_attention(), self.cross_attention(), *self.layer_sizes())
                for _ in range(config.decoder_layers)
            ]
        )
        self.build_queries()
        heads = range(self.number_of_heads())
        self.class_heads = nn.ModuleList(
            ClassHead(C, config.num_classes, self.scoring) for _ in heads
        )
        self.box_heads = nn.ModuleList(BoxHead(C) for _ in heads)
        self.reset_parameters()

    def make_backbone(self, pretrained: bool) -> nn.Module:
        """From images to maps; pretrained: with torchvision's ImageNet weights."""
        c = self.config
        return build_backbone(c.backbone, c.dilation, pretrained, c.deformable_stages)

    def layer_sizes(self) -> tuple[int, int, float]:
        """Width, width inside, and dropout of every layer."""
        return self.config.embed_dim, self.config.ffn_dim, self.config.dropout

    def position_encoding(self) -> nn.Module:
        """From a mask (B, H, W) to the codes (B, C, H, W) of places on a level."""
        c = self.config
        return build_position_encoding(c.position, c.embed_dim, c.position_size)

    def encoder_layer(self, index: int) -> nn.Module:
        """The encoder's layer of this number, counted from 0."""
        return EncoderLayer(self.attention(), *self.layer_sizes())

    def attention(self) -> nn.Module:
        """What attends to the tokens, in each layer of encoder and decoder."""
        c = self.config
        return MSDeformAttn(c.embed_dim, c.num_levels, c.num_heads, c.num_points)

    def cross_attention(self) -> nn.Module:
        """What attends to the tokens in each layer of the decoder."""
        return self.attention()

    def self_attention(self) -> nn.Module:
        """What queries attend to each other by, in each layer of the decoder."""
        c = self.config
        return DenseAttention(c.embed_dim, c.num_heads, c.dropout)

    def make_decoder(self, layers: list[nn.Module]) -> Decoder:
        """The decoder of these layers."""
        return Decoder(layers)

    def build_queries(self) -> None:
        """The parameters that queries are made of."""

    def number_of_heads(self) -> int:
        """1, shared by all layers of the decoder, or one for each."""
        return 1

    def reset_parameters(self) -> None:
        """The official initialisation; the backbone's own is left alone."""
        xavier(self.encoder, self.decoder)
        for head in self.box_heads:
            head.reset_last_layer()
        self.reset_queries()
        for module in self.modules():
            if hasattr(module, "sampling_offsets"):  # whatever samples starts from its star
                module.reset_parameters()
        self.neck.reset_parameters()

    def reset_queries(self) -> None:
        """What `build_queries` has made, as it is before training."""
