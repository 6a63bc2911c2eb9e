"""DETR's names in the official code and in transformers. Chapter published_weights."""

from collections.abc import Iterator

from deformable_detr.models.detr import DETRConfig
from deformable_detr.weights.foreign import Foreign
from deformable_detr.weights.reading import State
from deformable_detr.weights.renaming import Layout
from deformable_detr.weights.tables import (
    HUGGINGFACE_BACKBONE,
    HUGGINGFACE_DECODER,
    HUGGINGFACE_ENCODER,
    OFFICIAL_BACKBONE,
    OFFICIAL_ENCODER,
)

OFFICIAL = Layout(
    whole=[
        *OFFICIAL_BACKBONE,
        ("query_embed.", "query_embed."),
        ("class_heads.0.", "class_embed."),
        ("box_heads.0.", "bbox_embed."),
        ("", "transformer."),
    ],
    encoder=OFFICIAL_ENCODER,
    decoder=[
        ("self_attention.", "self_attn."),
        ("self_norm.", "norm1."),
        ("cross_attention.", "multihead_attn."),
        ("cross_norm.", "norm2."),
        ("ffn.norm.", "norm3."),
        ("ffn.", ""),
    ],
)
HUGGINGFACE = Layout(
    whole=[
        *HUGGINGFACE_BACKBONE,
        ("neck.input_proj.", "model.input_projection."),
        ("query_embed.", "model.query_position_embeddings."),
        ("decoder.norm.", "model.decoder.layernorm."),
        ("class_heads.0.", "class_labels_classifier."),
        ("box_heads.0.", "bbox_predictor."),
        ("", "model."),
    ],
    encoder=HUGGINGFACE_ENCODER,
    decoder=HUGGINGFACE_DECODER,
    thirds=True,
)


class ForeignDETR(Foreign):
    """DETR, plain and DC5, on any ResNet."""

    sign = "transformer.decoder.layers.0.multihead_attn.in_proj_weight"
    architecture = "DetrForObjectDetection"
    image_processor = "DetrImageProcessor"
    official = OFFICIAL
    huggingface = HUGGINGFACE

    def shown_by(self, state: State, options: dict) -> dict[str, object]:
        """The last output is no class, but no object."""
        return {"num_classes": len(state["class_embed.bias"]) - 1}

    def constants(self, config: DETRConfig) -> Iterator[str]:
        """Also the softmax."""
        yield from super().constants(config)
        yield "scoring"

    def backbone_maps(self, config: DETRConfig) -> list[int]:
        """All four, as in published files, of which the model takes the last."""
        return [1, 2, 3, 4]

    def options(self, content: dict, options: dict) -> dict[str, object]:
        """None; but with auxiliary_loss theirs is another model, whose decoder's last norm also
        stands between its layers."""
        if content.get("auxiliary_loss"):
            raise ValueError("with auxiliary_loss, transformers' DETR normalises between layers")
        return {}
