"""Where dense attention looked: weights that make its output, and nothing changes."""

import dataclasses

import pytest
import torch
from torch import nn

from deformable_detr import MSDeformAttn
from deformable_detr.look.attention import record_attention
from deformable_detr.look.sampling import record_sampling
from deformable_detr.models import DETR, DETRConfig
from tests.test_recording import batch_of, gradients, same, state_of, tiny

DENSE_TINY = DETRConfig(
    num_classes=3,
    num_queries=6,
    backbone="small",
    embed_dim=32,
    num_heads=2,
    encoder_layers=1,
    decoder_layers=2,
    ffn_dim=32,
)
CELLS = 6 * 10  # of stride 16, in a batch of 96 x 160


def dense():
    torch.manual_seed(0)
    return DETR(DENSE_TINY).eval()


def test_dense_attention_is_recorded_under_its_name():
    model = dense()
    with torch.no_grad(), record_attention(model) as record:
        assert not record
        model(batch_of((96, 130), (70, 160)))
    encoder, cross = "encoder.layers.0.attention", "decoder.layers.1.cross_attention"
    assert list(record) == [
        encoder,
        "decoder.layers.0.self_attention",
        "decoder.layers.0.cross_attention",
        "decoder.layers.1.self_attention",
        cross,
    ]
    assert record[encoder].weights.shape == (2, 2, CELLS, CELLS)
    assert record[cross].weights.shape == (2, 2, 6, CELLS)
    assert record[encoder].spatial_shapes == record[cross].spatial_shapes == [(6, 10)]
    queries = record["decoder.layers.1.self_attention"]
    assert queries.weights.shape == (2, 2, 6, 6) and queries.spatial_shapes is None
    for found in record.values():
        torch.testing.assert_close(found.weights.sum(-1), torch.ones_like(found.weights[..., 0]))
    padding = record[cross].weights[0].view(2, 6, 6, 10)[..., 9]  # beyond 130 of 160 pixels
    assert not padding.any()


def test_recorded_weights_make_the_modules_output():
    """Values weighted by them, through the last projection, are what it returned."""
    model, seen = dense(), []
    module = model.decoder.layers[1].cross_attention
    module.register_forward_hook(lambda _, arguments, output: seen.append((arguments[2], output)))
    with torch.no_grad(), record_attention(module) as record:
        model(batch_of((96, 130), (70, 160)))
        ((values, output),) = seen
        assert output[1] is None  # it ran as always
        values = nn.functional.linear(
            values, module.in_proj_weight[64:], module.in_proj_bias[64:]
        ).view(2, CELLS, 2, 16)
        mixed = torch.einsum("bmqs,bsmd->bqmd", record[""].weights, values).flatten(2)
        torch.testing.assert_close(module.out_proj(mixed), output[0])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_with_dense_attention_goes_on_as_without(checkpointing, autocast):
    """Bit by bit: with dropout, and where autocast keeps weights that it has narrowed."""
    model, batch = dense().train(), batch_of((96, 130), (70, 160))
    model.set_gradient_checkpointing(checkpointing)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = gradients(model, batch)
    before = state_of(model)
    with record_attention(model) as record, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert same(gradients(model, batch), expected)
    assert len(record) == 5 and state_of(model) == before
    assert not any(found.weights.requires_grad for found in record.values())


def test_half_precision_of_dense_attention():
    model, batch = dense(), batch_of((96, 130), (70, 160))
    with torch.no_grad(), record_attention(model) as exact:
        model(batch)
    batch = dataclasses.replace(batch, images=batch.images.bfloat16())
    with torch.no_grad(), record_attention(model.bfloat16()) as record:
        model(batch)
    for name, found in record.items():
        weights = found.weights.float()
        torch.testing.assert_close(weights, exact[name].weights, atol=0.02, rtol=0.1)


def test_no_hook_of_dense_attention_is_left_after_an_error():
    model = dense()
    before = state_of(model)
    with pytest.raises(RuntimeError, match="stop"), record_attention(model):
        raise RuntimeError("stop")
    assert state_of(model) == before


def test_each_recorder_refuses_the_other_models():
    with pytest.raises(ValueError, match="no module of DETR samples"), record_sampling(dense()):
        pass
    refused = pytest.raises(ValueError, match="no module of MSDeformAttn is dense attention")
    with refused, record_attention(MSDeformAttn(8, 1, 2, 1)):
        pass
    with record_attention(tiny()) as record:  # whose queries look at each other
        assert not record
