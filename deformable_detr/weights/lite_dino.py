"""Lite-DINO's names in the official code. Chapter published_weights."""

from collections.abc import Mapping

from deformable_detr.models.lite_dino import LiteDINOConfig
from deformable_detr.weights.dino import FIRST_STAGE, ForeignDINO
from deformable_detr.weights.reading import State
from deformable_detr.weights.tables import ANCHORS, official_deformable

SMALL_FFN = "transformer.encoder.layers.{}.linear12.weight"


class ForeignLiteDINO(ForeignDINO):
    """Lite-DINO with key-aware attention and small feed-forward parts, as it was published.

    How many levels are fine, no tensor shows: without the file's "args" it is 1, as in the
    published s3ex1 and s3ex3; give fine_levels=2 for s2ex3.
    """

    sign = "transformer.encoder.layers.0.self_attn.query_proj.weight"
    official = official_deformable(
        ANCHORS,
        encoder=[
            ("small_ffn.linear1.", "linear12."),
            ("small_ffn.linear2.", "linear22."),
            ("small_ffn.norm.", "norm22."),
        ],
        first_stage=FIRST_STAGE,
    )

    def shown_by(self, state: State, options: dict) -> dict[str, object]:
        """Also the blocks, each of which ends with a small feed-forward part."""
        layers = range(options["encoder_layers"])
        whole = [i for i in layers if SMALL_FFN.format(i) in state]
        known = {"small_ffn": bool(whole)}
        if whole:
            known["block_layers"] = whole[0] + 1
        return super().shown_by(state, options) | known

    def official_entries(self, config: LiteDINOConfig) -> dict[str, object]:
        """They count the coarse levels."""
        return {"enc_scale": config.num_levels - config.fine_levels}

    def official_options(self, arguments: Mapping, options: dict) -> dict[str, object]:
        """The number of fine levels."""
        if "enc_scale" not in arguments:
            return {}
        return {"fine_levels": options["num_levels"] - arguments["enc_scale"]}

    def refuse_official(self, config: LiteDINOConfig) -> None:
        """Files do not show blocks without small parts, and have projections for nothing where
        weights are linear."""
        super().refuse_official(config)
        for name in ("key_aware", "small_ffn"):
            if not getattr(config, name):
                raise ValueError(f"{name} must be True to be exported, as it is there, got False")
