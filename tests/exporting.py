"""Every way out of PyTorch: a module becomes a function of tensors again, which is then asked at
sizes that it was not traced at."""

import warnings

import onnx
import onnxruntime
import torch
from torch.export import Dim

TRACED = (  # what the exporter that traces says of itself, and of comparisons of sizes
    "ignore:You are using the legacy TorchScript-based ONNX export",
    "ignore:The feature will be removed:DeprecationWarning",
    "ignore:Converting a tensor to a Python boolean",
    "ignore:.torch.jit.trace",
    "ignore:# The axis name",
)


def free(axes):
    """The axes of each input that are to stay free, for torch.export."""
    return tuple(dict.fromkeys(names, Dim.DYNAMIC) for names in axes.values())


def to_program(module, inputs, axes, path):
    program = torch.export.export(module, inputs, dynamic_shapes=free(axes))
    return program.module()


def to_program_to_onnx(module, inputs, axes, path):
    program = torch.export.export(module, inputs, dynamic_shapes=free(axes))
    assert "deformable_detr.ms_deform_attn.default" in str(program.graph)
    torch.onnx.export(program, (), path, input_names=list(axes), verbose=False)
    return runner(path)


def to_onnx_by_dynamo(module, inputs, axes, path):
    torch.onnx.export(
        module,
        inputs,
        path,
        dynamo=True,
        input_names=list(axes),
        dynamic_shapes=tuple(axes.values()),
        verbose=False,
    )
    return runner(path)


def to_onnx_by_tracing(module, inputs, axes, path):
    torch.onnx.export(module, inputs, path, dynamo=False, input_names=list(axes), dynamic_axes=axes)
    return runner(path)


def to_trace(module, inputs, axes, path):
    return torch.jit.trace(module, inputs, check_trace=False)


WAYS = (to_program, to_program_to_onnx, to_onnx_by_dynamo, to_onnx_by_tracing, to_trace)


def runner(path):
    """What onnxruntime makes of a file, as a function of tensors."""
    session = onnxruntime.InferenceSession(path)
    names = [entry.name for entry in session.get_inputs()]

    def run(*inputs):
        feed = {n: x.numpy() for n, x in zip(names, inputs, strict=True)}
        outputs = tuple(map(torch.from_numpy, session.run(None, feed)))
        return outputs if len(outputs) > 1 else outputs[0]

    return run


def operators(path):
    """The kinds of a file's nodes, one for each."""
    return [node.op_type for node in onnx.load(path).graph.node]


def assert_same_everywhere(module, way, axes, examples, path, **tolerance):
    """Traced at the first of these examples, the exported module is right at all of them."""
    module = module.eval().requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        exported = way(module, examples[0], axes, path)
    for inputs in examples:
        torch.testing.assert_close(
            exported(*inputs), module(*inputs), **(tolerance or {"atol": 1e-5, "rtol": 1e-5})
        )
