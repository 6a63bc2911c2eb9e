"""Deformable DETR's names in the official code and in transformers. Chapter published_weights
reads them as a map
of the model."""

import re
from collections.abc import Iterator

from deformable_detr.models.deformable_detr import DeformableDETRConfig
from deformable_detr.weights.foreign import Foreign
from deformable_detr.weights.reading import State
from deformable_detr.weights.renaming import Layout

OFFICIAL = Layout(
    whole=[
        ("backbone.", "backbone.0."),
        ("neck.position.", "backbone.1."),
        ("neck.input_proj.", "input_proj."),
        ("neck.", "transformer."),
        ("query_embed.", "query_embed."),
        ("first_stage.output_norm.", "transformer.enc_output_norm."),
        ("first_stage.output.", "transformer.enc_output."),
        ("first_stage.query_norm.", "transformer.pos_trans_norm."),
        ("first_stage.query.", "transformer.pos_trans."),
        ("decoder.class_heads.", "transformer.decoder.class_embed."),
        ("decoder.box_heads.", "transformer.decoder.bbox_embed."),
        ("class_heads.", "class_embed."),
        ("box_heads.", "bbox_embed."),
        ("", "transformer."),
    ],
    encoder=[
        ("attention.", "self_attn."),
        ("norm.", "norm1."),
        ("ffn.norm.", "norm2."),
        ("ffn.", ""),
    ],
    decoder=[
        ("cross_attention.", "cross_attn."),
        ("cross_norm.", "norm1."),
        ("self_attention.", "self_attn."),
        ("self_norm.", "norm2."),
        ("ffn.norm.", "norm3."),
        ("ffn.", ""),
    ],
)
HUGGINGFACE = Layout(
    whole=[
        ("backbone.body.", "model.backbone.conv_encoder.model."),
        ("neck.position.row_embed.", "model.position_embedding.row_embeddings."),
        ("neck.position.col_embed.", "model.position_embedding.column_embeddings."),
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
    encoder=[
        ("attention.", "self_attn."),
        ("norm.", "self_attn_layer_norm."),
        ("ffn.linear", "fc"),
        ("ffn.norm.", "final_layer_norm."),
    ],
    decoder=[
        ("cross_attention.", "encoder_attn."),
        ("cross_norm.", "encoder_attn_layer_norm."),
        ("self_attention.", "self_attn."),
        ("self_norm.", "self_attn_layer_norm."),
        ("ffn.linear", "fc"),
        ("ffn.norm.", "final_layer_norm."),
    ],
    thirds=True,
)


class ForeignDeformableDETR(Foreign):
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
        """Also of a file without options; but the number of heads."""
        levels = len(state["transformer.level_embed"])
        samples = len(state["transformer.encoder.layers.0.self_attn.attention_weights.bias"])
        return {
            "num_classes": len(state["class_embed.0.bias"]),
            "num_levels": levels,
            "num_points": samples // (levels * options["num_heads"]),
            "refine": any(name.startswith("transformer.decoder.bbox_embed.") for name in state),
            "two_stage": "transformer.enc_output.weight" in state,
        }

    def constants(self, config: DeformableDETRConfig) -> Iterator[str]:
        """Also deformable convolutions, exact padding, and what proposals start from."""
        yield from super().constants(config)
        yield from ("deformable_stages", "exact_padding")
        if config.two_stage:
            yield "anchor_size"

    def refuse_official(self, config: DeformableDETRConfig) -> None:
        """Two levels are only transformers'."""
        if config.num_levels == 2:
            raise ValueError("a model of 2 levels cannot be exported: the official code has none")

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
