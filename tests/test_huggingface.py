"""The forward pass against Hugging Face's Deformable DETR with the same random weights."""

import pytest
import torch

from deformable_detr import Batch, DeformableDETR, DeformableDETRConfig

transformers = pytest.importorskip("transformers", minversion="5.0")

VARIANTS = {
    "base": {},
    "single_scale": {"num_levels": 1},
    "dc5": {"num_levels": 1, "dilation": True},
    "refine": {"refine": True},
    "two_stage": {"refine": True, "two_stage": True},
}
RENAMED = [  # ours, theirs; the first that fits a name's start is applied
    ("backbone.body.", "model.backbone.model."),
    ("query_embed.", "model.query_position_embeddings."),
    ("first_stage.output_norm.", "model.enc_output_norm."),
    ("first_stage.output.", "model.enc_output."),
    ("first_stage.query_norm.", "model.pos_trans_norm."),
    ("first_stage.query.", "model.pos_trans."),
    ("class_heads.", "class_embed."),
    ("box_heads.", "bbox_embed."),
    ("", "model."),
]
LAYER = {
    "encoder": [
        ("attention.", "self_attn."),
        ("norm.", "self_attn_layer_norm."),
        ("ffn.linear1.", "mlp.fc1."),
        ("ffn.linear2.", "mlp.fc2."),
        ("ffn.norm.", "final_layer_norm."),
    ],
    "decoder": [
        ("cross_attention.", "encoder_attn."),
        ("cross_norm.", "encoder_attn_layer_norm."),
        ("self_norm.", "self_attn_layer_norm."),
        ("self_attention.out_proj.", "self_attn.o_proj."),
        ("ffn.linear1.", "mlp.fc1."),
        ("ffn.linear2.", "mlp.fc2."),
        ("ffn.norm.", "final_layer_norm."),
    ],
}


def replace_start(name, table):
    for ours, theirs in table:
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    return name


def to_huggingface(state, config):
    """Our state dict under Hugging Face's names (transformers 5, in memory)."""
    result = {}
    for name, tensor in state.items():
        kind = name.split(".")[0]
        if kind in LAYER:
            _, _, index, rest = name.split(".", 3)
            prefix = f"model.{kind}.layers.{index}."
            if rest.startswith("self_attention.in_proj_"):
                suffix = rest.removeprefix("self_attention.in_proj_")
                for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                    result[f"{prefix}self_attn.{part}_proj.{suffix}"] = piece
            else:
                result[prefix + replace_start(rest, LAYER[kind])] = tensor
        else:
            result[replace_start(name, RENAMED)] = tensor
    if not config.refine:  # they keep one head for each layer
        for name in [n for n in result if n.startswith(("class_embed.0", "bbox_embed.0"))]:
            head, _, rest = name.split(".", 2)
            for layer in range(1, config.decoder_layers):
                result[f"{head}.{layer}.{rest}"] = result[name]
    kept_twice = ("bbox_embed.",) if config.refine else ()
    kept_twice += ("class_embed.",) if config.two_stage else ()
    for name in [n for n in result if n.startswith(kept_twice)]:
        result[f"model.decoder.{name}"] = result[name]
    return result


def randomise(model, seed=0):
    """Weights that exercise everything: no zero biases, no uniform attention, no uniform norms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif "norm" in name or "bn" in name or "downsample.1" in name:
                noise = torch.randn(tensor.shape, generator=generator) * 0.1
                tensor.copy_(noise + (1 if name.endswith("weight") else 0))
            elif tensor.ndim > 1:
                tensor.copy_(tensor + torch.randn(tensor.shape, generator=generator) * 0.02)
            else:
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)


def huggingface_model(config):
    backbone = transformers.TimmBackboneConfig(
        backbone=config.backbone,
        use_pretrained_backbone=False,
        freeze_batch_norm_2d=False,
        out_indices=[4] if config.num_levels == 1 else [2, 3, 4],
        **({"output_stride": 16} if config.dilation else {}),
    )
    theirs = transformers.DeformableDetrConfig(
        backbone_config=backbone,
        dilation=config.dilation,
        num_labels=config.num_classes,
        num_queries=config.num_queries,
        num_feature_levels=config.num_levels,
        d_model=config.embed_dim,
        encoder_layers=config.encoder_layers,
        decoder_layers=config.decoder_layers,
        encoder_ffn_dim=config.ffn_dim,
        decoder_ffn_dim=config.ffn_dim,
        encoder_n_points=config.num_points,
        decoder_n_points=config.num_points,
        with_box_refine=config.refine,
        two_stage=config.two_stage,
        two_stage_num_proposals=config.num_queries,
        auxiliary_loss=True,
        tie_word_embeddings=False,
    )
    return transformers.DeformableDetrForObjectDetection(theirs).eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_weights_same_output(variant):
    torch.manual_seed(0)
    config = DeformableDETRConfig(num_classes=17, num_queries=50, **VARIANTS[variant])
    ours = DeformableDETR(config).eval()
    randomise(ours)
    theirs = huggingface_model(config)
    state = to_huggingface(ours.state_dict(), config)
    theirs.load_state_dict(state, strict=True)

    batch = Batch.from_images([torch.randn(3, 170, 150), torch.randn(3, 121, 203)])
    with torch.no_grad():
        output = ours(batch)
        expected = theirs(pixel_values=batch.images, pixel_mask=(~batch.mask).long())
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(output.boxes, expected.pred_boxes, atol=1e-4, rtol=0)
    assert output.logits.std() > 0.05  # the weights do say something
