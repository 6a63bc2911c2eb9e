"""Export to ONNX: the operator becomes gathers, and onnxruntime gives PyTorch's numbers."""

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from deformable_detr import MSDeformAttn, ms_deform_attn
from tests.oracle import SHAPES, make_inputs

pytestmark = [
    # of the exporter that traces
    pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX export"),
    pytest.mark.filterwarnings("ignore:The feature will be removed:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean"),
]


class Operator(nn.Module):
    def forward(self, value, locations, weights):
        return ms_deform_attn(value, SHAPES, locations, weights)


class Attention(MSDeformAttn):
    def forward(self, query, references, features, padding):
        return super().forward(query, references, features, SHAPES, padding)


def check(module, inputs, path, dynamo):
    torch.onnx.export(module.eval(), inputs, path, dynamo=dynamo)
    assert "GridSample" not in {node.op_type for node in onnx.load(path).graph.node}
    session = onnxruntime.InferenceSession(path)
    names = [entry.name for entry in session.get_inputs()]
    (given,) = session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})
    expected = module(*inputs).detach()
    torch.testing.assert_close(torch.from_numpy(given), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dynamo", [True, False])
def test_operator(tmp_path, dynamo):
    inputs = make_inputs(dtype=torch.float32)
    assert (inputs[1] < 0).any() and (inputs[1] > 1).any()
    check(Operator(), inputs, tmp_path / "operator.onnx", dynamo)


def test_module(tmp_path):
    torch.manual_seed(0)
    module = Attention(8, num_levels=3, num_heads=2, num_points=4)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    tokens = sum(height * width for height, width in SHAPES)
    inputs = torch.randn(2, 5, 8), torch.rand(2, 5, 3, 2), torch.randn(2, tokens, 8)
    padding = torch.rand(2, tokens) < 0.2
    check(module, (*inputs, padding), tmp_path / "module.onnx", dynamo=True)
