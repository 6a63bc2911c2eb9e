"""The operator and its modules leave PyTorch on every way, for any batch and any size of maps, or
are refused in one line; what was not traced is compared too."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from deformable_detr import DeformAttn, MSDeformAttn, ms_deform_attn
from deformable_detr.integrations import MSDeformAttnFunction, use_in_transformers
from deformable_detr.ops import backends, use_backend
from tests.exporting import (
    TRACED,
    WAYS,
    assert_same_everywhere,
    free,
    operators,
    to_onnx_by_dynamo,
    to_onnx_by_tracing,
    to_program,
    to_program_to_onnx,
)

pytestmark = [
    *map(pytest.mark.filterwarnings, TRACED),
    pytest.mark.skipif(backends()["cpu"] != "available", reason=backends()["cpu"]),
]
needs_posix = pytest.mark.skipif(sys.platform == "win32", reason="AOTInductor")

M, D, K = 2, 4, 3
LEVELS = 2


class OfMaps(nn.Module):
    """The operator on maps, whose sizes are symbols."""

    def forward(self, fine, coarse, locations, weights):
        maps = fine, coarse
        value = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)
        value = value.view(*value.shape[:2], M, D)
        return ms_deform_attn(value, [x.shape[-2:] for x in maps], locations, weights)


class OfTensor(nn.Module):
    """The operator on sizes that stand in a tensor."""

    def forward(self, value, spatial_shapes, locations, weights):
        return ms_deform_attn(value, spatial_shapes, locations, weights)


class OfficialNames(nn.Module):
    """The operator as official code calls it."""

    def forward(self, value, spatial_shapes, starts, locations, weights):
        return MSDeformAttnFunction.apply(value, spatial_shapes, starts, locations, weights, 64)


class Attention(nn.Module):
    """The module on maps."""

    def __init__(self, single=False):
        super().__init__()
        make = DeformAttn if single else MSDeformAttn
        levels = () if single else (LEVELS,)
        self.attention = make(M * D, *levels, num_heads=M, num_points=K)
        self.single = single
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, query, references, fine, coarse):
        maps = (fine,) if self.single else (fine, coarse)
        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)
        shapes = [x.shape[-2:] for x in maps]
        return self.attention(
            query,
            references,
            tokens,
            shapes[0] if self.single else shapes,
            padding_mask=tokens[..., 0] > 1,
        )


def maps_of(batch, height, width):
    size = 2 * height, 2 * width
    return torch.randn(batch, M * D, *size), torch.randn(batch, M * D, height, width)


def points_of(batch, queries):
    """Locations that also leave the maps, and weights."""
    locations = torch.rand(batch, queries, M, LEVELS, K, 2) * 1.6 - 0.3
    return locations, torch.rand(batch, queries, M, LEVELS, K)


def sizes_of(height, width):
    return torch.tensor([[2 * height, 2 * width], [height, width]])


def of_maps(batch, queries, height, width):
    return *maps_of(batch, height, width), *points_of(batch, queries)


def of_tensor(batch, queries, height, width):
    value = torch.randn(batch, 5 * height * width, M, D)
    return value, sizes_of(height, width), *points_of(batch, queries)


def of_official(batch, queries, height, width):
    value, sizes, *points = of_tensor(batch, queries, height, width)
    return value, sizes, torch.tensor([0, 4 * height * width]), *points


MAPS = {
    "fine": {0: "batch", 2: "height2", 3: "width2"},
    "coarse": {0: "batch", 2: "height", 3: "width"},
}
POINTS = {"locations": {0: "batch", 1: "queries"}, "weights": {0: "batch", 1: "queries"}}
TOKENS = {"value": {0: "batch", 1: "tokens"}, "sizes": {}}
OPERATORS = {
    "maps": (OfMaps, of_maps, MAPS | POINTS),
    "tensor": (OfTensor, of_tensor, TOKENS | POINTS),
    "official": (OfficialNames, of_official, TOKENS | {"starts": {}} | POINTS),
}


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        *(("maps", way) for way in WAYS),
        *(("tensor", way) for way in (to_program_to_onnx, to_onnx_by_dynamo, to_onnx_by_tracing)),
        ("official", to_program),
    ],
)
def test_operator(tmp_path, kind, way):
    torch.manual_seed(0)
    make, inputs, axes = OPERATORS[kind]
    path = tmp_path / "operator.onnx"
    examples = [inputs(2, 5, 4, 6), inputs(3, 7, 9, 5)]
    assert_same_everywhere(make(), way, axes, examples, path)
    if path.exists():
        samples = operators(path).count("GridSample")
        # what is read from a tensor is no symbol, so that the exporter of programs knows no maps
        assert samples == (0 if kind != "maps" and way is not to_onnx_by_tracing else LEVELS)


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("points", to_program_to_onnx),
        ("points", to_onnx_by_dynamo),
        ("points", to_onnx_by_tracing),
        ("boxes", to_program_to_onnx),
        ("boxes", to_onnx_by_tracing),
        ("one level for all", to_onnx_by_tracing),
        ("single", to_program),
    ],
)
def test_module(tmp_path, kind, way):
    torch.manual_seed(0)

    def inputs(batch, queries, height, width):
        level = () if kind == "single" else (1 if kind == "one level for all" else LEVELS,)
        references = torch.rand(batch, queries, *level, 4 if kind == "boxes" else 2)
        return torch.randn(batch, queries, M * D), references, *maps_of(batch, height, width)

    of_queries = {0: "batch", 1: "queries"}
    axes = {"query": of_queries, "references": of_queries, **MAPS}
    examples = [inputs(2, 5, 4, 6), inputs(3, 7, 9, 5)]
    if kind == "single":
        examples = [(*example[:3], example[2]) for example in examples]
        axes["coarse"] = MAPS["fine"]
    module = Attention(kind == "single")
    assert_same_everywhere(module, way, axes, examples, tmp_path / "module.onnx")


def test_gathers_where_they_are_asked_for(tmp_path):
    path = tmp_path / "gather.onnx"
    examples = [of_maps(2, 5, 4, 6), of_maps(3, 7, 9, 5)]
    with use_backend("gather"):
        assert_same_everywhere(OfMaps(), to_onnx_by_dynamo, MAPS | POINTS, examples, path)
    assert "GridSample" not in operators(path)


def test_not_a_number_and_infinity_count_as_outside_in_a_file_too(tmp_path):
    fine, coarse, locations, weights = of_maps(2, 5, 4, 6)
    locations[0, 0, 0, 0, :, 0] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    examples = [(fine, coarse, locations, weights)]
    path = tmp_path / "nan.onnx"
    assert_same_everywhere(OfMaps(), to_onnx_by_tracing, MAPS | POINTS, examples, path)


# A program that froze a size is refused


class Frozen(nn.Module):
    def forward(self, fine, coarse, locations, weights):
        size = [tuple(map(int, x.shape[-2:])) for x in (fine, coarse)]
        return OfMaps()(fine, coarse, locations, weights) + size[0][0]


def test_what_freezes_a_size_is_no_program_for_any_size():
    with pytest.raises(torch._dynamo.exc.UserError, match="specialized it to be a constant"):
        to_program(Frozen(), of_maps(2, 5, 4, 6), MAPS | POINTS, None)


# Sizes in a tensor, where its numbers cannot be read


@pytest.mark.parametrize("module", [OfTensor(), OfficialNames()], ids=lambda m: type(m).__name__)
def test_whole_compilation_takes_tensors(module):
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    make = of_official if isinstance(module, OfficialNames) else of_tensor
    for sizes in ((2, 5, 4, 6), (3, 7, 9, 5)):
        inputs = make(*sizes)
        results = []
        for run in (module, compiled):
            leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
            output = run(*leaves)
            wanted = [x for x in leaves if x.requires_grad]
            results.append((output, *torch.autograd.grad(output.square().sum(), wanted)))
        torch.testing.assert_close(results[1], results[0])


def test_module_takes_a_tensor_under_whole_compilation():
    torch._dynamo.reset()
    torch.manual_seed(0)
    module = MSDeformAttn(M * D, LEVELS, M, K)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    query, references = torch.randn(2, 5, M * D), torch.rand(2, 5, LEVELS, 2)
    tokens, sizes = torch.randn(2, 5 * 4 * 6, M * D), sizes_of(4, 6)
    expected = module(query, references, tokens, sizes.tolist())
    torch.testing.assert_close(compiled(query, references, tokens, sizes), expected)


@pytest.mark.parametrize("move", [FakeTensorMode().from_tensor, lambda x: x.to("meta")])
def test_tensors_without_numbers_give_a_shape(move):
    output = ms_deform_attn(*map(move, of_tensor(2, 5, 4, 6)))
    assert output.shape == (2, 5, M * D) and output.dtype == torch.float32


def test_a_program_reads_sizes_when_it_runs_and_refuses_wrong_ones():
    inputs = of_tensor(2, 5, 4, 6)
    program = to_program(OfTensor(), inputs, TOKENS | POINTS, None)
    value, _, *points = inputs
    with pytest.raises(ValueError, match=re.escape("[(8, 12), (4, 7)] hold 124 tokens, but value")):
        program(value, torch.tensor([[8, 12], [4, 7]]), *points)


@pytest.mark.parametrize("sizes", [torch.ones(2, 3), torch.ones(2), torch.ones(2, 2)])
def test_a_tensor_that_holds_no_sizes_is_refused_while_it_is_traced(sizes):
    value, _, *points = of_tensor(2, 5, 4, 6)
    with pytest.raises(ValueError, match=r"must be L >= 1 pairs \(H, W\) of ints, got") as error:
        torch.export.export(OfTensor(), (value, sizes, *points))
    assert f"{tuple(sizes.shape)}, torch.float32" in str(error.value).splitlines()[0]


# References of one level


@pytest.mark.parametrize("width", [2, 4])
def test_references_of_one_level_are_for_all(width):
    torch.manual_seed(0)
    module = MSDeformAttn(M * D, LEVELS, M, K)
    query, references = torch.randn(2, 5, M * D), torch.rand(2, 5, 1, width)
    tokens, shapes = torch.randn(2, 5 * 4 * 6, M * D), [(8, 12), (4, 6)]
    expected = module(query, references.expand(-1, -1, LEVELS, -1), tokens, shapes)
    torch.testing.assert_close(module(query, references, tokens, shapes), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"must be \(B=2, Q=5, L=2 or 1, 2 or 4\), got \(2, 5, 3"):
        module(query, references.expand(-1, -1, 3, -1), tokens, shapes)


# Saved programs know the operator by its name


LOAD = """
import sys, torch
{first}
inputs, expected = torch.load(sys.argv[2])
load = torch.export.load if sys.argv[1] == "program" else torch._inductor.aoti_load_package
run = load(sys.argv[3])
run = run.module() if sys.argv[1] == "program" else run
torch.testing.assert_close(run(*inputs), expected)
print("the same")
"""


def load_elsewhere(kind, first, folder):
    """Another process's output, and what it said of an error."""
    files = [str(folder / name) for name in ("example.pt", "program.pt2")]
    done = subprocess.run(
        [sys.executable, "-c", LOAD.format(first=first), kind, *files],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    return done.stdout.strip(), done.stderr


def save_example(folder):
    torch.manual_seed(0)
    traced, other = of_maps(2, 5, 4, 6), of_maps(3, 7, 9, 5)
    program = torch.export.export(OfMaps(), traced, dynamic_shapes=free(MAPS | POINTS))
    torch.save((other, OfMaps()(*other)), folder / "example.pt")
    return program


@pytest.mark.filterwarnings("ignore")
def test_a_saved_program_needs_the_operator_imported(tmp_path):
    torch.export.save(save_example(tmp_path), tmp_path / "program.pt2")
    assert load_elsewhere("program", "import deformable_detr.ops", tmp_path)[0] == "the same"
    output, error = load_elsewhere("program", "", tmp_path)
    assert not output and "error when deserializing" in error


@pytest.fixture
def as_where_ci_is_set(monkeypatch, tmp_path):
    """Inductor is strict about decompositions there, the first time it meets an operator. Code that
    it keeps of another instruction set does not compile for this one."""
    from torch._inductor import lowering

    monkeypatch.setenv("CI", "true")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.delitem(
        lowering.lowerings, torch.ops.deformable_detr.ms_deform_attn.default, raising=False
    )


@needs_posix
def test_inductor_compiles_both_passes(as_where_ci_is_set):
    torch._dynamo.reset()
    module = MSDeformAttn(16, 2, 2, 2)
    query, memory = torch.randn(2, 1, 22, 16).unbind()
    sizes = [(4, 4), (2, 3)]

    def gradient(attend):
        leaf = memory.clone().requires_grad_()
        attend(
            query, torch.rand(1, 22, 2, 2, generator=torch.manual_seed(0)), leaf, sizes
        ).sum().backward()
        return leaf.grad

    torch.testing.assert_close(gradient(torch.compile(module, fullgraph=True)), gradient(module))


@needs_posix
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_package_needs_the_operator_imported(tmp_path, as_where_ci_is_set):
    torch._inductor.aoti_compile_and_package(
        save_example(tmp_path), package_path=str(tmp_path / "program.pt2")
    )
    assert load_elsewhere("package", "import deformable_detr.ops", tmp_path)[0] == "the same"
    output, error = load_elsewhere("package", "", tmp_path)
    assert not output and "Could not find schema for deformable_detr::ms_deform_attn" in error


# Other people's exporters


@pytest.mark.filterwarnings("ignore")
def test_the_exporter_of_transformers_takes_our_operator(tmp_path):
    exporter = pytest.importorskip("transformers.exporters.exporter_onnx")
    import transformers

    torch.manual_seed(0)
    config = transformers.DeformableDetrConfig(
        backbone_config=transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, out_indices=[2, 3, 4]
        ),
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=7,
    )
    model = transformers.DeformableDetrModel(config).eval()
    inputs = {
        "pixel_values": torch.randn(2, 3, 64, 96),
        "pixel_mask": torch.ones(2, 64, 96, dtype=torch.long),
    }
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state  # of their own operator
    with use_in_transformers(model):
        exported = exporter.OnnxExporter().export(model, dict(inputs), exporter.OnnxConfig())
    kinds = [node.op_type for node in exported.program.graph]
    assert kinds.count("GridSample") == 2 * config.num_feature_levels
    given = torch.as_tensor(exported(**inputs)["last_hidden_state"])
    torch.testing.assert_close(given, expected, atol=1e-4, rtol=1e-4)
