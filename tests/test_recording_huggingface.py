"""Where attention of Hugging Face's models looked: every family that has the operator."""

import pytest
import torch

from deformable_detr.integrations import use_in_transformers
from deformable_detr.look.sampling import record_sampling
from tests.test_integrations import FAMILIES, build, calls, run  # noqa: F401
from tests.test_recording import same_record, state_of


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_transformers(family, calls):  # noqa: F811
    """With their own operator and with ours, which tells what it was given."""
    model = build(family)
    before = state_of(model)
    expected = run(model, family)
    with record_sampling(model) as theirs:
        found = run(model, family)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    with use_in_transformers(model), record_sampling(model) as ours:
        run(model, family)
    assert len(ours) == len(calls) == FAMILIES[family][1]
    assert list(theirs) == list(ours)
    names = {name for name, module in model.named_modules() if hasattr(module, "sampling_offsets")}
    assert set(ours) == names
    for name, (_, shapes, locations, weights) in zip(ours, calls, strict=True):
        assert (
            ours[name].spatial_shapes == theirs[name].spatial_shapes == [tuple(x) for x in shapes]
        )
        assert torch.equal(ours[name].locations, locations)
        assert torch.equal(ours[name].weights, weights)
        # theirs and ours agree in all but rounding, which the layers before have passed on
        torch.testing.assert_close(theirs[name].locations, locations.detach())
        torch.testing.assert_close(theirs[name].weights, weights.detach())
        torch.testing.assert_close(weights.sum((-2, -1)), torch.ones_like(weights[..., 0, 0]))
    assert state_of(model) == before


@pytest.mark.parametrize("family", ["deformable_detr", "rt_detr", "rt_detr_v2", "d_fine"])
def test_layers_of_transformers(family):
    model = build(family)
    with torch.no_grad(), record_sampling(model) as record:
        model(pixel_values=torch.randn(2, 3, 64, 96, dtype=torch.float64))
    assert record["decoder.layers.0.encoder_attn"] is record.decoder[0]
    assert len(record.decoder) == 2
    levels, points = {"deformable_detr": (4, 4), "d_fine": (3, 6)}.get(family, (3, 4))
    assert record.decoder[-1].locations.shape == (2, 7, 2, levels, points, 2)
    assert len(record.encoder) == (family == "deformable_detr")


def test_checkpointing_of_transformers():
    model = build("deformable_detr").train()
    torch.manual_seed(0)
    with record_sampling(model) as plain:
        run(model, "deformable_detr")
    old = "gradient_checkpointing_enable"  # its name before 5.23
    getattr(model, "activation_checkpointing_enable", getattr(model, old))()
    with record_sampling(model) as record:
        run(model, "deformable_detr")
    assert same_record(record, plain)


@pytest.mark.parametrize("half", ["model", "autocast"])
def test_half_precision_of_transformers(half):
    model = build("deformable_detr").float()
    images = torch.randn(1, 3, 64, 96)
    if half == "model":
        model, images = model.bfloat16(), images.bfloat16()
    with (
        torch.no_grad(),
        record_sampling(model) as record,
        torch.autocast("cpu", torch.bfloat16, enabled=half == "autocast"),
    ):
        model(pixel_values=images)
    assert len(record) == 3
    assert all(sampling.locations.isfinite().all() for sampling in record.values())


def test_another_model_that_shares_a_function_is_not_recorded():
    """RT-DETR v2 calls a function of its file, which all models of that kind share."""
    model, other = build("rt_detr_v2"), build("rt_detr_v2")
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad(), record_sampling(model) as record:
        model(pixel_values=images)
        kept = dict(record)
        other(pixel_values=images)
    assert kept and all(record[name] is kept[name] for name in record)


def test_discrete_sampling_is_recorded_too():
    model = build("rt_detr_v2")
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    for module in model.modules():
        if hasattr(module, "method"):
            module.method = "discrete"
    with torch.no_grad(), record_sampling(model) as record:
        model(pixel_values=images)
    assert len(record.decoder) == 2


def test_a_subclass_of_ones_own_is_recorded():
    """Of RT-DETR v2's, whose function is in the file of the parent."""
    model = build("rt_detr_v2")
    for module in model.modules():
        if type(module).__name__ == "RTDetrV2MultiscaleDeformableAttention":
            module.__class__ = type("Mine", (type(module),), {"__module__": "mine"})
    with torch.no_grad(), record_sampling(model) as record:
        model(pixel_values=torch.randn(1, 3, 64, 64, dtype=torch.float64))
    assert len(record.decoder) == 2
