"""Every recipe of book/recipes.md, run as it stands there, on a module with the project's layout.

A stand-in calls the operator as its project does. What a recipe should replace, fails in it.
"""

import importlib.machinery
import re
import subprocess
import sys
from itertools import accumulate
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from deformable_detr import MSDeformAttn, integrations
from deformable_detr.ops import ms_deform_attn, operator, reference
from tests import test_integrations as transformers_models

PAGE = Path(__file__).parent.parent / "book" / "recipes.md"
SECTIONS = {
    section.splitlines()[0]: "\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL))
    for section in re.split(r"^##? ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
}
IMPORTS = SECTIONS.pop("Recipes for other projects")
SHAPES = [(5, 7), (3, 4)]

# An extension, and the autograd function that calls it: the official code's, and all that copy it
FUNCTION = """
class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, shapes, starts, locations, weights, step):
        ctx.step = step
        ctx.save_for_backward(value, shapes, starts, locations, weights)
        return _C.ms_deform_attn_forward(value, shapes, starts, locations, weights, ctx.step)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        value, place, weight = _C.ms_deform_attn_backward(*ctx.saved_tensors, grad, ctx.step)
        return value, None, None, place, weight, None
"""
OFFICIAL = f"import torch\nimport MultiScaleDeformableAttention as _C\n{FUNCTION}"
ON_A_CPU = """
def multi_scale_deformable_attn_pytorch(value, shapes, locations, weights):
    raise AssertionError("theirs")

def on_a_cpu(*arguments):
    return multi_scale_deformable_attn_pytorch(*arguments)
"""
MMCV = f"""
class MultiScaleDeformableAttnFunction:
    def apply(*arguments):
        raise AssertionError("theirs")
{ON_A_CPU}
def on_a_gpu(*arguments):
    return MultiScaleDeformableAttnFunction.apply(*arguments)
"""
RF_DETR = """
def ms_deform_attn_core_pytorch(value, shapes, locations, weights, value_spatial_shapes_hw=None):
    raise AssertionError("theirs")

def run(*arguments, **pairs):
    return ms_deform_attn_core_pytorch(*arguments, **pairs)
"""


@pytest.fixture
def install(monkeypatch):
    """Puts a module of this source and name where it will be imported, and packages around it."""

    def put(name, source=""):
        for end in [m.start() for m in re.finditer(r"\.", name)] + [len(name)]:
            path = name[:end]
            if path not in sys.modules:
                module = ModuleType(path)
                module.__path__ = []
                monkeypatch.setitem(sys.modules, path, module)
                if "." in path:
                    parent, _, child = path.rpartition(".")
                    setattr(sys.modules[parent], child, module)
        exec(source, vars(sys.modules[name]))
        return sys.modules[name]

    before = set(sys.modules)
    yield put
    for name in {"detrex._C", "groundingdino._C", integrations.OFFICIAL_NAME} - before:
        sys.modules.pop(name, None)


@pytest.fixture
def follow(monkeypatch):
    """Runs a section's code."""

    def run(section, **names):
        exec(IMPORTS + SECTIONS[section], names)
        return names

    return run


def inputs(points=None):
    """Value, locations and weights; with a number of points for each level, on one axis."""
    torch.manual_seed(0)
    axes = (2, 3) if points is None else (sum(points),)
    value = torch.randn(2, 47, 2, 4, dtype=torch.float64)
    locations = torch.rand(2, 6, 2, *axes, 2, dtype=torch.float64)
    weights = torch.rand(2, 6, 2, *axes, dtype=torch.float64)
    return [x.requires_grad_() for x in (value, locations, weights)]


def expected(value, locations, weights, points=None):
    """The plain form; levels of unlike numbers of points one after another."""
    if points is None:
        return reference.ms_deform_attn(value, SHAPES, locations, weights)
    starts = [0, *accumulate(h * w for h, w in SHAPES)]
    parts = zip(SHAPES, starts, locations.split(points, 3), weights.split(points, 3), strict=False)
    return sum(
        reference.ms_deform_attn(
            value[:, start : start + h * w], [(h, w)], place.unsqueeze(3), weight.unsqueeze(3)
        )
        for (h, w), start, place, weight in parts
    )


@pytest.fixture
def same(monkeypatch):
    """Whether theirs(value, locations, weights) is the operator, by ours, with its gradients."""
    ran, run = [], operator._run

    def counted(*arguments):
        ran.append(arguments)
        return run(*arguments)

    monkeypatch.setattr(operator, "_run", counted)

    def compare(theirs, points=None):
        given = inputs(points)
        wanted = expected(*given, points)
        noise = torch.randn_like(wanted)
        output = theirs(*given)
        assert ran.pop() and output.shape == wanted.shape
        torch.testing.assert_close(output, wanted)
        torch.testing.assert_close(
            torch.autograd.grad(output, given, noise), torch.autograd.grad(wanted, given, noise)
        )

    return compare


def official(function):
    """theirs(value, locations, weights) for code with the official six arguments."""
    shapes, starts = torch.tensor(SHAPES), torch.tensor([0, 35])
    return lambda v, p, w: function(v, shapes, starts, p, w, 64)


@pytest.mark.parametrize("section", ["The official code", "DINO", "Mask2Former"])
def test_the_official_names(section, install, follow, same):
    follow(section)
    same(official(install("functions", OFFICIAL).Function.apply))


@pytest.mark.parametrize(
    ("section", "name"),
    [
        ("detrex", "detrex.layers.multi_scale_deform_attn"),
        ("Grounding DINO", "groundingdino.models.GroundingDINO.ms_deform_attn"),
    ],
)
def test_extensions_inside_of_packages(section, name, install, follow, same):
    package = name.partition(".")[0]
    source = f"import torch\nfrom {package} import _C\n{FUNCTION}{ON_A_CPU}"
    install(package)
    install(name.rpartition(".")[0])
    # the module is imported by the recipe, after the extension's name is there
    finder = Finder(name, source)
    sys.meta_path.insert(0, finder)
    try:
        names = follow(section)
    finally:
        sys.meta_path.remove(finder)
        theirs = sys.modules.pop(name)
    assert names["theirs"] is theirs
    same(official(theirs.Function.apply))
    same(lambda v, p, w: theirs.on_a_cpu(v, torch.tensor(SHAPES), p, w))
    with pytest.raises(RuntimeError, match=f"another {package}._C has been imported before ours"):
        sys.modules[f"{package}._C"] = ModuleType("built")
        integrations.install_official_names(f"{package}._C")


class Finder:
    """Imports one module from a text."""

    def __init__(self, name, source):
        self.name, self.source = name, source

    def find_spec(self, name, path=None, target=None):
        if name == self.name:
            return importlib.machinery.ModuleSpec(name, self)

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        exec(self.source, vars(module))


def test_mmdetection(install, follow, same):
    theirs = install("mmcv.ops.multi_scale_deform_attn", MMCV)
    follow("MMDetection")
    same(official(theirs.on_a_gpu))
    same(lambda v, p, w: theirs.on_a_cpu(v, torch.tensor(SHAPES), p, w))


class Attention(nn.Module):
    """A module that keeps the operator in an attribute."""

    def __init__(self, method=None):
        super().__init__()
        if method:
            self.method = method
        self.ms_deformable_attn_core = self.theirs

    def theirs(self, *arguments):
        raise AssertionError("theirs")


def test_rt_detr(follow, same):
    model = nn.Sequential(nn.Linear(1, 1), Attention())
    follow("RT-DETR", model=model)
    same(lambda v, p, w: model[1].ms_deformable_attn_core(v, SHAPES, p, w))


@pytest.mark.parametrize("points", [[3, 3], [4, 1]])
def test_rt_detr_v2(follow, same, points):
    model = nn.Sequential(Attention("default"), Attention("discrete"))
    follow("RT-DETRv2", model=model)
    same(lambda v, p, w: model[0].ms_deformable_attn_core(v, SHAPES, p, w, points), points)
    with pytest.raises(AssertionError, match="theirs"):
        model[1].ms_deformable_attn_core()


def test_d_fine(follow, same):
    model, points = nn.Sequential(Attention("default"), Attention("discrete")), [3, 6]
    follow("D-FINE", model=model)

    def theirs(value, locations, weights):
        maps = value.permute(0, 2, 3, 1).split([35, 12], dim=-1)
        return model[0].ms_deformable_attn_core(maps, SHAPES, locations, weights, points)

    same(theirs, points)
    with pytest.raises(AssertionError, match="theirs"):
        model[1].ms_deformable_attn_core()


def test_ultralytics(install, follow, same):
    theirs = install("ultralytics.nn.modules.transformer", ON_A_CPU)
    follow("Ultralytics")
    shapes = [list(shape) for shape in SHAPES]
    same(lambda v, p, w: theirs.on_a_cpu(v, shapes, p.flatten(3, 4), w.flatten(3, 4)))


@pytest.mark.parametrize("merged", [False, True])
def test_rf_detr(install, follow, same, merged):
    theirs = install("rfdetr.models.ops.modules.ms_deform_attn", RF_DETR)
    follow("RF-DETR")

    def run(value, locations, weights):
        given = value.permute(0, 2, 3, 1), torch.tensor(SHAPES), locations, weights.flatten(3, 4)
        if not merged:
            return theirs.run(*given)
        given = *given[:2], locations.flatten(3, 4), given[3]
        return theirs.run(*given, value_spatial_shapes_hw=SHAPES)

    same(run)


def test_transformers(follow):
    model = transformers_models.build("deformable_detr")
    names = follow("Hugging Face transformers", model=model)
    assert names["done"].count == 3
    names["done"].undo()


def test_every_recipe_is_tested():
    text = Path(__file__).read_text(encoding="utf-8")
    untested = [name for name, code in SECTIONS.items() if code and f'"{name}"' not in text]
    assert not untested and len(SECTIONS) == 13


# Your own code


@pytest.mark.parametrize("size", [2, 4])
def test_references_with_one_level_count_for_all(size):
    attention = MSDeformAttn(embed_dim=8, num_levels=2, num_heads=2)
    query, memory = torch.randn(2, 5, 8), torch.randn(2, 47, 8)
    one = torch.rand(2, 5, 1, size)
    expected = attention(query, one.expand(-1, -1, 2, -1), memory, SHAPES)
    assert torch.equal(attention(query, one, memory, SHAPES), expected)


def test_a_saved_program_needs_one_import(tmp_path):
    class Operator(nn.Module):
        def forward(self, value, locations, weights):
            return ms_deform_attn(value, SHAPES, locations, weights)

    given = [x.detach().float() for x in inputs()]
    torch.export.save(torch.export.export(Operator(), tuple(given)), tmp_path / "program.pt2")
    torch.save([*given, Operator()(*given)], tmp_path / "given.pt")
    code = """if True:
        import sys, torch
        import deformable_detr.ops
        *given, expected = torch.load(f"{sys.argv[1]}/given.pt")
        program = torch.export.load(f"{sys.argv[1]}/program.pt2").module()
        torch.testing.assert_close(program(*given), expected)
    """
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
