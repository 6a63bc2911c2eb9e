"""Where attention looked: every module is recorded, as it was, and nothing changes."""

import dataclasses

import pytest
import torch
from torch import nn

from deformable_detr import Batch, DeformableDETR, DeformAttn, MSDeformAttn, Sampling
from deformable_detr.layers import attention as attention_module
from deformable_detr.look.gradients import FollowReferences
from deformable_detr.look.sampling import record_sampling
from tests.conftest import TINY

NAMES = [
    "encoder.layers.0.attention",
    "decoder.layers.0.cross_attention",
    "decoder.layers.1.cross_attention",
]


def tiny(**changed):
    torch.manual_seed(0)
    model = DeformableDETR(dataclasses.replace(TINY, **changed)).eval()
    for module in model.modules():
        if isinstance(module, MSDeformAttn):  # or all queries would look alike
            nn.init.normal_(module.sampling_offsets.weight, std=0.1)
            nn.init.normal_(module.attention_weights.weight, std=0.1)
    return model


def batch_of(*sizes):
    torch.manual_seed(1)
    return Batch.from_images([torch.rand(3, *size) for size in sizes])


BATCH = ((48, 64), (40, 70))


def state_of(model):
    """All that a recorder could leave behind."""
    return {name: dict(vars(module)) for name, module in model.named_modules()}


def gradients(model, batch):
    """The output's boxes and logits, and all gradients, of a training pass with dropout."""
    torch.manual_seed(2)
    model.zero_grad()
    output = model(batch)
    (output.boxes.square().sum() + output.logits.square().sum()).backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [output.boxes.detach(), output.logits.detach(), *found]


def same(one, other):
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def same_record(one, other):
    return list(one) == list(other) and all(
        torch.equal(a.locations, b.locations)
        and torch.equal(a.weights, b.weights)
        and a.spatial_shapes == b.spatial_shapes
        for a, b in zip(one.values(), other.values(), strict=True)
    )


def test_every_module_is_recorded_under_its_name_in_the_order_of_the_pass():
    model = tiny()
    with record_sampling(model) as record:
        assert not record
        model(batch_of(*BATCH))
    assert list(record) == NAMES
    assert record.encoder == [record[NAMES[0]]]
    assert record.decoder == [record[name] for name in NAMES[1:]]
    assert record.encoder[0].locations.shape == (2, 6 * 9 + 3 * 5, 2, 2, 2, 2)
    assert record.decoder[0].locations.shape == (2, 6, 2, 2, 2, 2)
    assert record.decoder[0].weights.shape == (2, 6, 2, 2, 2)
    assert record.decoder[0].spatial_shapes == [(6, 9), (3, 5)]


def test_what_is_recorded_is_what_the_module_used_and_is_computed_once():
    model, asked, expected = tiny(), [], []

    def listen(module, arguments, _):
        query, references, _, shapes, *_ = arguments
        expected.append(type(module).sampling(module, query, references, shapes))

    def count(module, *_):
        asked.append(module)

    cross = [layer.cross_attention for layer in model.decoder.layers]
    handles = [module.register_forward_hook(listen) for module in cross]
    with torch.no_grad(), record_sampling(model) as record:
        model(batch_of(*BATCH))
    for found, own in zip(record.decoder, expected, strict=True):
        assert torch.equal(found.locations, own.locations)
        assert torch.equal(found.weights, own.weights)
    for handle in handles:
        handle.remove()
    for module in cross:
        module.sampling_offsets.register_forward_hook(count)
    with torch.no_grad(), record_sampling(model):
        model(batch_of(*BATCH))
    assert len(asked) == len(cross)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_is_recorded_once_and_goes_on_as_without(checkpointing):
    """Also where the backward pass computes every layer again."""
    model, batch = tiny().train(), batch_of(*BATCH)
    with record_sampling(model) as plain:
        expected = gradients(model, batch)
    assert same(gradients(model, batch), expected)
    model.set_gradient_checkpointing(checkpointing)
    runs = []
    model.encoder.layers[0].attention.sampling_offsets.register_forward_hook(
        lambda *_: runs.append(1)
    )
    with record_sampling(model) as record:
        found = gradients(model, batch)
    assert len(runs) == 1 + checkpointing
    assert same(found, gradients(model, batch))
    assert list(record) == NAMES and same_record(record, plain)
    assert not any(x.locations.requires_grad or x.weights.requires_grad for x in record.values())


@pytest.mark.parametrize("half", ["model", "autocast"])
def test_half_precision(half):
    model, batch = tiny(), batch_of(*BATCH)
    with torch.no_grad(), record_sampling(model) as exact:
        model(batch)
    if half == "model":
        model = model.bfloat16()
        batch = dataclasses.replace(batch, images=batch.images.bfloat16())
    with (
        torch.no_grad(),
        record_sampling(model) as record,
        torch.autocast("cpu", torch.bfloat16, enabled=half == "autocast"),
    ):
        model(batch)
    assert list(record) == NAMES
    encoder, expected = record.encoder[0], exact.encoder[0]
    assert encoder.locations.dtype == torch.float32  # coordinates are never rounded to 8 bits
    # offsets of about a pixel in maps of at least 3, rounded to 8 bits, from features so rounded
    torch.testing.assert_close(encoder.locations, expected.locations, atol=0.05, rtol=0)
    torch.testing.assert_close(encoder.weights.float(), expected.weights, atol=0.05, rtol=0)


def test_of_two_passes_the_last_counts():
    model, first, second = tiny(), batch_of((48, 64)), batch_of((24, 48))
    with torch.no_grad():
        with record_sampling(model) as alone:
            model(second)
        with record_sampling(model) as record:
            model(first)
            assert record.encoder[0].spatial_shapes == [(6, 8), (3, 4)]
            model(second)
    assert same_record(record, alone)


def test_nothing_is_left_behind():
    model, batch = tiny(), batch_of(*BATCH)
    before = state_of(model)
    with record_sampling(model) as record, record_sampling(model) as inner:
        model(batch)
    assert state_of(model) == before
    assert same_record(record, inner) and list(record) == NAMES
    kept = record[NAMES[0]]
    model(batch_of((24, 48)))
    assert record[NAMES[0]] is kept
    with pytest.raises(RuntimeError, match="stop"), record_sampling(model):
        raise RuntimeError("stop")
    assert state_of(model) == before


def test_a_pass_that_fails_spoils_no_later_one(monkeypatch):
    model, batch = tiny(), batch_of(*BATCH)
    with torch.no_grad(), record_sampling(model) as record:
        with monkeypatch.context() as patch, pytest.raises(ValueError, match="input_flatten"):
            layer = model.decoder.layers[0].cross_attention
            patch.setattr(layer, "embed_dim", 7)
            patch.setattr(attention_module, "check_queries", lambda *_: None)
            model(batch)
        model(batch)
    assert list(record) == NAMES
    with torch.no_grad(), record_sampling(model) as whole:
        model(batch)
    assert same_record(record, whole)


class Keywords(nn.Module):
    """Calls its attention by keywords only, in an order of its own, and once by hand."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, **arguments):
        self.attention.sampling(*[arguments[name] for name in list(arguments)[:2]], (5, 7))
        return self.attention(**arguments)


class Shifted(DeformAttn):
    """A subclass that looks elsewhere than its parent."""

    def sampling(self, query, reference_points, spatial_shape):
        found = super().sampling(query, reference_points, spatial_shape)
        return Sampling(found.locations + 0.25, found.weights, found.spatial_shapes)


@pytest.mark.parametrize("kind", [DeformAttn, Shifted])
def test_keyword_calls_and_subclasses(kind):
    torch.manual_seed(0)
    model = Keywords(kind(embed_dim=8, num_heads=2, num_points=3))
    arguments = {
        "query": torch.randn(2, 4, 8),
        "reference_points": torch.rand(2, 4, 2),
        "spatial_shape": (5, 7),
        "feature": torch.randn(2, 35, 8),
        "padding_mask": None,
    }
    with record_sampling(model) as record:
        output = model(**arguments)
    expected, own = model.attention(**arguments, return_sampling=True)
    assert torch.equal(output, expected)
    assert list(record) == ["attention"]
    assert torch.equal(record["attention"].locations, own.locations)
    assert torch.equal(record["attention"].weights, own.weights)


def test_a_module_alone_is_a_model_too():
    attention, shapes = MSDeformAttn(8, 2, 2, 1), [(2, 3), (1, 2)]
    with record_sampling(attention) as record:
        attention.sampling(torch.zeros(1, 2, 8), torch.zeros(1, 2, 2, 2), shapes)
        assert not record  # asked by hand, not by a forward pass
        attention(torch.zeros(1, 2, 8), torch.zeros(1, 2, 2, 2), torch.ones(1, 8, 8), shapes)
    assert list(record) == [""]


def test_references_may_be_followed_meanwhile():
    model, batch = tiny(), batch_of(*BATCH)
    with record_sampling(model) as plain:
        model(batch)
    with FollowReferences(), record_sampling(model) as record:
        output = model(batch)
    output.boxes.sum().backward()
    assert same_record(plain, record)


def test_a_model_in_which_nothing_samples():
    with (
        pytest.raises(ValueError, match=r"no module of Linear samples"),
        record_sampling(nn.Linear(2, 2)),
    ):
        pass
