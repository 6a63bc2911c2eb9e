"""The detector computes what it computed before it was taken apart into a base and a member.

tests/golden/before.json holds outputs, losses and gradients of version 0.1, with the machine that
gave them. There the comparison is exact, bit by bit; elsewhere sums are added in another order, so
that norms are compared.
"""

import hashlib
import json
import zlib
from pathlib import Path

import pytest
import torch

from deformable_detr import Batch
from deformable_detr.data.coco import CocoDataset, collate
from deformable_detr.data.transforms import digits_eval_transform
from deformable_detr.losses import SetCriterion
from deformable_detr.models import DeformableDETR, DeformableDETRConfig
from deformable_detr.weights.ours import upgrade_name
from tests.golden import machine

ROOT = Path(__file__).parents[1]
BEFORE = json.loads((ROOT / "tests" / "golden" / "before.json").read_text())


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def padded_batch():
    """Three sample images of unlike sizes."""
    samples = ROOT / "data" / "samples"
    dataset = CocoDataset(samples, samples / "annotations.json", digits_eval_transform())
    batch = collate([dataset[i] for i in (2, 5, 11)])
    first, second, third = batch.images
    return Batch.from_images([first, second[:, :96, :112], third[:, :, :80]], batch.targets)


def filled(name, shape):
    """Numbers that depend on a tensor's old name only."""
    if name.endswith("num_batches_tracked"):
        return torch.ones(shape, dtype=torch.int64)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    numbers = torch.randn(shape, generator=generator) * 0.1
    return numbers.abs() + 0.5 if name.endswith("running_var") else numbers


def model_of(case):
    """Of these options, with filled tensors under their old names."""
    config = DeformableDETRConfig(**case["config"])
    model = DeformableDETR(config)
    state = {name: filled(name, shape) for name, shape in case["state"].items()}
    model.load_state_dict({upgrade_name(name, config): x for name, x in state.items()})
    return model


def digest(*tensors):
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().contiguous().numpy().tobytes())
    return total.hexdigest()


@pytest.mark.parametrize("name", BEFORE["cases"])
def test_outputs_losses_and_gradients_are_what_they_were(name):
    case, batch = BEFORE["cases"][name], padded_batch()
    model = model_of(case).eval()
    with torch.no_grad():
        output = model(batch)
    norms = {kind: getattr(output, kind).double().norm().item() for kind in ("logits", "boxes")}
    assert norms == pytest.approx({kind: case["evaluated"][kind] for kind in norms}, rel=1e-5)

    losses = SetCriterion()(model.train()(batch), batch.targets)
    sum(losses.values()).backward()
    assert losses.keys() == case["losses"].keys()
    values = {key: loss.item() for key, loss in losses.items()}
    assert values == pytest.approx(case["losses"], rel=1e-4)

    before = {upgrade_name(n, model.config): g for n, g in case["gradients"].items()}
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == before.keys()
    # float32 through ReLU: a number that is zero but for rounding may fall on either side
    largest = max(gradient["norm"] for gradient in before.values())
    for key, gradient in gradients.items():
        wanted = pytest.approx(before[key]["norm"], rel=1e-2, abs=1e-4 * largest)
        assert gradient.double().norm().item() == wanted, key
    if machine() == BEFORE["machine"]:
        assert digest(output.logits, output.boxes) == case["evaluated"]["sha256"]
        assert values == case["losses"]
        assert {key: digest(g) for key, g in gradients.items()} == {
            key: gradient["sha256"] for key, gradient in before.items()
        }
