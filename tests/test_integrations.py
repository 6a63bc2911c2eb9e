"""Our operator inside other people's models: the same outputs and gradients, and it really ran."""

import copy
import functools
import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from deformable_detr import MSDeformAttn, integrations, ms_deform_attn
from deformable_detr.integrations import (
    MSDeformAttnFunction,
    install_official_names,
    use_in_transformers,
)

transformers = pytest.importorskip("transformers", minversion="5.0")


# Hugging Face: one small random model of each family, built from its own configuration class

DETR = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_queries": 7,
}
RT_DETR = DETR | {
    "encoder_hidden_dim": 32,
    "decoder_in_channels": [32] * 3,
    "num_denoising": 0,
}
MASKS = {
    "hidden_dim": 32,
    "encoder_feedforward_dim": 32,
    "encoder_layers": 1,
    "decoder_layers": 3,
    "num_attention_heads": 2,
    "dim_feedforward": 32,
    "num_queries": 7,
}
PLAIN = {
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_self_attention_heads": 2,
    "decoder_cross_attention_heads": 2,
    "decoder_ffn_dim": 32,
    "num_queries": 7,
    "group_detr": 2,
}
BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 100,
}
TEXT = {"input_ids": torch.tensor([[5, 6, 7, 8]] * 2)}


def resnet(kind):
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4}
    return kind(layer_type="basic", out_indices=[2, 3, 4], **sizes)


def swin(out_indices):
    return transformers.SwinConfig(
        embed_dim=8,
        depths=[1] * 4,
        num_heads=[1, 1, 2, 2],
        window_size=4,
        image_size=64,
        out_indices=out_indices,
    )


def hgnet(out_indices):
    return transformers.HGNetV2Config(
        stem_channels=[3, 8, 8],
        hidden_sizes=[8, 16, 16, 32],
        depths=[1] * 4,
        embedding_size=8,
        stage_in_channels=[8, 8, 16, 16],
        stage_mid_channels=[8] * 4,
        stage_out_channels=[8, 16, 16, 32],
        stage_num_blocks=[1] * 4,
        stage_numb_of_layers=[1] * 4,
        stage_downsample=[False, True, True, True],
        stage_light_block=[False] * 4,
        stage_kernel_size=[3] * 4,
        out_indices=out_indices,
    )


def vit(kind, **more):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return kind(image_size=64, patch_size=16, out_indices=[1, 2], **sizes, **more)


def rt_detr(name, **more):
    config = getattr(transformers, f"{name}Config")(
        backbone_config=resnet(transformers.RTDetrResNetConfig),
        encoder_in_channels=[8, 16, 16],
        **RT_DETR | more,
    )
    return getattr(transformers, f"{name}Model")(config)


def layout(version, out_indices=(2, 3, 4), **more):
    config = getattr(transformers, f"PPDocLayoutV{version}Config")(
        backbone_config=hgnet(list(out_indices)),
        encoder_in_channels=[16, 16, 32],
        **RT_DETR | more,
    )
    return getattr(transformers, f"PPDocLayoutV{version}Model")(config)


def deformable_detr():
    config = transformers.DeformableDetrConfig(
        backbone_config=resnet(transformers.ResNetConfig), **DETR
    )
    return transformers.DeformableDetrModel(config)


def grounding_dino(name):
    config = getattr(transformers, f"{name}Config")(
        backbone_config=swin([2, 3, 4]), text_config=BERT, max_text_len=8, **DETR
    )
    return getattr(transformers, f"{name}Model")(config)


def mask2former():
    config = transformers.Mask2FormerConfig(
        backbone_config=swin([1, 2, 3, 4]), feature_size=32, mask_feature_size=32, **MASKS
    )
    return transformers.Mask2FormerModel(config)


def oneformer():
    text = {"text_encoder_width": 32, "text_encoder_num_layers": 1, "task_seq_len": 5}
    config = transformers.OneFormerConfig(
        backbone_config=swin([1, 2, 3, 4]), conv_dim=32, mask_dim=32, **MASKS | text
    )
    return transformers.OneFormerModel(config)


def lw_detr():
    backbone = vit(transformers.LwDetrViTConfig, pretrain_image_size=64, window_block_indices=[0])
    config = transformers.LwDetrConfig(
        backbone_config=backbone, projector_scale_factors=[1.0], **PLAIN
    )
    return transformers.LwDetrModel(config)


def rf_detr():
    backbone = vit(transformers.RfDetrDinov2Config, num_windows=1)
    return transformers.RfDetrModel(transformers.RfDetrConfig(backbone_config=backbone, **PLAIN))


def deimv2():
    config = transformers.Deimv2Config(
        backbone_config=hgnet([2, 3, 4]),
        encoder_in_channels=[16, 16, 32],
        decoder_n_points=[3, 6, 2],
        **RT_DETR,
    )
    return transformers.Deimv2Model(config)


def omdet():
    text = transformers.CLIPTextConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=100,
        projection_dim=24,
        eos_token_id=2,
        bos_token_id=1,
        max_position_embeddings=16,
    )
    wide = "encoder_hidden_dim decoder_hidden_dim task_encoder_hidden_dim "
    wide += "encoder_dim_feedforward decoder_dim_feedforward"
    text_sizes = ["class_embed_dim", "text_projection_in_dim", "text_projection_out_dim"]
    config = transformers.OmDetTurboConfig(
        backbone_config=swin([2, 3, 4]),
        text_config=text,
        num_queries=7,
        vision_features_channels=[32] * 3,
        encoder_in_channels=[16, 32, 64],
        encoder_attention_heads=2,
        decoder_num_heads=2,
        decoder_num_layers=2,
        encoder_layers=1,
        apply_layernorm_after_vision_backbone=False,
        image_size=64,
        **dict.fromkeys(wide.split(), 32),
        **dict.fromkeys(text_sizes, 24),
    )
    model = transformers.OmDetTurboForObjectDetection(config)
    model.language_backbone.requires_grad_(False)  # it keeps its features from call to call
    return model


OMDET_TEXT = {
    "classes_input_ids": torch.arange(3, 23).view(4, 5),
    "classes_attention_mask": torch.ones(4, 5, dtype=torch.long),
    "classes_structure": torch.tensor([2, 2]),
    "tasks_input_ids": torch.arange(3, 13).view(2, 5),
    "tasks_attention_mask": torch.ones(2, 5, dtype=torch.long),
}
READING = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "coordinate_size": 6,
    "shape_size": 4,
}
FAMILIES = {  # how to build one, how often it calls the operator, and what it takes but images
    "deformable_detr": (deformable_detr, 3, {}),
    "grounding_dino": (lambda: grounding_dino("GroundingDino"), 3, TEXT),
    "mm_grounding_dino": (lambda: grounding_dino("MMGroundingDino"), 3, TEXT),
    "omdet_turbo": (omdet, 2, OMDET_TEXT),
    "rt_detr": (lambda: rt_detr("RTDetr"), 2, {}),
    "rt_detr_v2": (lambda: rt_detr("RTDetrV2"), 2, {}),
    "d_fine": (lambda: rt_detr("DFine", decoder_n_points=[3, 6, 2]), 2, {}),
    "deimv2": (deimv2, 2, {}),
    "lw_detr": (lw_detr, 2, {}),
    "rf_detr": (rf_detr, 2, {}),
    "pp_doclayout_v2": (lambda: layout(2, reading_order_config=READING), 2, {}),
    "pp_doclayout_v3": (lambda: layout(3, (1, 2, 3, 4), x4_feat_dim=8), 2, {}),
    "pp_doclayout_v4": (lambda: layout(4), 2, {}),
    "mask2former": (mask2former, 1, {}),
    "oneformer": (oneformer, 1, {"task_inputs": torch.arange(10).view(2, 5) % 5}),
}


def build(family):
    """A model in evaluation mode and float64, whose offsets and weights depend on the query."""
    torch.manual_seed(0)
    model = FAMILIES[family][0]().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def run(model, family):
    """Every floating output, the gradient of the images and those of the parameters."""
    torch.manual_seed(1)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    model.zero_grad()
    outputs = model(pixel_values=images, **FAMILIES[family][2])
    outputs = [x for x in outputs.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    finite = [x.masked_fill(~x.isfinite(), 0) for x in outputs]
    sum((x * torch.randn_like(x)).sum() for x in finite).backward()
    named = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"outputs": finite, "images": images.grad, "parameters": named}


@pytest.fixture
def calls(monkeypatch):
    """The number of times that our operator ran, by what it was called from."""
    seen = []

    @functools.wraps(ms_deform_attn)
    def counted(*arguments):
        seen.append(arguments)
        return ms_deform_attn(*arguments)

    monkeypatch.setattr(integrations, "ms_deform_attn", counted)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_model_gives_the_same(family, calls):
    model = build(family)
    expected = run(model, family)
    assert not calls
    with use_in_transformers(model) as done:
        result = run(model, family)
        assert done.count
    assert len(calls) == FAMILIES[family][1]
    torch.testing.assert_close(result, expected, rtol=1e-7, atol=1e-9)
    attention = [n for n in expected["parameters"] if "sampling_offsets" in n]
    assert attention
    assert all(expected["parameters"][n].abs().max() > 1e-9 for n in attention)
    run(model, family)  # theirs again
    assert len(calls) == FAMILIES[family][1]


def test_every_family_of_transformers_is_covered():
    """A new transformers may bring another family: then this fails, and FAMILIES grows."""
    files = Path(transformers.models.__path__[0]).glob("*/modeling_*.py")
    operator = re.compile("(def multi_scale_deformable|class MultiScaleDeformable)")
    found = {f.parent.name for f in files if operator.search(f.read_text(encoding="utf-8"))}
    assert found == set(FAMILIES)


def test_replacement_in_float32_and_its_copies(calls):
    model = build("deformable_detr").float()
    images = torch.randn(1, 3, 64, 96)
    expected = model(pixel_values=images).last_hidden_state
    use_in_transformers(model)
    for ours in (model, copy.deepcopy(model)):
        torch.testing.assert_close(
            ours(pixel_values=images).last_hidden_state, expected, rtol=1e-4, atol=1e-5
        )
    assert len(calls) == 6


@pytest.mark.parametrize("family", ["rt_detr", "rt_detr_v2", "d_fine", "mask2former"])
def test_a_second_replacement_changes_nothing(family, calls):
    model = build(family)
    first, second = use_in_transformers(model), use_in_transformers(model)
    run(model, family)
    assert len(calls) == FAMILIES[family][1]
    second.undo()
    first.undo()
    first.undo()
    run(model, family)
    assert len(calls) == FAMILIES[family][1]


def test_undoing_one_model_leaves_another_alone(calls):
    models = build("mask2former"), build("mask2former")
    first, second = (use_in_transformers(model) for model in models)
    assert first.count == second.count == 1
    first.undo()
    run(models[1], "mask2former")
    assert len(calls) == FAMILIES["mask2former"][1]
    second.undo()
    run(models[1], "mask2former")
    assert len(calls) == FAMILIES["mask2former"][1]


def test_a_subclass_of_ones_own_is_found(calls):
    model = build("deformable_detr")
    for module in model.modules():
        if type(module).__name__ == "DeformableDetrMultiscaleDeformableAttention":
            module.__class__ = type("Mine", (type(module),), {"__module__": "mine"})
    with use_in_transformers(model):
        run(model, "deformable_detr")
    assert len(calls) == FAMILIES["deformable_detr"][1]


@pytest.mark.parametrize("name", ["RTDetrV2", "DFine"])
def test_discrete_sampling_is_refused_and_left_alone(name, calls):
    discrete = rt_detr(name, decoder_method="discrete").eval()
    with pytest.raises(ValueError, match=r"samples by the 'discrete' method"):
        use_in_transformers(discrete)
    images = torch.randn(1, 3, 64, 96)
    expected = discrete(pixel_values=images).last_hidden_state
    with use_in_transformers(rt_detr(name)):  # another model of the same file
        torch.testing.assert_close(
            discrete(pixel_values=images).last_hidden_state, expected, rtol=0, atol=0
        )
    assert not calls


def test_a_model_without_the_operator_is_refused():
    with pytest.raises(ValueError, match="Linear has no multi-scale deformable attention"):
        use_in_transformers(torch.nn.Linear(2, 2))


# The official extension


def official_arguments(dtype=torch.float64):
    shapes = torch.tensor([[5, 7], [3, 4]])
    starts = torch.tensor([0, 35])
    torch.manual_seed(0)
    value = torch.randn(3, 47, 2, 4, dtype=dtype)
    locations = torch.rand(3, 6, 2, 2, 3, 2, dtype=dtype)
    weights = torch.rand(3, 6, 2, 2, 3, dtype=dtype)
    return value, shapes, starts, locations, weights


@pytest.fixture
def msda():
    assert integrations.OFFICIAL_NAME not in sys.modules
    yield install_official_names()
    del sys.modules[integrations.OFFICIAL_NAME]


def test_code_written_for_the_official_extension_runs(msda):
    MSDA = importlib.import_module("MultiScaleDeformableAttention")
    assert MSDA is msda is install_official_names()
    assert importlib.util.find_spec("MultiScaleDeformableAttention") is MSDA.__spec__

    class Function(torch.autograd.Function):  # as such code has it
        @staticmethod
        def forward(ctx, value, shapes, starts, locations, weights, step):
            ctx.step = step
            ctx.save_for_backward(value, shapes, starts, locations, weights)
            return MSDA.ms_deform_attn_forward(value, shapes, starts, locations, weights, step)

        @staticmethod
        def backward(ctx, grad):
            v, loc, w = MSDA.ms_deform_attn_backward(*ctx.saved_tensors, grad, ctx.step)
            return v, None, None, loc, w, None

    value, shapes, starts, locations, weights = official_arguments()
    given = [x.requires_grad_() for x in (value, locations, weights)]
    expected = ms_deform_attn(value, [(5, 7), (3, 4)], locations, weights)
    noise = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, given, noise)
    for function in (Function, MSDeformAttnFunction):
        output = function.apply(value, shapes, starts, locations, weights, 64)
        torch.testing.assert_close(output, expected, rtol=0, atol=0)
        torch.testing.assert_close(torch.autograd.grad(output, given, noise), expected_grads)


def test_official_names_refuse_other_level_starts(msda):
    value, shapes, _, locations, weights = official_arguments()
    with pytest.raises(ValueError, match=r"level_start_index must be \[0, 35\].*got \[0, 34\]"):
        msda.ms_deform_attn_forward(
            value, shapes, torch.tensor([0, 34]), locations, weights, im2col_step=64
        )


def test_official_names_leave_a_built_extension_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, integrations.OFFICIAL_NAME, copy)
    with pytest.raises(RuntimeError, match="another MultiScaleDeformableAttention"):
        install_official_names()


# The official module's and mmcv's parameters. mmcv publishes no wheel for a current torch, so the
# names and shapes are written out here, not read from it.


def test_weights_of_mmcv_and_of_the_official_module_load():
    M, L, K, C = 4, 3, 2, 32
    shapes = {
        "sampling_offsets": (M * L * K * 2, C),
        "attention_weights": (M * L * K, C),
        "value_proj": (C, C),
        "output_proj": (C, C),
    }
    state = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    state |= {f"{name}.bias": torch.randn(shape[0]) for name, shape in shapes.items()}
    module = MSDeformAttn(embed_dim=C, num_levels=L, num_heads=M, num_points=K)
    module.load_state_dict(state)
    torch.testing.assert_close(dict(module.state_dict()), state, rtol=0, atol=0)


def test_nothing_stays_replaced_where_one_module_is_laid_out_otherwise(monkeypatch):
    place = "transformers.models.tomorrow"
    monkeypatch.setitem(sys.modules, place, ModuleType(place))
    usual, other = (
        type(f"{name}MultiscaleDeformableAttention", (nn.Module,), {"__module__": place})()
        for name in ("Usual", "Other")
    )
    usual.attn = nn.Identity()
    with pytest.raises(ValueError, match=r"OtherMulti.* laid out as in .* nothing was replaced"):
        use_in_transformers(nn.ModuleList([usual, other]))
    assert "forward" not in vars(usual.attn)
