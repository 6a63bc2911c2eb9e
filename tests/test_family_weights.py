"""Official files of DINO, DN-DAB-Deformable-DETR, Sparse DETR and Lite-DINO, both ways: their names
and shapes, written down here from their codes."""

import argparse
import dataclasses

import pytest
import torch
import torchvision
from torchvision.ops.misc import FrozenBatchNorm2d

from deformable_detr.models import (
    DINO,
    DNDETR,
    DeformableDETR,
    DINOConfig,
    DNDETRConfig,
    LiteDINO,
    LiteDINOConfig,
    SparseDETR,
    SparseDETRConfig,
    build_model,
)
from deformable_detr.weights.formats import official_arguments, to_huggingface, to_official
from deformable_detr.weights.published import load_pretrained, save_pretrained
from tests.members import build, make_batch

C, M, K, F, N, Q, LAYERS, CHANNELS = 32, 4, 2, 24, 5, 9, 3, (64, 128, 256, 512)
ARGUMENTS = {"backbone": "resnet18", "nheads": M, "num_queries": Q, "rho": 0.3, "enc_scale": 2}


def linear(name, outputs, inputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name):
    return {f"{name}.weight": (C,), f"{name}.bias": (C,)}


def box_head(name):
    return {
        key: shape
        for i, width in enumerate((C, C, 4))
        for key, shape in linear(f"{name}.layers.{i}", width, C).items()
    }


def sampling(name, levels, query_proj=False):
    points = M * levels * K
    last = linear(f"{name}.query_proj", C, C) if query_proj else {}
    last = last or linear(f"{name}.attention_weights", points, C)
    found = linear(f"{name}.sampling_offsets", 2 * points, C) | last
    return found | linear(f"{name}.value_proj", C, C) | linear(f"{name}.output_proj", C, C)


def transformer(levels=4, maps=3, query_proj=False):
    """Backbone, projections, and the layers of both halves."""
    with torch.device("meta"):
        resnet = torchvision.models.resnet18(norm_layer=FrozenBatchNorm2d).state_dict()
    names = {f"backbone.0.body.{n}": tuple(x.shape) for n, x in resnet.items() if n[:2] != "fc"}
    names["transformer.level_embed"] = (levels, C)
    for i in range(levels):
        kernel = (1, 1) if i < maps else (3, 3)
        inputs = CHANNELS[4 - maps + i] if i < maps else CHANNELS[-1] if i == maps else C
        names |= {f"input_proj.{i}.0.weight": (C, inputs, *kernel), f"input_proj.{i}.0.bias": (C,)}
        names |= norm(f"input_proj.{i}.1")
    for i in range(LAYERS):
        layer = f"transformer.encoder.layers.{i}"
        names |= sampling(f"{layer}.self_attn", levels, query_proj)
        names |= linear(f"{layer}.linear1", F, C) | linear(f"{layer}.linear2", C, F)
        names |= norm(f"{layer}.norm1") | norm(f"{layer}.norm2")
        layer = f"transformer.decoder.layers.{i}"
        names |= sampling(f"{layer}.cross_attn", levels, query_proj)
        names |= {f"{layer}.self_attn.in_proj_weight": (3 * C, C)}
        names |= {f"{layer}.self_attn.in_proj_bias": (3 * C,)}
        names |= linear(f"{layer}.self_attn.out_proj", C, C)
        names |= linear(f"{layer}.linear1", F, C) | linear(f"{layer}.linear2", C, F)
        names |= norm(f"{layer}.norm1") | norm(f"{layer}.norm2") | norm(f"{layer}.norm3")
    return names


def heads(start, numbers, kinds=("class_embed", "bbox_embed")):
    names = {}
    for i in numbers:
        if "class_embed" in kinds:
            names |= linear(f"{start}class_embed.{i}", N, C)
        names |= box_head(f"{start}bbox_embed.{i}")
    return names


PLACE = "transformer.decoder.ref_point_head.layers"


def first_stage():
    return linear("transformer.enc_output", C, C) | norm("transformer.enc_output_norm")


def dino(**options):
    names = transformer(**options) | first_stage() | norm("transformer.decoder.norm")
    names |= linear(f"{PLACE}.0", C, 2 * C) | linear(f"{PLACE}.1", C, C)
    names |= {"transformer.tgt_embed.weight": (Q, C), "label_enc.weight": (N + 1, C)}
    names |= linear("transformer.enc_out_class_embed", N, C)
    names |= box_head("transformer.enc_out_bbox_embed")
    return names | heads("", range(LAYERS)) | heads("transformer.decoder.", range(LAYERS))


def five_scales():
    return dino(levels=5, maps=4)


def lite_dino():
    names = dino(query_proj=True)
    layer = f"transformer.encoder.layers.{LAYERS - 1}"
    names |= linear(f"{layer}.linear12", C, C) | linear(f"{layer}.linear22", C, C)
    return names | norm(f"{layer}.norm22")


def dn_detr():
    names = transformer() | linear(f"{PLACE}.0", C, 2 * C) | linear(f"{PLACE}.1", C, C)
    scale = "transformer.decoder.query_scale.layers"
    names |= linear(f"{scale}.0", C, C) | linear(f"{scale}.1", C, C)
    names |= {"label_enc.weight": (N + 1, C - 1), "tgt_embed.weight": (Q, C - 1)}
    names |= {"refpoint_embed.weight": (Q, 4)} | heads("", range(LAYERS))
    return names | heads("transformer.decoder.", range(LAYERS), ("bbox_embed",))


def sparse_detr(encoders=0):
    names = transformer() | first_stage() | norm("transformer.pos_trans_norm")
    names |= linear("transformer.pos_trans", C, 2 * C)
    mask = "transformer.enc_mask_predictor"
    names |= norm(f"{mask}.layer1.0") | linear(f"{mask}.layer1.1", C, C)
    names |= linear(f"{mask}.layer2.0", C // 2, C) | linear(f"{mask}.layer2.2", C // 4, C // 2)
    names |= linear(f"{mask}.layer2.4", 1, C // 4)
    every = range(LAYERS + 1 + encoders)
    names |= heads("", every) | heads("transformer.decoder.", every)
    return names | heads("transformer.encoder.", range(encoders))


def sparse_with_heads():
    return sparse_detr(encoders=LAYERS - 1)


FILES = {
    "dino": (dino, DINO),
    "dino, 5 scales": (five_scales, DINO),
    "lite_dino": (lite_dino, LiteDINO),
    "dn_detr": (dn_detr, DNDETR),
    "sparse_detr": (sparse_detr, SparseDETR),
    "sparse_detr, heads in the encoder": (sparse_with_heads, SparseDETR),
}
each_file = pytest.mark.parametrize("name", FILES)


def canonical(name, kind):
    """The first of the names under which the same tensor is stored."""
    if kind in (DINO, LiteDINO) and "_embed." in name and "enc_out" not in name:
        part, rest = name.removeprefix("transformer.decoder.").split(".", 1)
        return f"{part}.0.{rest.split('.', 1)[1]}" if rest[0].isdigit() else name
    if name.startswith("transformer.encoder.") and "_embed." in name:  # behind all others
        part, number, rest = name.removeprefix("transformer.encoder.").split(".", 2)
        return f"{part}.{int(number) + LAYERS + 1}.{rest}"
    return name.removeprefix("transformer.decoder.") if "_embed." in name else name


def make(name):
    """An official state dict of random numbers."""
    shapes, kind = FILES[name]
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, shape in shapes().items():
        first = canonical(key, kind)
        if first not in state:
            state[first] = torch.randn(shape, generator=generator) * 0.05
            state[first] += key.endswith("running_var")
        state[key] = state[first]
    return state


def written(folder, state, arguments=ARGUMENTS):
    path = folder / "official.pth"
    torch.save({"model": state, "args": argparse.Namespace(**arguments)}, path)
    return path


@each_file
def test_a_file_is_read_and_written_as_it_was(name, tmp_path):
    state = make(name)
    model = load_pretrained(written(tmp_path, state)).model
    assert type(model) is FILES[name][1] and model.config.num_queries == Q
    back = to_official(model)
    assert back.keys() == state.keys()
    assert all(torch.equal(tensor, back[key]) for key, tensor in state.items())
    save_pretrained(model, tmp_path / "again.pth", format="official")
    again = load_pretrained(tmp_path / "again.pth").model
    assert again.config == model.config
    ours = again.state_dict()
    assert all(torch.equal(tensor, ours[key]) for key, tensor in model.state_dict().items())


@each_file
def test_it_detects_and_learns(name, tmp_path):
    """A model from a file is a model: no shape is right by chance."""
    model = load_pretrained(written(tmp_path, make(name))).model
    output = model(make_batch(1, 1))
    assert output.logits.shape == (2, Q, N) and output.boxes.isfinite().all()
    assert model.train()(make_batch(2, 1)).others


@each_file
@pytest.mark.parametrize("fault", ["missing", "left over", "of another shape", "not its copy"])
def test_a_file_that_does_not_fit_is_refused_by_a_tensors_name(name, fault, tmp_path):
    state = make(name)
    key = "transformer.encoder.layers.1.norm1.weight"
    if fault == "missing":
        del state[key]
        message = f"lacks 1 tensors?, such as {key}$"
    elif fault == "left over":
        state["transformer.encoder.layers.1.norm7.weight"] = torch.zeros(C)
        message = r"has left over 1 tensors?, such as transformer.encoder.layers.1.norm7.weight$"
    elif fault == "of another shape":
        state[key] = torch.zeros(C + 1)
        message = rf"tensor {key} has shape \(33,\), expected \(32,\)$"
    else:
        key = "transformer.decoder.bbox_embed.1.layers.0.weight"
        state[key] = state[key] + 1
        # the one that was read second
        message = r"\S*bbox_embed.1.layers.0.weight differs from another name of the same tensor$"
    with pytest.raises(ValueError, match=message) as error:
        load_pretrained(written(tmp_path, state))
    assert "\n" not in str(error.value)


def test_where_tensors_go():
    """A few of which two of one shape could be mixed up."""
    for name, pairs in {
        "dino": {
            "decoder.layers.1.cross_norm.weight": "transformer.decoder.layers.1.norm1.weight",
            "decoder.layers.1.self_norm.weight": "transformer.decoder.layers.1.norm2.weight",
            "decoder.layers.1.ffn.norm.weight": "transformer.decoder.layers.1.norm3.weight",
            "decoder.norm.weight": "transformer.decoder.norm.weight",
            "first_stage.output_norm.weight": "transformer.enc_output_norm.weight",
            "first_stage.class_head.weight": "transformer.enc_out_class_embed.weight",
            "class_heads.0.weight": "transformer.decoder.class_embed.2.weight",
            "first_stage.content.weight": "transformer.tgt_embed.weight",
        },
        "lite_dino": {
            "encoder.layers.2.ffn.norm.weight": "transformer.encoder.layers.2.norm2.weight",
            "encoder.layers.2.small_ffn.norm.weight": "transformer.encoder.layers.2.norm22.weight",
            "encoder.layers.0.attention.query_proj.weight": (
                "transformer.encoder.layers.0.self_attn.query_proj.weight"
            ),
        },
        "dn_detr": {
            "decoder.place.2.weight": f"{PLACE}.1.weight",
            "decoder.scale.2.weight": "transformer.decoder.query_scale.layers.1.weight",
            "content_embed.weight": "tgt_embed.weight",
        },
        "sparse_detr, heads in the encoder": {
            "class_heads.2.weight": "class_embed.2.weight",
            "first_stage.class_head.weight": "class_embed.3.weight",
            "encoder_class_heads.1.weight": "transformer.encoder.class_embed.1.weight",
            "encoder_class_heads.0.weight": "class_embed.4.weight",
            "scorer.score.2.weight": "transformer.enc_mask_predictor.layer2.2.weight",
        },
    }.items():
        state = make(name)
        kind = FILES[name][1]
        model = build_model(small(kind, name))
        expected = to_official(model)
        for ours, theirs in pairs.items():
            assert expected[theirs].data_ptr() == model.state_dict()[ours].data_ptr(), ours
            assert theirs in state


def small(kind, name):
    """The configuration that such a file has."""
    sizes = dict(
        num_classes=N, num_queries=Q, backbone="resnet18", embed_dim=C, num_heads=M, num_points=K,
        encoder_layers=LAYERS, decoder_layers=LAYERS, ffn_dim=F,
    )  # fmt: skip
    more = {
        DINO: {"padded_codes": True, "raw_references": True},
        DNDETR: {"padded_codes": True},
        SparseDETR: {"rho": 0.3, "scored_padding": True, "encoder_losses": "heads" in name},
        LiteDINO: {
            "padded_codes": True, "raw_references": True, "fine_levels": 2, "block_layers": 3,
        },
    }  # fmt: skip
    if "5 scales" in name:
        sizes |= {"num_levels": 5, "stride_4": True}
    configs = {DINO: DINOConfig, DNDETR: DNDETRConfig, SparseDETR: SparseDETRConfig}
    return (configs | {LiteDINO: LiteDINOConfig})[kind](**sizes, **more[kind])


@each_file
def test_options_are_seen_in_a_file(name, tmp_path):
    """Also those by which the official code computes otherwise than our defaults."""
    loaded = load_pretrained(written(tmp_path, make(name))).model
    assert loaded.config == small(FILES[name][1], name)


def test_what_no_tensor_shows_is_given(tmp_path):
    bare = {"nheads": M}
    for name, changes in (
        ("lite_dino", {"fine_levels": 3}),
        ("sparse_detr", {"rho": 0.5, "num_queries": 7}),
    ):
        path = written(tmp_path, make(name), bare)
        config = load_pretrained(path, **changes).model.config
        assert all(getattr(config, key) == value for key, value in changes.items())
    # the backbone is told by its tensors
    assert config.backbone == "resnet18" and config.encoder_layers == LAYERS


# The published sizes


@pytest.mark.parametrize(
    ("config", "parameters", "entries", "without_backbone"),
    [
        (DINOConfig(padded_codes=True, raw_references=True), 46_893_182, 626, 361),
        (
            DINOConfig(num_levels=5, stride_4=True, padded_codes=True, raw_references=True),
            47_255_806,
            630,
            365,
        ),
        (DNDETRConfig(padded_codes=True), 47_429_154, 605, 340),
        (SparseDETRConfig(encoder_losses=False, scored_padding=True), 41_157_210, 640, 375),
        (SparseDETRConfig(scored_padding=True), 41_937_205, 760, 495),
        (LiteDINOConfig(padded_codes=True, raw_references=True), 47_684_222, 644, 379),
    ],
)
def test_numbers_of_the_published_models(config, parameters, entries, without_backbone):
    with torch.device("meta"):
        model = build_model(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert parameters - learning == 222_400  # the stem and the first stage are frozen
    state = to_official(model)
    assert len(state) == entries
    assert sum(not name.startswith("backbone.") for name in state) == without_backbone


def test_a_finer_map_comes_first():
    config = small(DINO, "dino, 5 scales")
    model, batch = build(config, DINO).eval(), make_batch(1, 1)
    tokens = model.tokens(batch)
    assert tokens.spatial_shapes == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    assert model.backbone.channels == list(CHANNELS) and model.backbone.strides == [4, 8, 16, 32]
    with pytest.raises(ValueError, match=r"^stride_4 needs a ResNet, got backbone 'small'$"):
        DINO(dataclasses.replace(config, backbone="small"))


# What does not go out, and what is of another


def test_what_they_do_not_have_is_not_exported():
    for name, change, message in (
        ("dino", {"raw_references": False}, "raw_references must be True to be exported"),
        ("dino", {"temperature": 30.0}, "temperature must be 20.0 to be exported"),
        ("dn_detr", {"padded_codes": False}, "padded_codes must be True to be exported"),
        ("sparse_detr", {"scored_padding": False}, "scored_padding must be True to be exported"),
        ("sparse_detr", {"exact_padding": True}, "exact_padding must be False to be exported"),
        ("lite_dino", {"key_aware": False}, "key_aware must be True to be exported"),
        ("lite_dino", {"small_ffn": False}, "small_ffn must be True to be exported"),
    ):
        config = dataclasses.replace(small(FILES[name][1], name), **change)
        with pytest.raises(ValueError, match=f"^{message}, as it is there, got "):
            to_official(build_model(config))


def test_transformers_has_none_of_them():
    for name, (_, kind) in FILES.items():
        model = build_model(small(kind, name))
        with pytest.raises(ValueError, match=r"^transformers has no \w+: export it as official$"):
            to_huggingface(model)


def test_a_file_of_another_member_is_named(tmp_path):
    path = written(tmp_path, make("sparse_detr"))
    with pytest.raises(ValueError, match=r"official.pth is a SparseDETR, not a DINO$"):
        DINO.from_pretrained(path)
    with pytest.raises(ValueError, match=r"is a SparseDETR, not a DeformableDETR$"):
        DeformableDETR.from_pretrained(path)


def test_arguments_are_those_of_their_command_lines():
    said = official_arguments(small(SparseDETR, "sparse_detr, heads in the encoder"))
    assert (said["rho"], said["use_enc_aux_loss"], said["enc_layers"]) == (0.3, True, LAYERS)
    assert official_arguments(small(LiteDINO, "lite_dino"))["enc_scale"] == 2
