"""Published weights: five variants through three formats, and files that must be refused."""

import argparse
import dataclasses
import io
import json
import logging
import math
import os
import pickle

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from deformable_detr import Batch, DeformableDETR, DeformableDETRConfig
from deformable_detr.weights.formats import official_arguments, to_huggingface, to_official
from deformable_detr.weights.ours import save_model
from deformable_detr.weights.published import load_pretrained, save_pretrained
from tests.conftest import TINY
from tests.test_huggingface import VARIANTS, huggingface_model, randomise

SMALL = DeformableDETRConfig(
    num_classes=5,
    num_queries=9,
    backbone="resnet18",
    embed_dim=32,
    num_heads=4,
    num_points=3,
    encoder_layers=2,
    decoder_layers=2,
    ffn_dim=24,
)
NAMES = ["ant", "bee", "cat", "dog", "eel"]
CATEGORIES = [{"id": i, "name": name} for i, name in enumerate(NAMES)]


def variant(name):
    """A small configuration; DC5 needs a backbone that torchvision can dilate."""
    backbone = {"backbone": "resnet50"} if name == "dc5" else {}
    return dataclasses.replace(SMALL, **VARIANTS[name], **backbone)


def random_model(config, seed=0):
    torch.manual_seed(seed)
    model = DeformableDETR(config).eval()
    randomise(model)
    return model


def same(model, other):
    state = other.state_dict()
    assert model.config == other.config and not other.training
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == [name for name, p in other.named_parameters() if not p.requires_grad]
    return True


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return Batch.from_images([torch.randn(3, 130, 110), torch.randn(3, 97, 150)])


@torch.no_grad()
def assert_same_outputs(ours, theirs, batch):
    output = ours(batch)
    expected = theirs(pixel_values=batch.images, pixel_mask=(~batch.mask).long())
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(output.boxes, expected.pred_boxes, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trips_are_exact_and_hugging_face_agrees(name, tmp_path, batch):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    config = variant(name)
    model = random_model(config)
    for path, format in (
        (tmp_path / "ours", "ours"),
        (tmp_path / "ours.safetensors", "ours"),
        (tmp_path / "official.pth", "official"),
        (tmp_path / "theirs", "huggingface"),
    ):
        model.save_pretrained(path, CATEGORIES, format)
        assert same(model, DeformableDETR.from_pretrained(path))
    assert load_pretrained(tmp_path / "theirs").categories == CATEGORIES

    # ours, loaded there from the files, strictly
    theirs, info = transformers.DeformableDetrForObjectDetection.from_pretrained(
        tmp_path / "theirs", output_loading_info=True
    )
    assert not any(info.values())
    assert theirs.config.id2label[4] == "eel"
    assert_same_outputs(model, theirs.eval(), batch)

    # theirs, with other weights and as transformers saves it, loaded here
    other = huggingface_model(config)
    other.load_state_dict(theirs.state_dict())
    other.save_pretrained(tmp_path / "again")
    assert same(model, DeformableDETR.from_pretrained(tmp_path / "again"))


def test_heads_that_hugging_face_ties_are_read(tmp_path, batch):
    """transformers ties the class heads of a refined model that was made from its config."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    config = huggingface_model(variant("refine")).config
    config.tie_word_embeddings = True
    theirs = transformers.DeformableDetrForObjectDetection(config).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    assert "class_embed.1.weight" not in load_file(tmp_path / "model.safetensors")
    assert_same_outputs(DeformableDETR.from_pretrained(tmp_path), theirs, batch)


def test_learned_positions_and_other_backbones(tmp_path):
    config = dataclasses.replace(SMALL, position="learned", backbone="resnet34", num_levels=3)
    model = random_model(config)
    for format in ("official", "huggingface"):
        model.save_pretrained(tmp_path / format, format=format)
        assert same(model, DeformableDETR.from_pretrained(tmp_path / format))


def test_a_file_as_the_official_code_writes_it(tmp_path):
    """With argparse's Namespace and the optimiser's state; and bare, so that all must be seen."""
    config = dataclasses.replace(variant("two_stage"), num_heads=8, num_points=4)
    model = random_model(config)
    arguments = argparse.Namespace(
        backbone="resnet18", nheads=8, num_queries=9, lr_linear_proj_names=["sampling_offsets"]
    )
    state = to_official(model)
    content = {"model": state, "args": arguments, "epoch": 49, "optimizer": {"state": {}}}
    torch.save(content, tmp_path / "full.pth")
    torch.save({"model": state}, tmp_path / "bare.pth")
    assert same(model, DeformableDETR.from_pretrained(tmp_path / "full.pth"))
    assert same(model, DeformableDETR.from_pretrained(tmp_path / "bare.pth", num_queries=9))


def test_official_names_and_numbers():
    """561, 597, 630 and 549 entries, as counted in the official models."""
    for changes, entries, name in (
        ({}, 561, "transformer.decoder.layers.5.norm3.bias"),
        ({"refine": True}, 597, "transformer.decoder.bbox_embed.5.layers.2.bias"),
        ({"refine": True, "two_stage": True}, 630, "transformer.decoder.class_embed.6.weight"),
        ({"num_levels": 1}, 549, "transformer.encoder.layers.0.self_attn.value_proj.weight"),
    ):
        with torch.device("meta"):
            state = to_official(DeformableDETR(DeformableDETRConfig(**changes)))
        assert len(state) == entries
        assert {name, "backbone.0.body.conv1.weight", "class_embed.5.bias"} <= state.keys()


def test_options_have_the_names_that_their_fields_say():
    config = dataclasses.replace(SMALL, num_queries=11, num_levels=3, refine=True, two_stage=True)
    assert official_arguments(config) == {
        "backbone": "resnet18",
        "dilation": False,
        "num_queries": 11,
        "hidden_dim": 32,
        "num_feature_levels": 3,
        "nheads": 4,
        "enc_n_points": 3,
        "dec_n_points": 3,
        "enc_layers": 2,
        "dec_layers": 2,
        "dim_feedforward": 24,
        "dropout": 0.1,
        "position_embedding": "sine",
        "with_box_refine": True,
        "two_stage": True,
    }
    with torch.device("meta"):
        content = to_huggingface(DeformableDETR(config))[1]
    for name in ("backbone_config", "id2label", "label2id", "architectures"):
        del content[name]
    assert content == {
        "model_type": "deformable_detr",
        "d_model": 32,
        "num_queries": 11,
        "two_stage_num_proposals": 11,
        "num_feature_levels": 3,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_n_points": 3,
        "decoder_n_points": 3,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "dropout": 0.1,
        "position_embedding_type": "sine",
        "dilation": False,
        "with_box_refine": True,
        "two_stage": True,
        "tie_word_embeddings": False,
        "auxiliary_loss": True,
    }


def test_other_classes_and_queries_keep_what_fits(tmp_path, caplog):
    model = random_model(variant("base"))
    model.save_pretrained(tmp_path / "m.pth", format="official")
    with caplog.at_level(logging.WARNING):
        loaded = load_pretrained(tmp_path / "m.pth", num_classes=3, num_queries=4, dropout=0.0)
    assert loaded.model.config == dataclasses.replace(
        model.config, num_classes=3, num_queries=4, dropout=0.0
    )
    fresh = {"class_heads.0.weight", "class_heads.0.bias", "query_embed.weight"}
    assert loaded.report.fresh.keys() == fresh
    assert "class_heads.0.weight: 0 of 3 rows kept: (5, 32) before, (3, 32) now" in caplog.text
    assert "classes made anew: class 0, class 1, class 2" in caplog.text
    state = loaded.model.state_dict()
    assert set(loaded.report.kept) == state.keys() - fresh
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items() if n not in fresh)
    torch.testing.assert_close(state["class_heads.0.bias"], torch.full((3,), -math.log(99)))
    assert len(loaded.categories) == 3
    queries = model.query_embed.weight
    assert torch.equal(loaded.model.query_embed.weight, queries[:4])
    more = load_pretrained(tmp_path / "m.pth", num_queries=len(queries) + 3).model
    assert torch.equal(more.query_embed.weight[:-3], queries) and len(more.query_embed.weight) > 4


def test_other_classes_leave_the_first_stage_its_objectness(tmp_path, batch):
    model = random_model(variant("two_stage"))
    model.save_pretrained(tmp_path / "m.safetensors")
    other = DeformableDETR.from_pretrained(tmp_path / "m.safetensors", num_classes=3)
    proposals = [m(batch).others["first"] for m in (model, other)]
    for a, b in zip(*((p.logits[..., 0], p.boxes) for p in proposals), strict=True):
        torch.testing.assert_close(a, b)
    assert (other.first_stage.class_head.bias[1:] == -math.log(99)).all()


# What must be refused, in one line


@pytest.fixture
def official(tmp_path):
    """A file to be damaged, and its content."""
    path = tmp_path / "official.pth"
    random_model(SMALL).save_pretrained(path, format="official")
    return path, torch.load(path, weights_only=True)


LEVELS = "transformer.level_embed"
DAMAGE = {
    r"lacks 1 tensor, such as query_embed.weight": lambda s: s.pop("query_embed.weight"),
    r"lacks 'transformer.level_embed'": lambda s: s.pop(LEVELS),
    r"has left over 1 tensor, such as extra": lambda s: s.update(extra=torch.ones(1)),
    r"tensor input_proj.0.0.bias has shape \(3,\), expected \(32,\)": lambda s: s.update(
        {"input_proj.0.0.bias": torch.ones(3)}
    ),
    r"class_embed.1.bias differs from another name": lambda s: s.update(
        {"class_embed.1.bias": torch.ones(5)}
    ),
    r"'query_embed.weight' is not a dense tensor": lambda s: s.update(
        {"query_embed.weight": [[0.0] * 64]}
    ),
    r"'bbox_embed.0.layers.0.bias' is not a dense tensor": lambda s: s.update(
        {"bbox_embed.0.layers.0.bias": torch.ones(32, dtype=torch.complex64)}
    ),
    r"'transformer.level_embed' is not a dense tensor": lambda s: s.update({LEVELS: [1, 2]}),
    r"7 is not a dense tensor": lambda s: s.update({7: torch.ones(1)}),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_other_tensors_are_refused(official, message):
    path, content = official
    DAMAGE[message](content["model"])
    torch.save(content, path)
    refuse(path, message)


def refuse(path, message, **changes):
    with pytest.raises(ValueError, match=message) as caught:
        load_pretrained(path, **changes)
    assert "\n" not in str(caught.value) and path.name in str(caught.value)


class Attack:
    """What a hostile pickle does: it calls something when it is loaded."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_an_option_that_is_not_there_is_not_the_files_fault(official):
    with pytest.raises(TypeError, match="unexpected keyword argument 'drop_out'"):
        load_pretrained(official[0], drop_out=0.0)


@pytest.mark.parametrize(
    "write", [torch.save, lambda o, path: path.write_bytes(pickle.dumps(o, 2))]
)
@pytest.mark.parametrize("name", ["x.pth", "hub/pytorch_model.bin"])
def test_nothing_in_a_file_is_executed(write, name, tmp_path):
    path, target = tmp_path / name, tmp_path / "attacked"
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text('{"model_type": "deformable_detr"}')
    write({"model": Attack(target)}, path)
    with pytest.raises(ValueError, match="is not a readable file of weights: ") as caught:
        load_pretrained(path if name == "x.pth" else path.parent)
    assert not target.exists()
    assert str(caught.value).endswith("it asks to call posix.mkdir, which was not done")


def test_truncated_and_empty_files(official, tmp_path):
    path, _ = official
    whole = path.read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:size])
        refuse(path, "is not a readable file of weights")
    tensors = tmp_path / "m.safetensors"
    tensors.write_bytes(b"\x08\0\0\0\0\0\0\0{")
    refuse(tensors, "is not a readable safetensors file")
    path.write_bytes(b"PK\x03\x04" + whole[4:200])
    refuse(path, "is not a readable file of weights")
    torch.save([1, 2], path)
    refuse(path, "must hold a dict of tensors, got list")
    torch.save({"model": 3}, path)
    refuse(path, "'model' and 'args' must be dicts")
    content = torch.load(io.BytesIO(whole), weights_only=True)
    torch.save(content | {"args": {"nheads": 0}}, path)
    refuse(path, "is not one we can use")


CONFIGS = {
    "its model_type is 'yolos'; known are deformable_detr, detr": {"model_type": "yolos"},
    "its backbone is transformers' own 'resnet'": {"backbone_config": {"model_type": "resnet"}},
    "it has num_points 3 and, as decoder_n_points, 4": {"decoder_n_points": 4},
    "tensors are too few for 1000000000 layers": {"encoder_layers": 10**9},
    r"expected \(1000000000, 32\)|no such model": {
        "encoder_ffn_dim": 10**9,
        "decoder_ffn_dim": 10**9,
    },
    "config.json is not one we can use": {"d_model": "wide"},
    "no such model can be built": {"position_embedding_type": "none"},
    "'0'": {"id2label": {"1": "a"}},
    "these must be at least 1": {"num_feature_levels": 0},
}


@pytest.mark.parametrize("message", CONFIGS)
def test_other_configurations_are_refused(tmp_path, message):
    random_model(SMALL).save_pretrained(tmp_path / "m", format="huggingface")
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | CONFIGS[message]))
    with pytest.raises(ValueError, match=message) as caught:
        load_pretrained(tmp_path / "m")
    assert "\n" not in str(caught.value)


def test_what_cannot_be_exported_is_said():
    with pytest.raises(ValueError, match="backbone 'small' exists only here"):
        to_huggingface(DeformableDETR(TINY))
    for config, change, default in (
        (variant("two_stage"), {"anchor_size": 0.1}, 0.05),
        (variant("dc5"), {"deformable_stages": 1}, 0),
        (dataclasses.replace(SMALL, position="learned"), {"position_size": 60}, 50),
    ):
        ((name, value),) = change.items()
        model = DeformableDETR(dataclasses.replace(config, **change))
        with pytest.raises(ValueError, match=f"{name} must be {default} .* got {value}"):
            to_official(model)
    with pytest.raises(ValueError, match="a model of 2 levels cannot be exported"):
        to_official(DeformableDETR(dataclasses.replace(SMALL, num_levels=2)))
    with pytest.raises(ValueError, match="format must be one of ours, huggingface, official"):
        save_pretrained(DeformableDETR(TINY), "x", format="onnx")


def test_two_levels_agree_with_hugging_face(tmp_path, batch):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    model = random_model(dataclasses.replace(SMALL, num_levels=2))
    model.save_pretrained(tmp_path, format="huggingface")
    theirs = transformers.DeformableDetrForObjectDetection.from_pretrained(tmp_path)
    assert_same_outputs(model, theirs.eval(), batch)


# The hub


def test_a_name_is_resolved_by_the_hub(tmp_path, monkeypatch):
    model = random_model(variant("refine"))
    model.save_pretrained(tmp_path, CATEGORIES, "huggingface")
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    asked = []

    def download(repository, file):
        asked.append((repository, file))
        if not (tmp_path / file).exists():
            raise huggingface_hub.errors.EntryNotFoundError(file)
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert same(model, DeformableDETR.from_pretrained("SenseTime/deformable-detr"))
    (tmp_path / "model.safetensors").unlink()  # older repositories have the other file
    assert same(model, DeformableDETR.from_pretrained("SenseTime/deformable-detr"))
    names = ["config.json", "preprocessor_config.json", "model.safetensors"] * 2
    assert [file for _, file in asked] == [*names, "pytorch_model.bin"]


def test_without_a_network_the_error_says_what_to_download(monkeypatch):
    def offline(repository, file):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nsecond line")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(FileNotFoundError, match=r"download config.json and model.safetensors fro"):
        load_pretrained("SenseTime/deformable-detr-single-scale")
    for name in ("nothing.pth", "a/b/c", "/no/where", "../x"):
        with pytest.raises(FileNotFoundError, match="no file or folder"):
            load_pretrained(name)


def test_extra_counters_of_batch_norm_are_ignored(tmp_path):
    """Files on the hub may have them."""
    model = random_model(SMALL)
    model.save_pretrained(tmp_path, format="huggingface")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.backbone.conv_encoder.model.bn1.num_batches_tracked"] = torch.tensor(3)
    save_file(tensors, file)
    assert same(model, DeformableDETR.from_pretrained(tmp_path))


def test_ours_with_another_dropout(tmp_path):
    save_model(DeformableDETR(TINY), tmp_path / "m.safetensors", CATEGORIES[:3])
    loaded = load_pretrained(tmp_path / "m.safetensors", dropout=0.0)
    assert loaded.model.config == dataclasses.replace(TINY, dropout=0.0)
    assert loaded.categories == CATEGORIES[:3]
    refuse(tmp_path / "m.safetensors", "do not fit a model with {'num_levels': 3}", num_levels=3)
