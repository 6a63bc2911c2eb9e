"""DINO's names in the official code. Chapter published_weights."""

import re
from collections.abc import Iterator, Mapping
from typing import ClassVar

from deformable_detr.models.proposed_anchors import ProposedAnchorsConfig
from deformable_detr.weights.deformable import ForeignDeformable
from deformable_detr.weights.reading import State
from deformable_detr.weights.renaming import Renaming
from deformable_detr.weights.tables import ANCHORS, official_deformable

FIRST_STAGE: Renaming = [
    ("first_stage.content.", "transformer.tgt_embed."),
    ("first_stage.class_head.", "transformer.enc_out_class_embed."),
    ("first_stage.box_head.", "transformer.enc_out_bbox_embed."),
]


class ForeignDINO(ForeignDeformable):
    """DINO at 4 and at 5 scales, with mixed or pure selection of queries."""

    sign = "transformer.enc_out_class_embed.weight"
    as_there: ClassVar[Mapping[str, object]] = {"padded_codes": True, "raw_references": True}
    official = official_deformable(ANCHORS, first_stage=FIRST_STAGE)

    def copies(self, name: str, config: ProposedAnchorsConfig) -> list[str]:
        """They store the shared heads for every layer, and all of them as the decoder's too."""
        head = re.fullmatch(r"(class_heads|box_heads)\.0\.(.+)", name)
        if not head:
            return [name]
        kind, rest = head.groups()
        names = [f"{kind}.{layer}.{rest}" for layer in range(config.decoder_layers)]
        return [f"{start}{each}" for start in ("", "decoder.") for each in names]

    def shown_by(self, state: State, options: dict) -> dict[str, object]:
        """Also the scales, and contents of queries where these are learned: as many as queries."""
        projected = sum(
            x.shape[-1] == 1 for n, x in state.items() if re.match(r"input_proj\.\d+\.0\.weight", n)
        )
        contents = state.get("transformer.tgt_embed.weight")
        known = {"pure_selection": contents is None, "stride_4": projected == 4}
        if contents is not None:
            known["num_queries"] = len(contents)
        return super().shown_by(state, options) | known

    def constants(self, config: ProposedAnchorsConfig) -> Iterator[str]:
        """Also how codes of places and boxes are made, and what layers look around."""
        yield from super().constants(config)
        yield from ("anchor_size", "temperature", "padded_codes", "raw_references")
