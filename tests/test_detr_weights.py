"""DETR's weights: Hugging Face's model as an oracle, and round trips through published formats."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from deformable_detr import Batch
from deformable_detr.models import DETR, DETRConfig
from deformable_detr.weights.formats import file_name, to_huggingface, to_official
from deformable_detr.weights.published import load_pretrained
from tests.test_huggingface import randomise
from tests.test_pretrained import assert_same_outputs, same

transformers = pytest.importorskip("transformers", minversion="5.0")

PUBLISHED = {
    "detr-r50": {},
    "detr-r50-dc5": {"dilation": True},
    "detr-r101": {"backbone": "resnet101"},
}
SMALL = DETRConfig(
    num_classes=5,
    num_queries=9,
    backbone="resnet18",
    embed_dim=32,
    num_heads=4,
    encoder_layers=2,
    decoder_layers=3,
    ffn_dim=24,
)
NAMES = ["ant", "bee", "cat", "dog", "eel"]
CATEGORIES = [{"id": i, "name": name} for i, name in enumerate(NAMES)]


@torch.no_grad()
def random_model(config):
    torch.manual_seed(0)
    model = DETR(config).eval()
    randomise(model)
    # a random ResNet's maps are so large that positions would not matter; queries would be alike
    features = model.neck.input_proj(model.backbone(torch.randn(1, 3, 64, 64))[-1])
    model.neck.input_proj.weight /= features.std()
    model.query_embed.weight *= 20
    model.box_heads[0].layers[-1].weight *= 20
    return model


def huggingface_model(config):
    backbone = transformers.TimmBackboneConfig(
        backbone=config.backbone,
        use_pretrained_backbone=False,
        out_indices=[1, 2, 3, 4],
        **({"output_stride": 16} if config.dilation else {}),
    )
    theirs = transformers.DetrConfig(
        backbone_config=backbone,
        dilation=config.dilation,
        num_labels=config.num_classes,
        num_queries=config.num_queries,
        d_model=config.embed_dim,
        encoder_attention_heads=config.num_heads,
        decoder_attention_heads=config.num_heads,
        encoder_layers=config.encoder_layers,
        decoder_layers=config.decoder_layers,
        encoder_ffn_dim=config.ffn_dim,
        decoder_ffn_dim=config.ffn_dim,
        position_embedding_type=config.position,
    )
    return transformers.DetrForObjectDetection(theirs).eval()


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return Batch.from_images([torch.randn(3, 130, 110), torch.randn(3, 97, 150)])


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_agree_with_hugging_face(name, batch):
    ours = random_model(DETRConfig(**PUBLISHED[name]))
    theirs = huggingface_model(ours.config)
    state, _ = to_huggingface(ours)
    assert len(state["class_labels_classifier.bias"]) == 92  # 91 classes and no object
    names = {name: file_name(name) for name in theirs.state_dict()}
    assert set(names.values()) == state.keys()
    theirs.load_state_dict({name: state[stored] for name, stored in names.items()})
    assert_same_outputs(ours, theirs, batch)
    with torch.no_grad():  # all that could be wrong shows, by far more than the tolerance
        output = ours(batch)
        ours.neck.position.shift = 0.5  # the pixels' centres of another model
        moved = ours(batch)
    assert (output.logits - moved.logits).abs().max() > 0.01
    assert output.logits.std(1).mean() > 0.01 and output.boxes.std(1).mean() > 0.01


def test_learned_positions_agree_with_hugging_face(tmp_path, batch):
    """x before y, unlike the sine code."""
    ours = random_model(dataclasses.replace(SMALL, position="learned"))
    ours.save_pretrained(tmp_path, format="huggingface")
    theirs = transformers.DetrForObjectDetection.from_pretrained(tmp_path)
    assert_same_outputs(ours, theirs.eval(), batch)
    assert same(ours, DETR.from_pretrained(tmp_path))

    file, place = tmp_path / "model.safetensors", "model.position_embedding."
    old = "model.backbone.position_embedding."  # as transformers 4 wrote it
    save_file({name.replace(place, old): x for name, x in load_file(file).items()}, file)
    assert same(ours, DETR.from_pretrained(tmp_path))


@pytest.mark.parametrize("change", [{}, {"dilation": True, "backbone": "resnet50"}])
def test_round_trips_are_exact(change, tmp_path, batch):
    model = random_model(dataclasses.replace(SMALL, **change))
    for path, format in (
        (tmp_path / "ours", "ours"),
        (tmp_path / "ours.safetensors", "ours"),
        (tmp_path / "official.pth", "official"),
        (tmp_path / "theirs", "huggingface"),
    ):
        model.save_pretrained(path, CATEGORIES, format)
        assert same(model, DETR.from_pretrained(path))
    assert load_pretrained(tmp_path / "theirs").categories == CATEGORIES

    # theirs, as transformers reads and saves it, strictly
    theirs, info = transformers.DetrForObjectDetection.from_pretrained(
        tmp_path / "theirs", output_loading_info=True
    )
    assert not any(info.values())
    assert_same_outputs(model, theirs.eval(), batch)
    theirs.save_pretrained(tmp_path / "again")
    again = load_pretrained(tmp_path / "again").model
    assert same(model, again)
    again.save_pretrained(tmp_path / "third", CATEGORIES, "huggingface")
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("again", "third"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_official_files_are_written_as_they_were_read(tmp_path):
    model = random_model(SMALL)
    model.save_pretrained(tmp_path / "one.pth", format="official")
    DETR.from_pretrained(tmp_path / "one.pth").save_pretrained(
        tmp_path / "two.pth", format="official"
    )
    one, two = (torch.load(tmp_path / f"{n}.pth", weights_only=True) for n in ("one", "two"))
    assert one["args"] == two["args"] and one["model"].keys() == two["model"].keys()
    assert all(torch.equal(tensor, two["model"][name]) for name, tensor in one["model"].items())
    assert one["args"] == {
        "num_queries": 9,
        "backbone": "resnet18",
        "dilation": False,
        "hidden_dim": 32,
        "nheads": 4,
        "enc_layers": 2,
        "dec_layers": 3,
        "dim_feedforward": 24,
        "dropout": 0.1,
        "position_embedding": "sine",
    }


def test_a_bare_official_file_as_torch_hub_has_them(tmp_path):
    """Nothing but tensors; what they do not show is given."""
    model = random_model(dataclasses.replace(SMALL, backbone="resnet50", dilation=True))
    torch.save({"model": to_official(model)}, tmp_path / "detr.pth")
    loaded = DETR.from_pretrained(tmp_path / "detr.pth", dilation=True, num_heads=4)
    assert same(model, loaded)


def test_numbers_and_names_of_the_official_model():
    """As FAIR's repository has them: `transformer.decoder.norm` alone stands outside the layers."""
    with torch.device("meta"):
        model = DETR(DETRConfig())
    assert sum(p.numel() for p in model.parameters()) == 41_524_768
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 41_302_368
    state = to_official(model)
    assert len(state) == 458
    for name, shape in {
        "backbone.0.body.layer4.2.bn3.running_var": (2048,),
        "input_proj.weight": (256, 2048, 1, 1),
        "query_embed.weight": (100, 256),
        "transformer.encoder.layers.5.self_attn.in_proj_weight": (768, 256),
        "transformer.encoder.layers.0.norm2.bias": (256,),
        "transformer.decoder.layers.3.multihead_attn.out_proj.weight": (256, 256),
        "transformer.decoder.layers.5.norm3.weight": (256,),
        "transformer.decoder.norm.weight": (256,),
        "class_embed.weight": (92, 256),
        "bbox_embed.layers.2.weight": (4, 256),
    }.items():
        assert tuple(state.pop(name).shape) == shape
    with torch.device("meta"):
        assert to_official(DETR(DETRConfig(dilation=True))).keys() >= state.keys()


def test_a_config_as_facebook_has_it(tmp_path):
    """With timm's backbone named in the old way, and labels of which eleven are called N/A."""
    model = random_model(
        dataclasses.replace(SMALL, num_classes=91, dilation=True, backbone="resnet50")
    )
    model.save_pretrained(tmp_path, format="huggingface")
    file = tmp_path / "config.json"
    content = json.loads(file.read_text())
    assert content.pop("backbone_config")["out_indices"] == [1, 2, 3, 4]
    old = {"backbone": "resnet50", "use_timm_backbone": True, "backbone_config": None}
    file.write_text(json.dumps(content | old))
    loaded = load_pretrained(tmp_path)
    assert same(model, loaded.model)
    assert [c["name"] for c in loaded.categories].count("N/A") == 10
    assert loaded.categories[17] == {"id": 17, "name": "cat"}


def test_what_has_no_counterpart_is_not_exported():
    for change, message in (
        ({"scoring": "focal"}, "scoring must be softmax to be exported"),
        ({"backbone": "small"}, "backbone 'small' exists only here"),
        ({"position": "learned", "position_size": 60}, "position_size must be 50"),
    ):
        for export in (to_official, to_huggingface):
            with pytest.raises(ValueError, match=message):
                export(DETR(dataclasses.replace(SMALL, **change)))


def test_a_model_that_normalises_between_layers_is_refused(tmp_path, batch):
    """transformers does so with auxiliary_loss, in evaluation too; published files are without."""
    ours = random_model(SMALL)
    ours.save_pretrained(tmp_path, format="huggingface")
    theirs = transformers.DetrForObjectDetection.from_pretrained(tmp_path, auxiliary_loss=True)
    with pytest.raises(AssertionError, match="not close"):
        assert_same_outputs(ours, theirs.eval(), batch)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="with auxiliary_loss, transformers' DETR normalises"):
        load_pretrained(tmp_path)
