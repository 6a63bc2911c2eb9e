"""DN-DAB-Deformable-DETR's names in the official code. Chapter published_weights."""

from collections.abc import Iterator, Mapping
from typing import ClassVar

from deformable_detr.models.dn_detr import DNDETRConfig
from deformable_detr.weights.deformable import ForeignDeformable
from deformable_detr.weights.reading import State
from deformable_detr.weights.tables import ANCHORS, official_deformable


class ForeignDNDETR(ForeignDeformable):
    """DN-DETR on deformable attention in encoder and decoder, its authors' "++"."""

    sign = "refpoint_embed.weight"
    as_there: ClassVar[Mapping[str, object]] = {"padded_codes": True}
    official = official_deformable(
        [
            *ANCHORS,
            ("decoder.scale.0.", "transformer.decoder.query_scale.layers.0."),
            ("decoder.scale.2.", "transformer.decoder.query_scale.layers.1."),
            ("content_embed.", "tgt_embed."),
            ("anchors.", "refpoint_embed."),
        ]
    )

    def copies(self, name: str, config: DNDETRConfig) -> list[str]:
        """The decoder has the box heads too."""
        return [name, f"decoder.{name}"] if name.startswith("box_heads.") else [name]

    def shown_by(self, state: State, options: dict) -> dict[str, object]:
        """Also the number of queries."""
        queries = {"num_queries": len(state["refpoint_embed.weight"])}
        return super().shown_by(state, options) | queries

    def constants(self, config: DNDETRConfig) -> Iterator[str]:
        """Also what codes of boxes are relative to."""
        yield from super().constants(config)
        yield "padded_codes"
