"""What every member of the family does alike: gradients everywhere, padding left aside, files,
detections, half precision, layers computed again."""

import dataclasses
import warnings

import pytest
import torch
from torch import nn

from deformable_detr import Batch, postprocess
from deformable_detr.evaluation.complexity import complexity
from deformable_detr.losses import SetCriterion
from deformable_detr.models import MODELS, build_model, model_name
from deformable_detr.weights.ours import load_model, save_model
from tests.members import build, make_batch, output_of, padded_more, tiny, without_gradient

CATEGORIES = [{"id": 3, "name": "red"}, {"id": 7, "name": "green"}, {"id": 20, "name": "blue"}]
every_member = pytest.mark.parametrize("name", MODELS)


@every_member
@pytest.mark.parametrize("counts", [(3, 1), (2, 0), (0, 0)])
def test_every_parameter_has_a_finite_gradient(name, counts):
    """Whatever objects there are, as processes that train together demand."""
    model, batch = build(tiny(name)).train(), make_batch(*counts)
    losses = SetCriterion()(model(batch), batch.targets)
    assert all(term.isfinite() for term in losses.values())
    assert not without_gradient(model, losses)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@every_member
def test_one_step_lowers_the_loss(name):
    """Of the same batch with the same random numbers."""
    model, batch = build(tiny(name)).train(), make_batch(2, 3)
    model.backbone.eval()
    # the same parameters that decide what is chosen, and small steps for the others
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    before = sum(SetCriterion()(output_of(model, batch), batch.targets).values())
    before.backward()
    optimizer.step()
    after = sum(SetCriterion()(output_of(model, batch), batch.targets).values())
    assert after < before


@every_member
@pytest.mark.parametrize("counts", [(2, 0, 5), (0, 1, 0)])
def test_the_parts_of_a_step_add_up_to_it(name, counts):
    """With the boxes of all, and for terms that are means each part's share of the images. Without
    denoising, whose places depend on the batch."""
    quiet = {field.name for field in dataclasses.fields(MODELS[name][0])}
    changes = {key: 0 for key in quiet & {"denoising_groups", "denoising_pairs"}}
    model = build(tiny(name, **changes)).train()
    model.backbone.eval()  # whose batch norm knows the batch
    batch = make_batch(*counts, sizes=((64, 80),) * 3)
    criterion, boxes = SetCriterion(), float(sum(counts))
    whole = criterion(output_of(model, batch), batch.targets, boxes)
    totals = dict.fromkeys(whole, 0.0)
    for i in range(3):
        part = Batch(*(x[i : i + 1] for x in (batch.images, batch.mask, batch.sizes)))
        part.targets = batch.targets[i : i + 1]
        for key, term in criterion(output_of(model, part), part.targets, boxes, 1 / 3).items():
            totals[key] += term
    for key, term in whole.items():
        torch.testing.assert_close(totals[key], term, rtol=1e-4, atol=1e-5, msg=key)


@every_member
def test_in_evaluation_queries_are_as_many_as_configured(name):
    model, batch = build(tiny(name)).eval(), make_batch(3, 1)
    output = model(batch)
    assert output.logits.shape[:2] == (2, 6) and output.boxes.shape == (2, 6, 4)
    assert output.groups == 1 and not output.losses
    assert not any("denoising" in each for each in output.others)
    (found, _) = postprocess(output, [(64, 80), (48, 96)], top_k=5)
    assert len(found) == 5 and (found.scores.diff() <= 0).all()


@every_member
def test_outputs_do_not_depend_on_padding(name):
    """Rubbish in further cells, which count as padding, changes nothing."""
    model, batch = build(tiny(name)).eval(), make_batch(1, 1)
    tokens = model.tokens(batch)
    plain, padded = (output_of(model, batch, x) for x in (tokens, padded_more(tokens)))
    torch.testing.assert_close(padded.logits, plain.logits, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(padded.boxes, plain.boxes, rtol=1e-3, atol=1e-4)


@every_member
def test_a_file_brings_back_the_model(name, tmp_path):
    model, batch = build(tiny(name)).eval(), make_batch(1, 1)
    save_model(model, tmp_path / "model.safetensors", CATEGORIES)
    again, categories = load_model(tmp_path / "model.safetensors")
    assert model_name(again.config) == name and again.config == model.config
    assert categories == CATEGORIES
    with torch.no_grad():
        assert torch.equal(again(batch).boxes, model(batch).boxes)


@every_member
def test_layers_computed_again_change_no_gradient(name):
    gradients = []
    for on in (False, True):
        model, batch = build(tiny(name)).train(), make_batch(3, 1)
        model.set_gradient_checkpointing(on)
        without_gradient(model, SetCriterion()(output_of(model, batch), batch.targets))
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for once, twice in zip(*gradients, strict=True):
        torch.testing.assert_close(once, twice, rtol=0, atol=0)


@every_member
def test_half_precision(name):
    """Everything that must be float32 is, and every gradient finite."""
    model, batch = build(tiny(name)).train(), make_batch(3, 1)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(batch)
    assert output.boxes.dtype == torch.float32
    losses = SetCriterion()(output.float(), batch.targets)
    assert not without_gradient(model, losses)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@every_member
def test_its_cost_is_counted(name):
    found = complexity(build_model(tiny(name)), (64, 96), repeats=0)
    assert {"backbone", "encoder", "decoder"} <= found.parts.keys()
    assert found.multiply_adds > 1e6


@every_member
def test_a_label_that_is_no_class_is_refused_in_one_line(name):
    model, batch = build(tiny(name)).train(), make_batch(2, 1)
    target = dataclasses.replace(batch.targets[0], labels=torch.tensor([0, 3]))
    batch = dataclasses.replace(batch, targets=[target, batch.targets[1]])
    with pytest.raises(ValueError, match=r"^image 0: labels must be in \[0, 3\), got \[3\]$"):
        SetCriterion()(model(batch), batch.targets)


@every_member
def test_dynamically_quantised(name):
    """Linear layers of eight bits: their weight is a method, from which nothing takes its dtype."""
    model, batch = build(tiny(name)).eval(), make_batch(3, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would have us move to torchao
        small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    assert any(isinstance(each, nn.quantized.dynamic.Linear) for each in small.modules())
    tokens = model.tokens(batch)
    with torch.no_grad():
        whole, found = (each.encoder(tokens).features for each in (model, small))
        output = small(batch)
    torch.testing.assert_close(found, whole, rtol=0, atol=0.3)  # of features of variance one
    assert output.logits.isfinite().all() and output.boxes.shape == (2, 6, 4)
