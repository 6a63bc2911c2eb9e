"""use_backend: the operator's backend for all that runs inside a block."""

import asyncio
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointError, checkpoint

from deformable_detr import (
    BackendError,
    DeformableDETR,
    ms_deform_attn,
    use_backend,
)
from deformable_detr.layers.stack import Stack
from deformable_detr.ops import cpu, dispatch, keep_backend, reference
from deformable_detr.structures import Batch
from tests.conftest import TINY
from tests.oracle import SHAPES, make_inputs

needs_compiler = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))
FORMS = {
    "cpu": (cpu, "forward"),
    "cpu backward": (cpu, "backward"),
    "reference": (reference, "ms_deform_attn"),
    "gather": (reference, "ms_deform_attn_gather"),
}


@pytest.fixture
def ran(monkeypatch):
    """The names of the forms that have run, in order."""
    names = []

    def noted(name, function):
        return lambda *arguments: names.append(name) or function(*arguments)

    for name, (module, function) in FORMS.items():
        monkeypatch.setattr(module, function, noted(name, getattr(module, function)))
    return names


def run(backend=None):
    """The operator on small inputs, with value as a leaf."""
    value, locations, weights = make_inputs(D=4)
    return ms_deform_attn(value.requires_grad_(), SHAPES, locations, weights, backend)


class Layer(nn.Module):
    """The operator as a function of value alone."""

    def __init__(self):
        super().__init__()
        _, locations, weights = make_inputs(D=4)
        self.register_buffer("locations", locations)
        self.register_buffer("weights", weights)

    def forward(self, value):
        return ms_deform_attn(value, SHAPES, self.locations, self.weights)


@pytest.mark.parametrize("name", ["reference", "gather"])
def test_a_whole_model(ran, name):
    torch.manual_seed(0)
    model = DeformableDETR(TINY).eval()
    batch = Batch.from_images([torch.randn(3, 64, 96)])
    with torch.no_grad():
        expected = model(batch)
        ran.clear()
        with use_backend(name):
            output = model(batch)
    assert len(ran) >= TINY.encoder_layers + TINY.decoder_layers and set(ran) == {name}
    # forms sum in different orders; a few roundings of each layer
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=1e-4)


@needs_compiler
def test_blocks_nest_and_end_also_after_an_error(ran):
    with use_backend("gather"):
        with use_backend("reference"):
            run()
        run()
        with pytest.raises(ZeroDivisionError), use_backend("reference"):
            run()
            raise ZeroDivisionError
        run()
    run()
    assert ran == ["reference", "gather", "reference", "gather", "cpu"]


@needs_compiler
def test_argument_before_block_before_variable(ran, monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "cpu")
    run()
    with use_backend("gather"):
        run()
        run(backend="reference")
    assert ran == ["cpu", "gather", "reference"]


def test_an_automatic_choice_gives_way(ran):
    """Inside torch.func's transforms the operator would choose "gather"."""
    value, locations, weights = make_inputs(D=4)
    with use_backend("reference"):
        torch.func.vmap(lambda x: ms_deform_attn(x, SHAPES, locations, weights))(value[None])
    assert set(ran) == {"reference"}


# Refusals.


@pytest.mark.parametrize("name", ["fastest", "", None])
def test_an_unknown_name_is_refused_on_entering(name):
    message = f"use_backend must be one of cuda, cpu, reference, gather, got {name!r}"
    with pytest.raises(ValueError, match=message), use_backend(name):
        pytest.fail("entered")


def test_what_cannot_run_here_is_refused_on_entering(monkeypatch):
    monkeypatch.setattr(cpu, "why_not", lambda: "no C++ compiler")
    message = r"use_backend 'cpu' is not available: no C\+\+ compiler"
    with pytest.raises(BackendError, match=message), use_backend("cpu"):
        pytest.fail("entered")


@needs_compiler
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is")  # torch's own, in forward mode
def test_what_cannot_run_on_its_inputs_is_refused_by_the_operator():
    message = "use_backend 'cpu' needs tensors on cpu, got mps"
    with pytest.raises(BackendError, match=message):
        dispatch.choose(None, "cpu", "mps")
    value, locations, weights = make_inputs(D=4)
    operator = lambda x: ms_deform_attn(x, SHAPES, locations, weights).sum()  # noqa: E731
    refusal = pytest.raises(BackendError, match="use_backend 'cpu' has neither forward-mode")
    with use_backend("cpu"):
        with refusal:
            torch.func.grad(operator)(value)
        with torch.autograd.forward_ad.dual_level(), refusal:
            operator(torch.autograd.forward_ad.make_dual(value, value))


@needs_compiler
def test_shapes_alone_are_left_alone():
    value, locations, weights = (x.to("meta") for x in make_inputs(D=4))
    with use_backend("cpu"):
        assert ms_deform_attn(value, SHAPES, locations, weights).shape == (2, 3, 8)


# This thread and context alone.


def in_thread(function):
    """What the function returns in a thread of its own."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


@needs_compiler
def test_threads_do_not_inherit_it(ran):
    with use_backend("gather"):
        in_thread(run)
        run()
    assert ran == ["cpu", "gather"]


def test_tasks_do_not_share_it(ran):
    async def task(name, before, after):
        with use_backend(name):
            before.set()
            await after.wait()
            run()

    async def both():
        first, second = asyncio.Event(), asyncio.Event()
        await asyncio.gather(task("gather", first, second), task("reference", second, first))

    # in a thread of its own: a browser's tests leave a loop running in this one
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: asyncio.run(both())).result()
    assert sorted(ran) == ["gather", "reference"]
    assert dispatch.name_of_block() is dispatch._traced.name is None


# Backward passes.


@needs_compiler
def test_the_backward_pass_is_of_the_form_that_ran_forward(ran, monkeypatch):
    with use_backend("cpu"):
        inside = run()
    monkeypatch.setenv(dispatch.VARIABLE, "gather")
    outside = run()
    inside.sum().backward()
    with use_backend("cpu"):
        outside.sum().backward()
    assert ran == ["cpu", "gather", "cpu backward"]


@needs_compiler
@pytest.mark.parametrize("where", ["here", "in a thread"])  # as autograd's own on a GPU
@pytest.mark.parametrize("name", ["gather", None])
def test_a_layer_that_is_computed_again_keeps_its_backend(ran, name, where):
    stack = Stack().train()
    stack.gradient_checkpointing = True
    value = make_inputs(D=4)[0].requires_grad_()
    if name:
        with use_backend(name):
            output = stack.run(Layer(), value)
        output.sum().backward() if where == "here" else in_thread(output.sum().backward)
        assert ran == ["gather", "gather"]
    else:  # the other way round: chosen for another pass meanwhile
        output = stack.run(Layer(), value)
        with use_backend("gather"):
            output.sum().backward()
        assert ran == ["cpu", "cpu", "cpu backward"]
    expected = torch.autograd.grad(Layer()(value).sum(), value)[0]
    torch.testing.assert_close(value.grad, expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_other_code_keeps_it_too(ran, use_reentrant):
    value = make_inputs(D=4)[0].requires_grad_()
    with use_backend("gather"):
        output = checkpoint(keep_backend(Layer()), value, use_reentrant=use_reentrant)
    output.sum().backward()
    assert ran == ["gather", "gather"]


@needs_compiler
def test_code_that_forgets_is_told():
    """torch notices that what is computed again is something else."""
    value = make_inputs(D=4)[0].requires_grad_()
    with use_backend("gather"):
        output = checkpoint(Layer(), value, use_reentrant=False)
    with pytest.raises(CheckpointError):
        output.sum().backward()


# torch.compile and export.


@needs_compiler
@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_compiled_function_follows(monkeypatch, fullgraph):
    monkeypatch.setattr(dispatch, "_traced", dispatch._Traced())  # as in a new process
    torch._dynamo.reset()
    traced = []

    def note(graph, inputs):
        calls = " ".join(str(node.target) for node in graph.graph.nodes)
        names = {"ms_deform_attn": "cpu", "grid_sample": "reference", "index_select": "gather"}
        traced.append(next(name for call, name in names.items() if call in calls))
        return graph.forward

    compiled = torch.compile(Layer(), backend=note, fullgraph=fullgraph)
    value = make_inputs(D=4)[0]
    expected = compiled(value)
    for name in ("gather", "reference", "gather"):
        with use_backend(name):
            torch.testing.assert_close(compiled(value), expected)
            torch.testing.assert_close(in_thread(lambda: compiled(value)), expected)
    compiled(value)
    assert traced == ["cpu", "gather", "reference"]  # each once, and found again


@needs_compiler
def test_a_block_inside_a_compiled_function_breaks_its_graph(ran):
    torch._dynamo.reset()

    layer = Layer()

    def inside(value):
        with use_backend("gather"):
            return layer(value) * 2

    value = make_inputs(D=4)[0]
    expected = layer(value) * 2
    ran.clear()
    torch.testing.assert_close(torch.compile(inside, backend="eager")(value), expected)
    assert "cpu" not in ran
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"ContextVar"):
        torch.compile(inside, backend="eager", fullgraph=True)(value)
    torch.testing.assert_close(layer(value) * 2, expected)
    assert dispatch.name_of_block() is dispatch._traced.name is None


@pytest.mark.parametrize(("name", "expected"), [("gather", False), ("reference", True)])
def test_onnx_is_written_with_it(tmp_path, name, expected):
    onnx = pytest.importorskip("onnx")
    path = tmp_path / "operator.onnx"
    with use_backend(name):
        torch.onnx.export(Layer().eval(), (make_inputs(D=4)[0],), path, dynamo=True, verbose=False)
    operators = {node.op_type for node in onnx.load(path).graph.node}
    assert ("GridSample" in operators) == expected


def test_the_name_is_exported_and_costs_no_import():
    code = (
        "import sys; from deformable_detr import use_backend; print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True
    )
    assert done.stdout == "False\n"
