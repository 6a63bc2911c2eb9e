"""Deformable DETR's names in the official code and in transformers. Chapter published_weights
reads them as a map of the model."""

import re
from collections.abc import Iterator

from deformable_detr.models.deformable_detr import DeformableDETRConfig
from deformable_detr.weights.deformable import ForeignDeformable
from deformable_detr.weights.reading import State
from deformable_detr.weights.renaming import Layout
from deformable_detr.weights.tables import (
    HUGGINGFACE_BACKBONE,
    HUGGINGFACE_DECODER,
    HUGGINGFACE_ENCODER,
    official_deformable,
)

OFFICIAL = official_deformable([("query_embed.", "query_embed.")])
HUGGINGFACE = Layout(
    whole=[
        *HUGGINGFACE_BACKBONE,
        ("neck.", "model."),
        ("query_embed.", "model.query_position_embeddings."),
        ("first_stage.output_norm.", "model.enc_output_norm."),
        ("first_stage.output.", "model.enc_output."),
        ("first_stage.query_norm.", "model.pos_trans_norm."),
        ("first_stage.query.", "model.pos_trans."),
        ("decoder.class_heads.", "model.decoder.class_embed."),
        ("decoder.box_heads.", "model.decoder.bbox_embed."),
        ("class_heads.", "class_embed."),
        ("box_heads.", "bbox_embed."),
        ("", "model."),
    ],
    encoder=HUGGINGFACE_ENCODER,
    decoder=HUGGINGFACE_DECODER,
    thirds=True,
)


class ForeignDeformableDETR(ForeignDeformable):
    """Deformable DETR and its variants."""

    sign = "transformer.encoder.layers.0.self_attn.sampling_offsets.weight"
    architecture = "DeformableDetrForObjectDetection"
    image_processor = "DeformableDetrImageProcessor"
    official = OFFICIAL
    huggingface = HUGGINGFACE

    def copies(self, name: str, config: DeformableDETRConfig) -> list[str]:
        """They store a head for each layer, also one that all layers share, and those that the
        decoder uses as the decoder's too; the first stage's stand behind the last layer's."""
        name = re.sub(r"^first_stage\.(\w+_head)\.", rf"\1s.{config.decoder_layers}.", name)
        head = re.fullmatch(r"(class_heads|box_heads)\.\d+\.(.+)", name)
        if not head:
            return [name]
        kind, rest = head.groups()
        if not config.refine:
            return [f"{kind}.{layer}.{rest}" for layer in range(config.decoder_layers)]
        decoder_has_it = config.two_stage or kind == "box_heads"
        return [name, f"decoder.{name}"] if decoder_has_it else [name]

    def shown_by(self, state: State, options: dict) -> dict[str, object]:
        """Also the variant."""
        return super().shown_by(state, options) | {
            "refine": any(name.startswith("transformer.decoder.bbox_embed.") for name in state),
            "two_stage": "transformer.enc_output.weight" in state,
        }

    def constants(self, config: DeformableDETRConfig) -> Iterator[str]:
        """Also what proposals start from."""
        yield from super().constants(config)
        if config.two_stage:
            yield "anchor_size"

    def backbone_maps(self, config: DeformableDETRConfig) -> list[int]:
        """The last, one for each level, and three at most."""
        return list(range(max(2, 5 - config.num_levels), 5))

    def entries(self, config: DeformableDETRConfig) -> dict[str, object]:
        """In two stages queries have another name; refinement unties the heads."""
        return {
            "two_stage_num_proposals": config.num_queries,
            "tie_word_embeddings": not config.refine,
            "auxiliary_loss": True,
        }

    def options(self, content: dict, options: dict) -> dict[str, object]:
        """The number of queries in two stages."""
        if options["two_stage"] and "two_stage_num_proposals" in content:
            return {"num_queries": content["two_stage_num_proposals"]}
        return {}

    def complete(self, state: State, content: dict, config: DeformableDETRConfig) -> State:
        """Give each layer its class head where transformers has tied them and saved one for all."""
        if not content.get("tie_word_embeddings", True) or not config.refine or config.two_stage:
            return state
        for kind in ("weight", "bias"):
            names = [f"class_embed.{layer}.{kind}" for layer in range(config.decoder_layers)]
            if names[0] in state and not any(name in state for name in names[1:]):
                state = state | dict.fromkeys(names, state[names[0]])
        return state
