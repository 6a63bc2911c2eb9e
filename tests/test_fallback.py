"""What runs where a kernel does not: plain PyTorch, which says why; and what importing costs."""

import ctypes
import subprocess
import sys
from types import ModuleType

import pytest
import torch

from deformable_detr import MSDeformAttn, backends, ms_deform_attn
from deformable_detr.ops import cpu, cuda, dispatch
from deformable_detr.ops.build import compiler
from deformable_detr.ops.cache import cache_folder

SHAPES = [(3, 4)]


def run(**changes):
    """The operator on one query."""
    inputs = {
        "value": torch.randn(1, 12, 2, 4),
        "spatial_shapes": SHAPES,
        "sampling_locations": torch.rand(1, 1, 2, 1, 3, 2),
        "attention_weights": torch.rand(1, 1, 2, 1, 3),
    }
    return ms_deform_attn(**(inputs | changes))


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing is known of this machine yet, and no kernel is built."""
    monkeypatch.setenv("DEFORMABLE_DETR_CACHE", str(tmp_path / "cache"))
    caches = compiler, cache_folder, cpu.why_not, cpu.load, dispatch._say_once
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_a_compiler_that_fails(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    with pytest.warns(UserWarning, match="plain PyTorch, which is slow: .*false could not build"):
        run()
    assert "could not build the kernel" in backends()["cpu"]


def test_a_folder_from_which_nothing_may_run(fresh, monkeypatch):
    if cpu.why_not():
        pytest.skip(cpu.why_not())
    cpu.why_not.cache_clear()
    cpu.load.cache_clear()

    def refuse(name, *arguments, **options):
        raise OSError(f"{name}: failed to map segment from shared object")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    with pytest.warns(UserWarning, match="DEFORMABLE_DETR_CACHE to a folder from which programs"):
        run()


@pytest.mark.parametrize("error", [ImportError("libcuda"), RuntimeError("no NVRTC"), None])
def test_a_cupy_that_does_not_work(monkeypatch, error):
    class RawModule:
        def __init__(self, **options):
            assert options["backend"] == "nvrtc"

        def compile(self):
            if error:
                raise error

    fake = ModuleType("cupy")
    fake.RawModule = RawModule
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    wanted = f"CuPy does not work here ({type(error).__name__}: {error})" if error else None
    assert cuda.why_not.__wrapped__() == wanted


def test_no_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert cuda.why_not.__wrapped__() == "CuPy is not installed: pip install cupy-cuda13x"


def test_a_device_without_kernel_is_named(fresh):
    with pytest.warns(UserWarning, match="plain PyTorch, which is slow: no kernel for mps"):
        assert dispatch.choose(None, None, "mps") == "reference"
    assert dispatch.choose(None, None, "meta") == "reference"  # nothing runs there


def test_the_variable_is_named(monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "gpu")
    with pytest.raises(ValueError, match="DEFORMABLE_DETR_BACKEND must be one of cuda, cpu"):
        run()


def test_no_points_are_refused_and_numpy_sizes_taken():
    with pytest.raises(ValueError, match=r"K must be at least 1, got .*\(1, 1, 2, 1, 0, 2\)"):
        run(
            sampling_locations=torch.rand(1, 1, 2, 1, 0, 2),
            attention_weights=torch.rand(1, 1, 2, 1, 0),
        )
    torch.manual_seed(0)
    expected = run()
    torch.manual_seed(0)
    assert torch.equal(run(spatial_shapes=torch.tensor(SHAPES).numpy()), expected)


def test_a_mask_is_of_booleans_and_the_features_stay_as_they_are():
    attention = MSDeformAttn(embed_dim=8, num_levels=1, num_heads=2)
    attention.value_proj = torch.nn.Identity()
    features, mask = torch.ones(1, 12, 8), torch.zeros(1, 12, dtype=torch.bool)
    mask[:, 3:] = True
    inputs = torch.randn(1, 5, 8), torch.rand(1, 5, 1, 2), features, SHAPES
    attention(*inputs, mask)
    assert features.eq(1).all()
    with pytest.raises(ValueError, match=r"must be \(B=1, S=12\) of bool, got .*float32"):
        attention(*inputs, mask.float())


def test_importing_the_operator_needs_torch_and_numpy_alone():
    code = """
import sys
from importlib.abc import MetaPathFinder

class Refuse(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torchvision", "scipy", "matplotlib", "PIL", "accelerate"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
import torch
from deformable_detr import MSDeformAttn, ms_deform_attn
assert "torch._dynamo" not in sys.modules
MSDeformAttn(8, 1, 2)(torch.randn(1, 5, 8), torch.rand(1, 5, 1, 2), torch.randn(1, 12, 8), [(3, 4)])
try:
    from deformable_detr import DeformableDETR
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "torchvision\n", done.stderr
