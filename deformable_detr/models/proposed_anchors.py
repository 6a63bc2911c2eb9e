"""Two stages whose proposals become anchors: what DINO has beside its denoising (Zhang et al.,
2023). Chapter "Denoising"."""

from dataclasses import dataclass

from torch import nn

from deformable_detr.backbones import build_backbone
from deformable_detr.layers.position import build_position_encoding
from deformable_detr.losses.scoring import FocalScoring
from deformable_detr.models.anchors import AnchorConfig, TwiceForwardDecoder
from deformable_detr.models.decoder import Decoder
from deformable_detr.models.selection import AnchorStage
from deformable_detr.models.two_stage import TwoStage, TwoStageConfig
from deformable_detr.options import option, with_default


@dataclass(frozen=True)
class ProposedAnchorsConfig(AnchorConfig, TwoStageConfig):
    """What decides the shape of such a detector."""

    num_queries: int = with_default(AnchorConfig, "num_queries", 900)
    temperature: float = option(
        20.0,
        "of the sine codes of places, which others have at 10,000; the lower, the shorter waves",
    )
    stride_4: bool = option(
        False, "a ResNet's map of stride 4 is the first level: with num_levels 5, DINO-5scale"
    )
    pure_selection: bool = option(
        False, "contents are the chosen tokens, as places are; else learned (mixed selection)"
    )
    raw_references: bool = option(
        False,
        "layers look around boxes that are made before the decoder's norm, as in the official "
        "code, where the loss is of those made after it",
    )


class ProposedAnchors(TwoStage):
    """A detector in two stages whose queries are the proposed boxes with learned contents, and
    whose decoder looks forward twice, with one head for all its layers."""

    config: ProposedAnchorsConfig

    def __init__(self, config: ProposedAnchorsConfig, pretrained_backbone: bool = False) -> None:
        super().__init__(config, pretrained_backbone, FocalScoring(loss_weight=1.0))

    def make_backbone(self, pretrained: bool) -> nn.Module:
        """One that may have a finer map."""
        c = self.config
        parts = c.backbone, c.dilation, pretrained, c.deformable_stages
        return build_backbone(*parts, stride_4=c.stride_4)

    def position_encoding(self) -> nn.Module:
        """Pixels counted from 1, as in DETR."""
        c = self.config
        sine = {"temperature": c.temperature, "centre": 1.0}
        return build_position_encoding(c.position, c.embed_dim, c.position_size, **sine)

    def make_decoder(self, layers: list[nn.Module]) -> Decoder:
        """With a norm before the heads."""
        c = self.config
        norm = nn.LayerNorm(c.embed_dim)
        decoder = TwiceForwardDecoder(layers, c.embed_dim, norm, c.padded_codes)
        decoder.raw_references = c.raw_references
        return decoder

    def number_of_heads(self) -> int:
        """All layers of the decoder share one."""
        return 1

    def make_first_stage(self) -> AnchorStage:
        """With a learned content for each query, or none."""
        c = self.config
        parts = c.embed_dim, c.num_classes, self.scoring, c.anchor_size
        return AnchorStage(*parts, contents=0 if c.pure_selection else c.num_queries)
