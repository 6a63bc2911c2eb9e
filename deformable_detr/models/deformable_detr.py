"""Deformable DETR: deformable attention over several levels, and its variants (chapters 8, 10)."""

from dataclasses import dataclass

from torch import Tensor, nn

from deformable_detr.backbones import build_backbone
from deformable_detr.layers.attention import MSDeformAttn
from deformable_detr.layers.dense_attention import DenseAttention
from deformable_detr.layers.position import build_position_encoding
from deformable_detr.models.base import BaseDetector, Sets, check_counts, xavier
from deformable_detr.models.decoder import Decoder, DecoderLayer, RefiningDecoder
from deformable_detr.models.encoder import Encoder, EncoderLayer
from deformable_detr.models.heads import BoxHead, ClassHead, in_full
from deformable_detr.models.selection import FirstStage
from deformable_detr.models.tokens import MultiScaleTokens
from deformable_detr.options import option
from deformable_detr.structures import Queries, Target, Tokens


@dataclass(frozen=True)
class DeformableDETRConfig:
    """Everything that decides the detector's shape; the defaults are the paper's base model."""

    num_classes: int = option(91, "classes; the data's, where there is data")
    num_queries: int = option(
        300, "object queries: boxes that an image can have", "num_queries", "num_queries"
    )
    backbone: str = option("resnet50", 'a key of BACKBONES: "small", or a ResNet', "backbone")
    dilation: bool = option(
        False, "the backbone's last stage at stride 16 (DC5)", "dilation", "dilation"
    )
    num_levels: int = option(
        4,
        "feature levels: 1 uses the backbone's last map, 2 and 3 its last maps, and each beyond is "
        "a convolution of stride 2 on the one before",
        "num_feature_levels",
        "num_feature_levels",
    )
    embed_dim: int = option(256, "C, the width of tokens and queries", "hidden_dim", "d_model")
    num_heads: int = option(
        8, "heads", "nheads", ("encoder_attention_heads", "decoder_attention_heads")
    )
    num_points: int = option(
        4,
        "points per head and level",
        ("enc_n_points", "dec_n_points"),
        ("encoder_n_points", "decoder_n_points"),
    )
    encoder_layers: int = option(6, "layers of the encoder", "enc_layers", "encoder_layers")
    decoder_layers: int = option(6, "layers of the decoder", "dec_layers", "decoder_layers")
    ffn_dim: int = option(
        1024, "width inside a layer", "dim_feedforward", ("encoder_ffn_dim", "decoder_ffn_dim")
    )
    dropout: float = option(0.1, "in [0, 1)", "dropout", "dropout")
    position: str = option(
        "sine", '"sine" or "learned"', "position_embedding", "position_embedding_type"
    )
    refine: bool = option(False, "iterative box refinement", "with_box_refine", "with_box_refine")
    two_stage: bool = option(
        False, "queries from the encoder's proposals; needs refine", "two_stage", "two_stage"
    )
    anchor_size: float = option(
        0.05,
        "side, as a part of the image's, of the boxes that proposals start from on the finest "
        "level; it doubles on each next one. 0.05 suits stride 8 and images of 800 pixels",
    )
    deformable_stages: int = option(
        0, "of a ResNet's last stages, to 3, how many have deformable convolutions"
    )
    position_size: int = option(50, "rows and columns that learned positions cover")

    def __post_init__(self) -> None:
        if self.two_stage and not self.refine:
            raise ValueError("two_stage needs refine=True: the proposals are boxes to be refined")
        check_counts(self, may_be_zero=("deformable_stages",))  # the backbone checks that


class DeformableDETR(BaseDetector):
    """The detector of "Deformable DETR: Deformable Transformers for End-to-End Object Detection".

    Variants by config: single-scale (num_levels=1), DC5, refinement, two-stage. pretrained_backbone
    loads torchvision's ImageNet weights.
    """

    def __init__(self, config: DeformableDETRConfig, pretrained_backbone: bool = False) -> None:
        super().__init__(config)
        C = config.embed_dim
        self.backbone = build_backbone(
            config.backbone, config.dilation, pretrained_backbone, config.deformable_stages
        )
        position = build_position_encoding(config.position, C, config.position_size)
        self.neck = MultiScaleTokens(self.backbone.channels, config.num_levels, C, position)
        width = C, config.ffn_dim, config.dropout
        self.encoder = Encoder(
            [EncoderLayer(self._attention(), *width) for _ in range(config.encoder_layers)]
        )
        kind = RefiningDecoder if config.refine else Decoder
        self.decoder = kind(
            [
                DecoderLayer(
                    DenseAttention(C, config.num_heads, config.dropout), self._attention(), *width
                )
                for _ in range(config.decoder_layers)
            ]
        )
        if config.two_stage:
            self.first_stage = FirstStage(C, config.num_classes, self.scoring, config.anchor_size)
        else:
            self.query_embed = nn.Embedding(config.num_queries, 2 * C)  # position, then content
            self.reference_points = nn.Linear(C, 2)
        # one head for all layers, or with refinement one each
        heads = config.decoder_layers if config.refine else 1
        self.class_heads = nn.ModuleList(
            ClassHead(C, config.num_classes, self.scoring) for _ in range(heads)
        )
        self.box_heads = nn.ModuleList(BoxHead(C) for _ in range(heads))
        self.reset_parameters()

    def _attention(self) -> nn.Module:
        c = self.config
        return MSDeformAttn(c.embed_dim, c.num_levels, c.num_heads, c.num_points)

    def reset_parameters(self) -> None:
        """The official initialisation; the backbone's own is left alone."""
        xavier(self.encoder, self.decoder)
        if self.config.two_stage:
            self.first_stage.reset_parameters()
        else:
            xavier(self.reference_points)
            nn.init.zeros_(self.reference_points.bias)
        for module in self.modules():
            if isinstance(module, MSDeformAttn):
                module.reset_parameters()
        self.neck.reset_parameters()
        for head in self.box_heads:
            head.reset_last_layer()
        # from a point: start with boxes of sigmoid(-2) = 0.12, as the official code; A.4 says 0.1
        if not self.config.two_stage:
            nn.init.constant_(self.box_heads[0].layers[-1].bias[2:], -2.0)

    def queries(self, memory: Tokens, targets: list[Target] | None) -> tuple[Queries, Sets]:
        """Learned ones, or in two stages those made of the best proposals."""
        if self.config.two_stage:
            queries, proposals = self.first_stage(memory, self.config.num_queries)
            return queries, {"first": proposals}
        position, content = self.query_embed.weight.chunk(2, dim=-1)
        references = in_full(self.reference_points, position).sigmoid()
        return Queries(*(_for_each(memory, x) for x in (content, position, references))), {}


def _for_each(memory: Tokens, x: Tensor) -> Tensor:
    """The same (Q, C) for each image of a batch."""
    return x.expand(len(memory.features), -1, -1)
