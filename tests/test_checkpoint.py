"""Writing and reading a detector: exact, strict, atomic."""

import dataclasses
import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from deformable_detr import DeformableDETR
from deformable_detr.files import write_atomically
from deformable_detr.weights.ours import load_model, save_model
from tests.conftest import TINY

CATEGORIES = [{"id": 3, "name": "red"}, {"id": 7, "name": "green"}, {"id": 20, "name": "blue"}]


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = DeformableDETR(TINY)
    save_model(model, tmp_path / "model.safetensors", CATEGORIES, {"seed": 0})
    return model, tmp_path / "model.safetensors"


def test_round_trip_is_exact(saved):
    model, path = saved
    again, categories = load_model(path)
    assert categories == CATEGORIES and again.config == TINY and not again.training
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def rewrite(path, change):
    """The file with other tensors or metadata."""
    tensors = load_file(path)
    metadata = {"config": json.dumps(dataclasses.asdict(TINY)), "categories": "[]"}
    change(tensors, metadata)
    save_file(tensors, path, metadata)


DAMAGE = {
    "lacks 1 tensor, such as neck.level_embed": lambda t, m: t.pop("neck.level_embed"),
    "has left over 1 tensor, such as extra": lambda t, m: t.update(extra=torch.ones(1)),
    r"level_embed has shape \(3, 32\), expected \(2, 32\)": lambda t, m: t.update(
        {"neck.level_embed": torch.ones(3, 32)}
    ),
    "is of the model 'yolo'; known: deformable_detr, detr": lambda t, m: m.update(model="yolo"),
    "has no configuration": lambda t, m: m.pop("config"),
    "a configuration that is none of ours": lambda t, m: m.update(config='{"layers": 3}'),
    "none of ours: categories need an id": lambda t, m: m.update(categories='[{"id": 1}]'),
    "none of ours: categories must be a list": lambda t, m: m.update(categories="5"),
    "names 0 of its 3 classes": lambda t, m: None,
    r"expected \(2, 4194304\)": lambda t, m: m.update(  # 64 TiB, were they allocated
        config=json.dumps(dataclasses.asdict(TINY) | {"embed_dim": 1 << 22})
    ),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_other_models_are_refused_in_one_line(saved, message):
    rewrite(saved[1], DAMAGE[message])
    with pytest.raises(ValueError, match=message) as caught:
        load_model(saved[1])
    assert "\n" not in str(caught.value)


def test_truncated_and_missing_files(saved, tmp_path):
    path = saved[1]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a readable safetensors file: it is damaged or cut"):
        load_model(path)
    with pytest.raises(FileNotFoundError, match="no model at"):
        load_model(tmp_path / "nothing")


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")

    def fail(temporary):
        with open(temporary, "w") as file:
            file.write("half")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match=r"cannot write .*No space left"):
        write_atomically(path, fail)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_called_one(tmp_path, monkeypatch):
    """torch.save would say "unexpected pos 3546432 vs 3546324"."""

    def fail(temporary):
        raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos")

    with pytest.raises(OSError, match=r"cannot write .*unexpected pos"):
        write_atomically(tmp_path / "file", fail)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=4096))
    with pytest.raises(OSError, match=r"cannot write .*file: the disk is full$"):
        write_atomically(tmp_path / "file", fail)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_have_the_permissions_that_the_user_asks_for(tmp_path, mask):
    before = os.umask(mask)
    try:
        save_model(DeformableDETR(TINY), tmp_path / "model", CATEGORIES)
    finally:
        os.umask(before)
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o666 & ~mask


def test_categories_must_be_those_of_the_model(tmp_path):
    with pytest.raises(ValueError, match="3 classes, got 1"):
        save_model(DeformableDETR(TINY), tmp_path / "x", CATEGORIES[:1])
