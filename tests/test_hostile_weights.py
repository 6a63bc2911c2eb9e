"""Files of weights that are broken or hostile are refused in one line, at once; those that people
have, wrapped in one thing or another, are read."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deformable_detr.inference.detector import load_detector, read_card
from deformable_detr.models import DETR, DeformableDETR
from deformable_detr.weights.formats import to_official
from deformable_detr.weights.ours import load_model, save_model
from deformable_detr.weights.published import load_pretrained
from tests.conftest import TINY
from tests.test_detr_weights import SMALL as SMALL_DETR
from tests.test_pretrained import CATEGORIES, SMALL, random_model, same

GOLDEN = Path(__file__).parent / "golden" / "checkpoint.pt"
DEEP = "[" * 100_000 + "]" * 100_000


@contextlib.contextmanager
def refused(message, error=ValueError, seconds=20):
    """The error, in one line, before a test that hangs would."""

    def late(*_):
        raise TimeoutError(f"not refused in {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        with pytest.raises(error, match=message) as caught:
            yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.fixture
def ours(tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(DeformableDETR(TINY), path, CATEGORIES[:3])
    return path


@pytest.fixture
def official(tmp_path):
    path = tmp_path / "official.pth"
    random_model(SMALL).save_pretrained(path, format="official")
    return path, torch.load(path, weights_only=True)


@pytest.fixture
def hub(tmp_path):
    """A folder of Hugging Face's."""
    random_model(SMALL).save_pretrained(tmp_path / "hub", CATEGORIES, "huggingface")
    return tmp_path / "hub"


def rewrite(path, tensors=(), **metadata):
    """A file of ours with other entries."""
    state = load_file(path)
    kept = {"model": "deformable_detr", "categories": json.dumps(CATEGORIES[:3])}
    kept |= {"config": json.dumps(dataclasses.asdict(TINY)), "card": "{}"}
    save_file(state | dict(tensors), path, kept | metadata)


def change_config(folder, **entries):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


# Sizes that a file claims


@pytest.mark.parametrize("name", ["encoder_layers", "decoder_layers", "num_levels"])
def test_a_file_of_ours_cannot_claim_more_layers_than_tensors(ours, name):
    rewrite(ours, config=json.dumps(dataclasses.asdict(TINY) | {name: 10**9}))
    with refused("tensors are too few for 1000000000 layers"):
        load_model(ours)


def test_tensors_that_unfold(official):
    """A view of one number has any shape, and costs nothing in a file."""
    path, content = official
    content["model"]["query_embed.weight"] = torch.zeros(1).expand(1_000_000, 64)
    torch.save(content, path)
    with refused(r"tensors of [\d,]+ bytes cannot be in [\d,]+ bytes"):
        load_pretrained(path)


def test_records_that_unfold(official, tmp_path):
    """torch.load would unpack them."""
    path, content = official
    content["more"] = torch.zeros(1 << 24)
    torch.save(content, path)
    packed = tmp_path / "packed.pth"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in source.namelist():
            new.writestr(name, source.read(name))
    assert torch.load(packed, weights_only=True).keys() == content.keys()
    with refused(r"would unpack to [\d,]+ bytes from [\d,]+: torch.save compresses nothing"):
        load_pretrained(packed)


def test_options_that_unfold(official):
    """Lists within lists, each twice: a line that showed them would have 2**60 characters."""
    path, content = official
    bomb = []
    for _ in range(60):
        bomb = [bomb, bomb]
    torch.save(content | {"args": {"nheads": bomb}}, path)
    with refused("nheads must be a number or a text, got list"):
        load_pretrained(path)


# Numbers

NOT_WEIGHTS = {
    "a number that is NaN or infinite": lambda x: x.where(torch.arange(len(x)) > 0, torch.nan),
    "that is NaN or infinite": lambda x: x.double() + 1e300,
    "is of torch.int64, expected torch.float32": lambda x: x.long(),
    "is of torch.bool, expected torch.float32": lambda x: x > 0,
}


@pytest.mark.parametrize("message", NOT_WEIGHTS)
def test_numbers_that_are_no_weights_are_named(message, ours, official, hub):
    change = NOT_WEIGHTS[message]
    tensors = {"class_heads.0.bias": change(load_file(ours)["class_heads.0.bias"])}
    rewrite(ours, tensors)
    path, content = official
    for layer in range(2):
        name = f"class_embed.{layer}.bias"
        content["model"][name] = change(content["model"][name])
    torch.save(content, path)
    name, file = "model.encoder.layers.0.fc1.bias", hub / "model.safetensors"
    state = load_file(file)
    save_file(state | {name: change(state[name])}, file)
    with refused(f"tensor class_heads.0.bias .*{message}"):
        load_pretrained(ours)
    with refused(f"tensor class_embed.0.bias .*{message}"):
        load_pretrained(path)
    with refused(f"tensor {name} .*{message}"):
        load_pretrained(hub)


def test_numbers_of_half_precision_are_read(hub):
    before = load_file(hub / "model.safetensors")
    halves = {name: x.half() for name, x in before.items()}
    save_file(halves, hub / "model.safetensors")
    weight = load_pretrained(hub).model.query_embed.weight
    assert torch.equal(weight, halves["model.query_position_embeddings.weight"].float())


# Texts


@pytest.mark.parametrize("name", ["config", "categories", "card"])
def test_metadata_without_end(ours, name):
    rewrite(ours, **{name: DEEP})
    with refused("is not JSON that can be read: maximum recursion depth"):
        load_model(ours)
    if name == "card":
        with refused("its card is not JSON"):
            read_card(ours)


def test_a_config_without_end(hub):
    (hub / "config.json").write_text(f'{{"model_type": {DEEP}}}')
    with refused("config.json is not one we can use: .* maximum recursion depth"):
        load_pretrained(hub)
    (hub / "config.json").write_text("[]")
    with refused("config.json is not one we can use"):
        load_pretrained(hub)


@pytest.mark.parametrize("name", [7, None, ["cat"]])
def test_names_must_be_texts(ours, hub, name):
    rewrite(ours, categories=json.dumps([*CATEGORIES[:2], {"id": 2, "name": name}]))
    with refused("name of a category must be a text, got "):
        load_model(ours)
    change_config(hub, id2label={str(i): name if i == 1 else "x" for i in range(5)})
    with refused("name of a category must be a text, got "):
        load_pretrained(hub)
    with refused("name of a category must be a text, got "):  # before it is too late
        save_model(DeformableDETR(TINY), ours, [*CATEGORIES[:2], {"id": 2, "name": name}])


def test_true_is_no_number(ours, official, hub):
    rewrite(ours, config=json.dumps(dataclasses.asdict(TINY) | {"num_queries": True}))
    with refused("num_queries must be a whole number, got True"):
        load_model(ours)
    path, content = official
    torch.save(content | {"args": content["args"] | {"num_queries": True}}, path)
    with refused("num_queries must be a whole number, got True"):
        load_pretrained(path)
    two_stage = {"with_box_refine": True, "two_stage": True}  # in which they have another name
    for wrong in ({"num_queries": True}, two_stage | {"two_stage_num_proposals": True}):
        change_config(hub, **{"num_queries": 9} | wrong)
        with refused("num_queries must be a whole number, got True"):
            load_pretrained(hub)


def test_sizes_that_do_not_fit_each_other(ours, tmp_path):
    rewrite(ours, config=json.dumps(dataclasses.asdict(TINY) | {"num_heads": 3}))
    with refused("no such model can be built: embed_dim"):
        load_model(ours)
    path = tmp_path / "detr.pth"
    DETR(SMALL_DETR).save_pretrained(path, format="official")
    content = torch.load(path, weights_only=True)
    torch.save(content | {"args": content["args"] | {"nheads": 3}}, path)
    with refused("no such model can be built: embed_dim"):
        load_pretrained(path)


def test_another_activation_is_another_model(hub):
    change_config(hub, activation_function="gelu")
    with refused("its activation_function is not 'relu'"):
        load_pretrained(hub)


# What is no file


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes here")
def test_pipes_and_devices(tmp_path, hub):
    """Opening a pipe waits for somebody to write; /dev/zero never ends."""
    for name in ("x.pth", "x.safetensors"):
        os.mkfifo(tmp_path / name)
        with refused("is no regular file"):
            load_pretrained(tmp_path / name)
    with refused("is no regular file"):
        load_model(tmp_path / "x.safetensors")
    with refused("is no regular file"):
        read_card(tmp_path / "x.safetensors")
    with refused("/dev/zero is no regular file"):
        load_pretrained("/dev/zero")
    for name in ("model.safetensors", "config.json"):
        (hub / name).unlink()
        os.mkfifo(hub / name)
        with refused("is no regular file"):
            load_pretrained(hub)
    with refused("no model at", FileNotFoundError):
        load_model(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with refused(
        "no model at .*empty: it has none of config.json, model.safetensors, best",
        FileNotFoundError,
    ):
        load_pretrained(tmp_path / "empty")


# Of which model


def test_files_of_other_models_say_what_they_seem_to_be(tmp_path, hub):
    torch.save({"model": {"conv1.weight": torch.ones(3)}}, tmp_path / "x.pth")
    with refused("sparse_detr, deformable_detr, detr: its tensors are called conv1..."):
        load_pretrained(tmp_path / "x.pth")
    with refused("it looks like one of Hugging Face's: give its folder, with config.json"):
        load_pretrained(hub / "model.safetensors")
    change_config(hub, model_type="yolos")
    with refused("its model_type is 'yolos'; known are deformable_detr, detr"):
        load_pretrained(hub)
    path = tmp_path / "y.pth"
    DETR(SMALL_DETR).save_pretrained(path, format="official")
    with refused("is a DETR, not a DeformableDETR"):
        DeformableDETR.from_pretrained(path)


# What people have


def test_a_runs_folder_and_its_checkpoint(ours, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(GOLDEN, run / "checkpoint.pt")
    found = load_detector(run)  # version 0.1 wrote it
    assert [c["name"] for c in found.categories[:3]] == ["zero", "one", "two"]
    assert found.transforms == "digits" and not found.model.training
    average = torch.load(GOLDEN, weights_only=True)["average"]
    assert torch.equal(found.model.neck.level_embed, average["module.level_embed"])
    assert torch.equal(
        found.model.first_stage.class_head.bias, average["module.class_heads.2.bias"]
    )
    shutil.copy(ours, run / "best.safetensors")
    assert load_pretrained(run).model.config == TINY


def test_a_checkpoint_that_is_none(tmp_path):
    content = torch.load(GOLDEN, weights_only=True)
    for change, message in (
        ({"identity": 3}, "no checkpoint of ours: it has no model"),
        ({"model": None, "average": None}, "no checkpoint of ours: it has no model"),
        ({"identity": {}}, "no checkpoint of ours: it has no categories"),
        ({"identity": content["identity"] | {"model": "yolo"}}, "is of the model 'yolo'"),
    ):
        torch.save(content | change, tmp_path / "checkpoint.pt")
        with refused(message):
            load_pretrained(tmp_path / "checkpoint.pt")


@pytest.mark.parametrize(
    ("prefix", "key"),
    [
        ("module.", "model"),  # DistributedDataParallel
        ("_orig_mod.", None),  # torch.compile
        ("model.", "state_dict"),  # Lightning
        ("module._orig_mod.", "model"),
    ],
)
def test_wrapped_weights_are_unwrapped(prefix, key, tmp_path):
    model = random_model(dataclasses.replace(SMALL, num_heads=8, num_points=4))
    state = {prefix + name: tensor for name, tensor in to_official(model).items()}
    torch.save({key: state} if key else state, tmp_path / "m.pth")
    assert same(model, DeformableDETR.from_pretrained(tmp_path / "m.pth"))


def test_official_tensors_in_a_safetensors_file(tmp_path):
    model = random_model(dataclasses.replace(SMALL, num_heads=8, num_points=4))
    state = {name: tensor.clone() for name, tensor in to_official(model).items()}
    save_file(state, tmp_path / "m.safetensors")
    assert same(model, DeformableDETR.from_pretrained(tmp_path / "m.safetensors"))
