"""Names that the tables of several models have in common. Chapter published_weights."""

from deformable_detr.weights.renaming import Layout, Renaming

# The official codes: DETR's, and what grew from it.

OFFICIAL_BACKBONE = [
    ("backbone.", "backbone.0."),
    ("neck.position.", "backbone.1."),
    ("neck.input_proj.", "input_proj."),
]
OFFICIAL_ENCODER = [
    ("attention.", "self_attn."),
    ("norm.", "norm1."),
    ("ffn.norm.", "norm2."),
    ("ffn.", ""),
]


def official_deformable(
    whole: Renaming, encoder: Renaming | None = None, first_stage: Renaming | None = None
) -> Layout:
    """The table of a code that began as the official "Deformable DETR"; the arguments are what its
    model has beside that one's names."""
    return Layout(
        whole=[
            *OFFICIAL_BACKBONE,
            *whole,
            ("neck.", "transformer."),
            *(first_stage or ()),
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
        encoder=[*(encoder or ()), *OFFICIAL_ENCODER],
        decoder=[
            ("cross_attention.", "cross_attn."),
            ("cross_norm.", "norm1."),
            ("self_attention.", "self_attn."),
            ("self_norm.", "norm2."),
            ("ffn.norm.", "norm3."),
            ("ffn.", ""),
        ],
    )


# Positions made from boxes, and a table of classes: DN-DETR's code, and what grew from that.

ANCHORS = [
    ("decoder.place.0.", "transformer.decoder.ref_point_head.layers.0."),
    ("decoder.place.2.", "transformer.decoder.ref_point_head.layers.1."),
    ("label_embed.", "label_enc."),
]

# Hugging Face's transformers.

HUGGINGFACE_BACKBONE = [
    ("backbone.body.", "model.backbone.conv_encoder.model."),
    ("neck.position.row_embed.", "model.position_embedding.row_embeddings."),
    ("neck.position.col_embed.", "model.position_embedding.column_embeddings."),
]
HUGGINGFACE_ENCODER = [
    ("attention.", "self_attn."),
    ("norm.", "self_attn_layer_norm."),
    ("ffn.linear", "fc"),
    ("ffn.norm.", "final_layer_norm."),
]
HUGGINGFACE_DECODER = [
    ("self_attention.", "self_attn."),
    ("self_norm.", "self_attn_layer_norm."),
    ("cross_attention.", "encoder_attn."),
    ("cross_norm.", "encoder_attn_layer_norm."),
    ("ffn.linear", "fc"),
    ("ffn.norm.", "final_layer_norm."),
]
