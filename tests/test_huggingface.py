"""The forward pass against Hugging Face's Deformable DETR with the same random weights."""

import pytest
import torch

from deformable_detr import Batch, DeformableDETR, DeformableDETRConfig
from deformable_detr.formats import file_name, to_huggingface

transformers = pytest.importorskip("transformers", minversion="5.0")

VARIANTS = {
    "base": {},
    "single_scale": {"num_levels": 1},
    "dc5": {"num_levels": 1, "dilation": True},
    "refine": {"refine": True},
    "two_stage": {"refine": True, "two_stage": True},
}


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
        encoder_attention_heads=config.num_heads,
        decoder_attention_heads=config.num_heads,
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
    state, _ = to_huggingface(ours)
    names = {name: file_name(name) for name in theirs.state_dict()}
    assert set(names.values()) == state.keys()
    theirs.load_state_dict({name: state[stored] for name, stored in names.items()})

    batch = Batch.from_images([torch.randn(3, 170, 150), torch.randn(3, 121, 203)])
    with torch.no_grad():
        output = ours(batch)
        expected = theirs(pixel_values=batch.images, pixel_mask=(~batch.mask).long())
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(output.boxes, expected.pred_boxes, atol=1e-4, rtol=0)
    assert output.logits.std() > 0.05  # the weights do say something
