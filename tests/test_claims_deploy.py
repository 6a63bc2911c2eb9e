"""What chapter out_of_the_notebook says of graphs, ONNX and precision holds by itself."""

import threading
import warnings
from contextlib import ExitStack
from http.client import HTTPConnection
from http.server import HTTPServer
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import chapters as tool
from deformable_detr.export.graph import DetectorGraph
from deformable_detr.inference.detector import load_detector
from deformable_detr.inference.predict import predict
from deformable_detr.layers.attention import MSDeformAttn
from deformable_detr.look.sampling import replaced
from tests.exporting import operators, runner

DATA = Path(__file__).parents[1] / "data"
SOURCE = Path(__file__).parents[1] / "chapters" / "27_out_of_the_notebook.py"
FREE = torch.export.Dim.DYNAMIC
SHAPES = {0: FREE, 2: FREE, 3: FREE}, {0: FREE, 1: FREE}, {0: FREE, 1: FREE}


@pytest.fixture(scope="module")
def chapter():
    """The cells that define the modules, the inputs and the server, run without the others."""
    names = {"__name__": "chapter", "shapes": SHAPES}
    for cell in tool.read_source(SOURCE).cells:
        if cell.cell_type == "code" and ("import onnxruntime\n" in cell.source):
            exec(cell.source.split("plt.style")[0], names)
        for head in ("class Sample", "class Naive", "class Asks", "PAGE ="):
            if cell.cell_type == "code" and cell.source.startswith(head):
                text = cell.source.split("program = ")[0].split("\nsame = ")[0].split("\ntry:")[0]
                exec(text, names)
    return names


def traced(module, *inputs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(module, inputs)


def test_a_trace_freezes_a_size_without_an_error(chapter):
    """The one module only, and at another size only."""
    first, other = chapter["inputs"](2, 5, 8, 12), chapter["inputs"](3, 7, 6, 9)
    wrong, right = chapter["Naive"](), chapter["Sample"]()
    assert torch.equal(wrong(*other), right(*other))
    frozen, mended = traced(wrong, *first), traced(right, *first)
    assert torch.equal(frozen(*first), wrong(*first))
    assert (frozen(*other) - wrong(*other)).abs().max() > 0.3
    assert torch.equal(mended(*other), right(*other))


def test_a_program_follows_a_tensor_of_sizes_and_refuses_a_number(chapter):
    first, other = chapter["inputs"](2, 5, 8, 12), chapter["inputs"](3, 7, 6, 9)
    program = torch.export.export(chapter["Naive"](), first, dynamic_shapes=SHAPES)
    torch.testing.assert_close(program.module()(*other), chapter["Naive"]()(*other))
    with pytest.raises(torch._dynamo.exc.UserError, match="specialized it to be a constant"):
        torch.export.export(chapter["Asks"](), first, dynamic_shapes=SHAPES)


def test_a_branch_is_decided_while_the_graph_is_made():
    class Branch(nn.Module):
        def forward(self, x, double=True):
            return 2 * x if double else x.sin()

    program = torch.export.export(Branch(), (torch.ones(3),))
    names = [node.target.__name__ for node in program.graph.nodes if node.op == "call_function"]
    assert names == ["mul.Tensor"]


def test_grid_sample_is_in_onnx_since_version_16():
    assert onnx.defs.get_schema("GridSample", 16).since_version == 16
    with pytest.raises(onnx.defs.SchemaError):
        onnx.defs.get_schema("GridSample", 15)


def test_a_detector_without_its_card_is_a_graph_of_pixels():
    """What an exported file leaves to others: size, names and threshold, but no normalising."""
    detector = load_detector(DATA / "checkpoints" / "digits.safetensors")
    graph = DetectorGraph(detector.model.eval(), top_k=5)
    images = torch.rand(1, 3, 64, 96)
    batch = graph.batch(images, torch.tensor([[64, 80]]))
    assert batch.mask[..., 80:].all() and not batch.images[..., 80:].any()
    assert batch.images.mean().abs() > 0.1 and not torch.equal(batch.images, images)
    assert set(detector.card()) == {"threshold", "transforms"}


def test_places_stay_in_float32():
    """In a detector whose products are bfloat16; a step of such numbers is 4 of 1,000 pixels."""
    detector = load_detector(DATA / "checkpoints" / "digits.safetensors").in_precision("bf16")
    modules = [m for m in detector.model.modules() if isinstance(m, MSDeformAttn)]
    assert all(module.value_proj.weight.dtype == torch.bfloat16 for module in modules)
    dtypes = []

    def noting(sampling):
        def call(*arguments):
            found = sampling(*arguments)
            dtypes.append(found.locations.dtype)
            return found

        return call

    with ExitStack() as undo:
        for module in modules:
            undo.enter_context(replaced(module, "sampling", noting(module.sampling)))
        (found,) = predict(detector, DATA / "samples" / "000010.png")
    assert len(dtypes) == len(modules) and set(dtypes) == {torch.float32}
    assert found.boxes.dtype == torch.float32 and found.names == ["seven"]
    between = torch.nextafter(torch.tensor(0.5).bfloat16(), torch.tensor(1.0).bfloat16()) - 0.5
    assert 3.5 < 1000 * between < 4


def test_the_server_answers_what_is_no_picture_and_goes_on(chapter):
    chapter["detector"] = load_detector(DATA / "checkpoints" / "digits.safetensors")
    server = HTTPServer(("127.0.0.1", 0), chapter["Handler"])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        found = []
        for body in (b"no picture", b"", (DATA / "samples" / "000010.png").read_bytes()):
            connection = HTTPConnection("127.0.0.1", server.server_port, timeout=60)
            connection.request("POST", "/", body)
            answer = connection.getresponse()
            found.append((answer.status, answer.read().decode()))
            connection.close()
    finally:
        server.shutdown()
        server.server_close()
    assert [status for status, _ in found] == [400, 400, 200]
    assert '"seven"' in found[-1][1] and '"error"' in found[0][1]


def test_a_file_of_one_sample_needs_nothing_but_plain_operations(chapter, tmp_path):
    """The reader's own module leaves as the library's does, for any size."""
    first, other = chapter["inputs"](2, 5, 8, 12), chapter["inputs"](3, 7, 6, 9)
    program = torch.export.export(chapter["Sample"](), first, dynamic_shapes=SHAPES)
    torch.onnx.export(program, (), tmp_path / "sample.onnx", verbose=False)
    file = onnx.load(tmp_path / "sample.onnx")
    assert sum(node.op_type == "GridSample" for node in file.graph.node) == 1
    assert all(node.domain == "" for node in file.graph.node)
    run = runner(tmp_path / "sample.onnx")
    torch.testing.assert_close(run(*other), chapter["Sample"]()(*other), atol=1e-5, rtol=1e-5)


def test_the_variable_has_an_export_write_gathers(monkeypatch, tmp_path):
    """As chapter questions advises for programs whose GridSample is at fault."""
    module = MSDeformAttn(embed_dim=8, num_levels=1, num_heads=2, num_points=2).eval()
    given = torch.rand(1, 3, 8), torch.rand(1, 3, 1, 2), torch.rand(1, 20, 8)
    attend = _OfShapes(module, [(4, 5)]).eval()
    for name, expected in (("reference", True), ("gather", False)):
        monkeypatch.setenv("DEFORMABLE_DETR_BACKEND", name)
        torch.onnx.export(attend, given, tmp_path / f"{name}.onnx", dynamo=True, verbose=False)
        assert ("GridSample" in operators(tmp_path / f"{name}.onnx")) == expected
        torch.testing.assert_close(runner(tmp_path / f"{name}.onnx")(*given), attend(*given))


class _OfShapes(nn.Module):
    """An attention module with fixed sizes of maps."""

    def __init__(self, module, shapes):
        super().__init__()
        self.module, self.shapes = module, shapes

    def forward(self, query, references, value):
        return self.module(query, references, value, self.shapes)
