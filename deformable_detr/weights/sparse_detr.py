"""Sparse DETR's names in the official code. Chapter published_weights."""

import re
from collections.abc import Iterator, Mapping
from typing import ClassVar

from deformable_detr.models.sparse_detr import SparseDETRConfig
from deformable_detr.weights.deformable import ForeignDeformable
from deformable_detr.weights.reading import State
from deformable_detr.weights.tables import official_deformable


class ForeignSparseDETR(ForeignDeformable):
    """Sparse DETR, with heads in its encoder or without.

    The share of tokens, rho, no tensor shows: without the file's "args", give it.
    """

    sign = "transformer.enc_mask_predictor.layer1.0.weight"
    as_there: ClassVar[Mapping[str, object]] = {"scored_padding": True}
    official = official_deformable(
        [
            ("scorer.features.", "transformer.enc_mask_predictor.layer1."),
            ("scorer.score.", "transformer.enc_mask_predictor.layer2."),
            ("encoder.class_heads.", "transformer.encoder.class_embed."),
            ("encoder.box_heads.", "transformer.encoder.bbox_embed."),
        ]
    )

    def copies(self, name: str, config: SparseDETRConfig) -> list[str]:
        """All heads stand in one list, which the decoder has too: its own, the first stage's, and
        then the encoder's, which that has once more."""
        D = config.decoder_layers
        name = re.sub(r"^first_stage\.(\w+_head)\.", rf"\1s.{D}.", name)
        head = re.fullmatch(r"(encoder_)?((?:class|box)_heads)\.(\d+)\.(.+)", name)
        if not head:
            return [name]
        encoders, kind, number, rest = head.groups()
        place = int(number) + (D + 1 if encoders else 0)
        names = [f"{kind}.{place}.{rest}", f"decoder.{kind}.{place}.{rest}"]
        return [*names, f"encoder.{kind}.{number}.{rest}"] if encoders else names

    def shown_by(self, state: State, options: dict) -> dict[str, object]:
        """Also whether the encoder predicts."""
        heads = {"encoder_losses": "transformer.encoder.class_embed.0.bias" in state}
        return super().shown_by(state, options) | heads

    def constants(self, config: SparseDETRConfig) -> Iterator[str]:
        """Also what proposals start from, and who has a part in the scores."""
        yield from super().constants(config)
        yield from ("anchor_size", "scored_padding")
