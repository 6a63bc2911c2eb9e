"""Detectors as programs and ONNX files: right at any batch and any size, or refused in one line."""

import json
import re
import warnings
from dataclasses import replace

import onnx
import pytest
import torch
from torch import nn

from deformable_detr import Batch, DeformableDETRConfig, postprocess
from deformable_detr.cli import main
from deformable_detr.cli.arguments import SHIPPED
from deformable_detr.data.transforms import MEAN, STD
from deformable_detr.export import onnx as export_onnx
from deformable_detr.export.check import TOLERANCE, difference
from deformable_detr.export.graph import INPUTS, DetectorGraph
from deformable_detr.export.onnx import to_onnx
from deformable_detr.export.program import DYNAMIC, example, make_graph, to_program
from deformable_detr.inference.detector import Detector, load_detector
from deformable_detr.models import DETRConfig, build_model
from tests.exporting import (
    TRACED,
    operators,
    runner,
    to_onnx_by_dynamo,
    to_onnx_by_tracing,
    to_trace,
)

pytestmark = list(map(pytest.mark.filterwarnings, TRACED))

SIZE = 64, 96
OTHERS = [(3, 80, 73), (1, 50, 130)]
SHAPE = {
    "num_classes": 5,
    "num_queries": 20,
    "backbone": "small",
    "embed_dim": 32,
    "num_heads": 4,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "ffn_dim": 32,
}
LEVELS = {"num_levels": 2, "num_points": 2}
CONFIGS = {
    "one stage": DeformableDETRConfig(**SHAPE, **LEVELS),
    "two stages": DeformableDETRConfig(
        **SHAPE | {"decoder_layers": 2}, **LEVELS, refine=True, two_stage=True
    ),
    "detr": DETRConfig(**SHAPE),
}
CATEGORIES = [{"id": 3 * i, "name": f"class {i}"} for i in range(5)]


def make(config):
    """A model whose every number counts."""
    torch.manual_seed(0)
    model = build_model(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter)
        else:
            nn.init.normal_(parameter, 1.0 if "norm" in name and "weight" in name else 0.0, 0.2)
    return model


@pytest.fixture(scope="module", params=CONFIGS)
def written(request, tmp_path_factory):
    """A file of a detector for any size, and its graph."""
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    detector = Detector(make(CONFIGS[request.param]), CATEGORIES, 0.3)
    checks = to_onnx(detector, path, SIZE, top_k=12)
    assert [(c.batch, c.height, c.width) for c in checks] == [
        (1, 64, 96),
        (2, 49, 108),
        (3, 72, 73),
    ]
    assert max(check.difference for check in checks) <= 1e-4
    return path, make_graph(detector.model, 12)


def far(graph, run, inputs):
    with torch.no_grad():
        return difference(graph(*inputs)[:2], run(*inputs)[:2])


def test_a_file_is_right_at_any_size(written):
    path, graph = written
    run = runner(path)
    # of the last, the coarsest map has one row
    for shape in ((2, *SIZE), *OTHERS, (2, 16, 40)):
        assert far(graph, run, example(*shape)) <= 1e-4
    assert "GridSample" in operators(path) or "MSDeformAttn" not in str(graph)


def test_a_files_detections_are_those_of_postprocess(written):
    path, graph = written
    images, sizes = example(*OTHERS[0])
    outputs = dict(zip(graph.outputs, runner(path)(images, sizes), strict=True))
    assert list(outputs) == ["logits", "boxes", "scores", "labels", "pixel_boxes"]
    normal = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    each = [x[:, :h, :w] for x, (h, w) in zip(normal, sizes.tolist(), strict=True)]
    with torch.no_grad():
        expected = postprocess(graph.model(Batch.from_images(each)), sizes.tolist(), top_k=12)
    for i, found in enumerate(expected):
        # untrained scores are near one another, so that their order may differ
        assert torch.allclose(outputs["scores"][i], found.scores, atol=1e-4)
        given = [outputs[n][i : i + 1] for n in ("scores", "labels", "pixel_boxes")]
        wanted = [x[None] for x in (found.scores, found.labels, found.boxes)]
        assert difference(wanted, given) <= 1e-2  # pixels


def test_a_file_says_what_it_is(written):
    model = onnx.load(written[0])
    facts = {p.key: json.loads(p.value) for p in model.metadata_props}
    assert facts["categories"] == CATEGORIES and facts["threshold"] == 0.3
    assert facts["model"] in ("DETR", "DeformableDETR") and "short_side" in facts
    axes = [
        [d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim]
        for x in model.graph.input
    ]
    assert axes == [["batch", 3, "height", "width"], ["batch", 2]]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("way", [to_onnx_by_tracing, to_trace])
def test_tracing_is_right_at_any_size_too(tmp_path, kind, way):
    graph = make_graph(make(CONFIGS[kind]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        run = way(graph, example(2, *SIZE), DYNAMIC, tmp_path / "model.onnx")
    for shape in ((2, *SIZE), *OTHERS):
        assert far(graph, run, example(*shape)) <= 1e-4


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_program_is_right_at_any_size(kind):
    graph = make_graph(make(CONFIGS[kind]))
    run = to_program(graph, SIZE).module()
    for shape in ((2, *SIZE), *OTHERS):
        assert far(graph, run, example(*shape)) == 0


def test_the_exporter_of_modules_is_right_at_any_size(tmp_path):
    graph = make_graph(make(replace(CONFIGS["one stage"], num_levels=1)))
    run = to_onnx_by_dynamo(graph, example(2, *SIZE), DYNAMIC, tmp_path / "model.onnx")
    for shape in ((2, *SIZE), *OTHERS):
        assert far(graph, run, example(*shape)) <= 1e-4


@pytest.mark.parametrize(
    "changes", [{"position": "learned"}, {"exact_padding": True}, {"num_levels": 4}], ids=str
)
def test_variants_trace_at_any_size(tmp_path, changes):
    graph = make_graph(make(replace(CONFIGS["one stage"], **changes)))
    run = to_onnx_by_tracing(graph, example(2, *SIZE), DYNAMIC, tmp_path / "model.onnx")
    for shape in ((2, *SIZE), *OTHERS):
        assert far(graph, run, example(*shape)) <= 1e-4


def test_a_fixed_file_is_for_one_image(tmp_path):
    path = tmp_path / "fixed.onnx"
    model = make(CONFIGS["detr"]).train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    (check,) = to_onnx(model, path, SIZE, dynamic=False)
    assert (check.batch, check.height, check.width) == (1, *SIZE)
    shapes = [entry.type.tensor_type.shape.dim for entry in onnx.load(path).graph.input]
    assert [[axis.dim_value for axis in shape] for shape in shapes] == [[1, 3, *SIZE], [1, 2]]
    with pytest.raises(Exception, match="Got invalid dimensions for input: images"):
        runner(path)(*example(1, 50, 130))
    # the model is as it was
    assert model.training and all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


# Refused


class Frozen(DetectorGraph):
    """Writes down the size at which it is traced."""

    def forward(self, images, sizes):
        logits, boxes = super().forward(images, sizes)
        return logits + int(images.shape[2]), boxes


def test_a_program_with_a_frozen_size_is_refused():
    graph = Frozen(make(CONFIGS["detr"])).eval().requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"^torch.export does not take this model for any"
    ) as error:
        to_program(graph, SIZE)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [(16, 40), (40, 16)])
def test_a_program_for_any_size_starts_from_maps_of_two_rows(size):
    graph = make_graph(make(CONFIGS["detr"]))
    text = f"cannot start from {size[0]} x {size[1]}, of which the coarsest map is "
    with pytest.raises(ValueError, match=re.escape(text)):
        to_program(graph, size)
    images, sizes = example(1, *size)
    run = to_program(graph, size, dynamic=False).module()
    assert far(graph, run, (images, sizes)) == 0


class Grows(DetectorGraph):
    """What it says depends on the height of the images, but for one height."""

    def forward(self, images, sizes):
        logits, boxes = super().forward(images, sizes)
        return logits + (images.shape[2] - SIZE[0]), boxes


def test_a_file_that_froze_something_in_silence_is_not_written(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_text("what was there")
    model = make(CONFIGS["detr"])
    frozen = to_program(make_graph(model), SIZE)
    monkeypatch.setattr(export_onnx, "to_program", lambda *_: frozen)
    monkeypatch.setattr(export_onnx, "make_graph", lambda model, _: Grows(model).eval())
    with pytest.raises(ValueError, match=r"^no file is written, it would be wrong; 2 of 49 x 108"):
        to_onnx(model, path, SIZE)
    assert path.read_text() == "what was there" and len(list(tmp_path.iterdir())) == 1


class NotOnnx(nn.Module):
    def forward(self, images, sizes):
        return torch.linalg.svdvals(images.flatten(1)), sizes


def test_what_onnx_does_not_know_is_one_line():
    program = torch.export.export(NotOnnx(), example(2, *SIZE))
    graph = make_graph(make(CONFIGS["detr"]))
    with pytest.raises(ValueError, match=r"^ONNX does not take this model: .*svd") as error:
        export_onnx.translate(program, graph, dynamic=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"size": (0, 64)}, r"size must be \(height, width\) of at least 1, got \(0, 64\)"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, arguments, text):
    with pytest.raises(ValueError, match=text):
        to_onnx(make(CONFIGS["detr"]), tmp_path / "model.onnx", **arguments)


def test_without_the_extra_one_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export_onnx, "NEEDED", ("onnx", "no_such_package"))
    path = tmp_path / "model.onnx"
    assert main(["export", str(SHIPPED), "--output", str(path)]) == 2
    assert capsys.readouterr().err == (
        "error: ONNX export needs no_such_package: pip install 'deformable-detr[export]'\n"
    )
    assert not path.exists()


def test_differences_are_of_rows_in_any_order():
    rows = [torch.randn(2, 6), torch.randn(2, 6, 4)]
    order = torch.randperm(6)
    assert difference(rows, [x[:, order] for x in rows]) == 0
    other = [x.clone() for x in rows]
    other[1][1, 3, 2] += 0.5
    assert difference(rows, other) == difference(other, rows) == pytest.approx(0.5)
    assert difference(rows, [x[:, :5] for x in rows]) == float("inf")
    assert not difference(rows, [x * torch.nan for x in rows]) <= TOLERANCE


# The command


def test_the_command_writes_the_shipped_detector(tmp_path, capsys):
    path = tmp_path / "digits.onnx"
    command = ["export", str(SHIPPED), "--output", str(path), "--size", "96", "128", "--fixed"]
    assert main([*command, "--top-k", "5"]) == 0
    told = capsys.readouterr()
    steps = [line.split()[1] for line in told.err.splitlines() if " of 3: " in line]
    assert steps == ["1", "2", "3"]  # as minutes pass
    lines = told.out.splitlines()
    assert lines[0].startswith("1 of 96 x 128: PyTorch and onnxruntime are ")
    assert lines[1:] == [f"written: {path}"]
    graph = make_graph(load_detector(SHIPPED).model, 5)
    inputs = example(1, 96, 128)
    scores = dict(zip(graph.outputs, runner(path)(*inputs), strict=True))["scores"]
    with torch.no_grad():
        torch.testing.assert_close(scores, graph(*inputs)[2], atol=1e-4, rtol=0)


def test_inputs_are_named_as_they_are():
    assert tuple(DYNAMIC) == INPUTS
