"""The studies: too long to run here, but what they are made of works."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from deformable_detr import DeformableDETR
from deformable_detr.backbones import build_backbone
from deformable_detr.evaluation.complexity import LiveTensors
from tests.conftest import TINY

FOLDER = Path(__file__).parents[1] / "experiments"


@pytest.fixture
def study(monkeypatch):
    """Imports one as `python experiments/name.py` would find it."""
    monkeypatch.syspath_prepend(FOLDER)
    yield importlib.import_module
    for path in FOLDER.glob("*.py"):
        sys.modules.pop(path.stem, None)


COMMANDS = [path.stem for path in FOLDER.glob("*.py") if "__main__" in path.read_text("utf-8")]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_study_can_be_imported_and_has_a_command(study, name):
    assert callable(study(name).main)


def test_crops_classifier_sees_three_strides(study):
    digits = study("digits")
    outputs = digits.CropClassifier(build_backbone("small"))(torch.rand(2, 3, 48, 48))
    assert [tuple(x.shape) for x in outputs] == [(2, 10)] * 3


def test_memory_of_every_part_is_counted(study):
    memory = study("memory")
    model = DeformableDETR(TINY)
    batch = memory.random_batch(memory.Size(48, 64, batch_size=2))
    assert [len(target.labels) for target in batch.targets] == [memory.BOXES] * 2
    with LiveTensors(list(model.parameters())) as live:
        kept = memory.watch(model, live)
        output = model(batch)
    assert list(kept) == list(memory.PARTS) and output.boxes.requires_grad
    assert all(count > 0 for count in kept.values())
