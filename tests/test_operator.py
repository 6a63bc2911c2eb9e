"""The operator as people call it: every backend of this machine, and what torch does with it."""

import math
import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from deformable_detr import MSDeformAttn, backends, ms_deform_attn
from deformable_detr.ops import cpu, cuda, dispatch, reference
from deformable_detr.ops.build import compiler
from deformable_detr.ops.cache import cache_folder
from tests.oracle import SHAPES, attention_by_loops, make_inputs

FUNCTIONS = {
    "cpu": [(cpu, "forward"), (cpu, "backward")],
    "reference": [(reference, "ms_deform_attn")],
    "gather": [(reference, "ms_deform_attn_gather")],
}
needs_compiler = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))
# what torch itself says where a process first asks for a forward-mode derivative
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script` is")
FLAT = [size for shape in SHAPES for size in shape]


@pytest.fixture(params=[pytest.param("cpu", marks=needs_compiler), "reference", "gather"])
def backend(request, monkeypatch):
    """The backend's name, while all others raise."""
    for name, functions in FUNCTIONS.items():
        for module, function in functions if name != request.param else []:
            monkeypatch.setattr(module, function, refuse(name))
    return request.param


def refuse(name):
    def function(*_):
        raise AssertionError(f"{name} ran, another backend was asked for")

    return function


def with_gradients(inputs, shapes, backend, grad_output=None):
    """The output, and the gradients of value, locations and weights."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = ms_deform_attn(leaves[0], shapes, *leaves[1:], backend=backend)
    if grad_output is None:
        generator = torch.Generator().manual_seed(1)
        grad_output = torch.randn(output.shape, generator=generator).to(output.dtype)
    return output.detach(), *torch.autograd.grad(output, leaves, grad_output)


CASES = {
    "one of everything": {"B": 1, "Q": 1, "M": 1, "D": 1, "K": 1, "shapes": [(1, 1)]},
    "sizes all different": {"B": 2, "Q": 3, "M": 5, "D": 7, "K": 4},
    "odd channels": {"B": 1, "Q": 2, "M": 1, "D": 33, "K": 3, "shapes": [(2, 5), (3, 1)]},
    "more queries than tokens": {"B": 2, "Q": 11, "M": 2, "D": 2, "K": 5, "shapes": [(2, 3)]},
}


@pytest.mark.parametrize("name", CASES)
def test_against_loops(backend, name):
    value, locations, weights = make_inputs(**CASES[name])
    shapes = CASES[name].get("shapes", SHAPES)
    given = ms_deform_attn(value, shapes, locations, weights, backend)
    expected = attention_by_loops(value, shapes, locations, weights)
    torch.testing.assert_close(given, expected, atol=1e-12, rtol=1e-12)
    single = [x.float() for x in (value, locations, weights)]
    given = ms_deform_attn(single[0], shapes, *single[1:], backend)
    torch.testing.assert_close(given.double(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("D", [1, 3])
def test_gradients_against_differences(backend, D):
    shapes = [(3, 4), (1, 2)]
    inputs = [x.requires_grad_() for x in make_inputs(B=1, Q=2, M=2, D=D, K=2, shapes=shapes)]
    function = lambda v, p, w: ms_deform_attn(v, shapes, p, w, backend)  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs)


@needs_compiler
def test_second_derivatives_of_the_kernel():
    shapes = [(2, 3), (1, 2)]
    inputs = [x.requires_grad_() for x in make_inputs(B=1, Q=2, M=1, D=2, K=1, shapes=shapes)]
    function = lambda v, p, w: ms_deform_attn(v, shapes, p, w, "cpu")  # noqa: E731
    assert torch.autograd.gradgradcheck(function, inputs)


def test_non_contiguous(backend):
    inputs = make_inputs(D=4)
    expected = with_gradients(inputs, SHAPES, backend)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    points = strided[1].flip(-1).contiguous().flip(-1)
    generator = torch.Generator().manual_seed(1)
    grad_output = torch.randn(expected[0].shape, generator=generator).double()
    grad_output = grad_output.mT.contiguous().mT
    assert not any(x.is_contiguous() for x in (*strided, grad_output))
    given = with_gradients((strided[0], points, strided[2]), SHAPES, backend, grad_output)
    torch.testing.assert_close(given, expected)


def test_one_gradient_for_all_outputs(backend):
    """sum() sends back one number expanded: strides of zero."""
    inputs = make_inputs(D=4)
    ones = torch.ones(2, 3, 8, dtype=torch.float64)
    expected = with_gradients(inputs, SHAPES, backend, ones)
    given = with_gradients(inputs, SHAPES, backend, ones[:1, :1, :1].expand_as(ones))
    torch.testing.assert_close(given, expected)


@pytest.mark.parametrize(("B", "Q"), [(0, 3), (2, 0)])
def test_empty(backend, B, Q):
    inputs = [x.requires_grad_() for x in make_inputs(B=B, Q=Q, D=4)]
    output = ms_deform_attn(inputs[0], SHAPES, *inputs[1:], backend)
    assert output.shape == (B, Q, 8) and output.dtype == torch.float64
    for x, gradient in zip(inputs, torch.autograd.grad(output.sum(), inputs), strict=True):
        assert torch.equal(gradient, torch.zeros_like(x))


@needs_compiler
@pytest.mark.parametrize(("B", "Q"), [(0, 3), (2, 0)])
def test_empty_second_derivatives(B, Q):
    inputs = [x.requires_grad_() for x in make_inputs(B=B, Q=Q, D=4)]
    output = ms_deform_attn(inputs[0], SHAPES, *inputs[1:], "cpu").square()
    first = torch.autograd.grad(output.sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(x.sum() for x in first), inputs)
    for x, gradient in zip(inputs, second, strict=True):
        assert torch.equal(gradient, torch.zeros_like(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("coordinate", [math.nan, math.inf, -math.inf, 1e30, -1e30, 3e38])
def test_points_at_no_place_are_as_if_removed(backend, coordinate, dtype):
    value, locations, weights = make_inputs(D=4, dtype=dtype)
    for axis in (0, 1):
        hostile = locations.clone()
        hostile[..., 3, axis] = coordinate
        kept = locations[..., :3, :], weights[..., :3]
        expected = with_gradients((value, *kept), SHAPES, backend)
        given = with_gradients((value, hostile, weights), SHAPES, backend)
        for x in given:
            assert x.isfinite().all()
        assert not given[2][..., 3, :].any() and not given[3][..., 3].any()
        rest = given[0], given[1], given[2][..., :3, :], given[3][..., :3]
        torch.testing.assert_close(rest, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_values_are_summed_in_float32(backend, dtype):
    value, locations, weights = make_inputs(D=4, dtype=torch.float32)
    half = value.to(dtype)
    wide = with_gradients((half.float(), locations, weights), SHAPES, backend)
    output, *gradients = with_gradients(
        (half, locations, weights), SHAPES, backend, wide[0].new_ones(wide[0].shape).to(dtype)
    )
    assert torch.equal(output, wide[0].to(dtype))
    assert [x.dtype for x in gradients] == [dtype, torch.float32, torch.float32]
    expected = with_gradients((half.float(), locations, weights), SHAPES, backend, 1 + 0 * wide[0])
    torch.testing.assert_close(gradients[0], expected[1].to(dtype))
    torch.testing.assert_close(gradients[1:], list(expected[2:]))


def test_coordinates_stay_float32_under_autocast(backend):
    """On a row of 1000 pixels, bfloat16 would move a point by up to two of them."""
    shapes = [(1, 1000)]
    _, locations, weights = make_inputs(D=4, shapes=shapes, dtype=torch.float32)
    value = torch.randint(-8, 8, (2, 1000, 2, 4)).float()  # whole numbers bfloat16 has
    expected = with_gradients((value, locations, weights), shapes, backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given = with_gradients((value.bfloat16(), locations, weights), shapes, backend)
        untouched = ms_deform_attn(value, shapes, locations, weights, backend)
    assert torch.equal(untouched, expected[0])  # no dtype of the three was changed
    torch.testing.assert_close(given[0].float(), expected[0], atol=0.05, rtol=0.01)
    lowered = ms_deform_attn(value, shapes, locations.bfloat16(), weights, backend)
    assert (lowered - expected[0]).abs().max() > 1  # this test can fail


def test_module_under_autocast(backend, monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, backend)
    torch.manual_seed(0)
    module = MSDeformAttn(8, num_levels=3, num_heads=2, num_points=4)
    query, features = torch.randn(2, 3, 8), torch.randn(2, sum(h * w for h, w in SHAPES), 8)
    references = torch.rand(2, 3, 3, 2)
    expected, exact = module(query, references, features, SHAPES, return_sampling=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, sampling = module(query, references, features, SHAPES, return_sampling=True)
        output.float().square().sum().backward()
    assert sampling.locations.dtype == torch.float32
    torch.testing.assert_close(sampling.locations, exact.locations, atol=1e-2, rtol=0)
    torch.testing.assert_close(output.float(), expected, atol=5e-2, rtol=5e-2)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_offsets_are_divided_in_float32_under_autocast():
    """On a map of 501 pixels, a size that bfloat16 does not have."""
    torch.manual_seed(0)
    module = MSDeformAttn(8, num_levels=1, num_heads=2, num_points=3)
    query, references = torch.randn(1, 5, 8), torch.rand(1, 5, 1, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        offsets = module.sampling_offsets(query).view(1, 5, 2, 1, 3, 2)
        sampling = module.sampling(query, references, [(3, 501)])
    assert offsets.dtype == torch.bfloat16
    expected = references[:, :, None, :, None] + offsets.float() / torch.tensor([501.0, 3.0])
    torch.testing.assert_close(sampling.locations, expected, atol=1e-6, rtol=0)


# What torch makes of it.


@needs_compiler
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck(dtype):
    value, locations, weights = make_inputs(D=4, dtype=torch.float64)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = value.to(dtype), locations.to(real), weights.to(real)
    value, locations, weights = (x.requires_grad_() for x in inputs)
    arguments = value, FLAT, locations, weights
    torch.library.opcheck(torch.ops.deformable_detr.ms_deform_attn, arguments)
    grad_output = torch.randn(2, 3, 8).to(dtype)
    torch.library.opcheck(
        torch.ops.deformable_detr.ms_deform_attn_backward, (*arguments, grad_output)
    )


def test_compiles_whole_for_changing_shapes(backend):
    """One graph, with B, Q and the levels' sizes as symbols."""
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def compiled(value, shapes, locations, weights):
        return ms_deform_attn(value * 2, shapes, locations, weights, backend).square()

    # no two sizes alike: torch takes those for one symbol, and compiles again when they part
    for B, Q, shapes in ((3, 11, [(13, 7), (6, 9)]), (10, 12, [(14, 15), (16, 17)])):
        inputs = make_inputs(B=B, Q=Q, M=8, D=4, K=5, shapes=shapes, dtype=torch.float32)
        leaves = [x.requires_grad_() for x in inputs]
        output = compiled(leaves[0], shapes, *leaves[1:])
        expected = ms_deform_attn(leaves[0] * 2, shapes, *leaves[1:], backend).square()
        torch.testing.assert_close(output, expected)
        gradients = [torch.autograd.grad(x.sum(), leaves) for x in (output, expected)]
        torch.testing.assert_close(*gradients)
    assert counter.frame_count == 1


@needs_compiler
@pytest.mark.parametrize("Q", [5, 40])  # below and above where cpu.cpp copies heads together
def test_same_bits_for_any_number_of_threads_and_every_time(Q, monkeypatch):
    monkeypatch.setattr(cpu, "SMALL", 0)
    inputs = make_inputs(Q=Q, M=3, D=4, dtype=torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 3, 1):
            torch.set_num_threads(threads)
            assert cpu._threads(1).value == threads
            results.append(with_gradients(inputs, SHAPES, "cpu"))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


# Which backend runs.


@needs_compiler
def test_backends_says_what_is_there():
    found = backends()
    assert list(found) == ["cuda", "cpu", "reference", "gather"]
    assert found["cpu"] == found["reference"] == found["gather"] == "available"
    if not torch.cuda.is_available():
        assert found["cuda"] == "torch finds no CUDA device"


@needs_compiler
def test_the_kernel_is_what_runs_by_default(monkeypatch):
    monkeypatch.setattr(reference, "ms_deform_attn", refuse("reference"))
    value, locations, weights = make_inputs(D=4)
    ms_deform_attn(value, SHAPES, locations, weights)


def test_variable_forces_and_argument_wins(backend, monkeypatch):
    value, locations, weights = make_inputs(D=4)
    monkeypatch.setenv(dispatch.VARIABLE, backend)
    ms_deform_attn(value, SHAPES, locations, weights)
    monkeypatch.setenv(dispatch.VARIABLE, "gather" if backend != "gather" else "reference")
    ms_deform_attn(value, SHAPES, locations, weights, backend=backend)
    with pytest.raises(AssertionError, match="another backend was asked for"):
        ms_deform_attn(value, SHAPES, locations, weights)


@pytest.mark.parametrize("by", ["argument", "variable"])
@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("cuda", RuntimeError, "'cuda' needs tensors on cuda, got cpu"),
        ("fastest", ValueError, "must be one of cuda, cpu, .*, got 'fastest'"),
    ],
)
def test_forcing_what_cannot_run_is_an_error(by, name, error, message, monkeypatch):
    if by == "variable":
        monkeypatch.setenv(dispatch.VARIABLE, name)
    value, locations, weights = make_inputs(D=4)
    with pytest.raises(error, match=message):
        ms_deform_attn(value, SHAPES, locations, weights, name if by == "argument" else None)


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    """A machine whose path is empty."""
    caches = compiler, cpu.why_not, cpu.load, dispatch._say_once
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_without_compiler_the_reference_runs_and_says_so_once(no_compiler):
    value, locations, weights = make_inputs(D=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            output = ms_deform_attn(value, SHAPES, locations, weights)
    expected = attention_by_loops(value, SHAPES, locations, weights)
    torch.testing.assert_close(output, expected)
    (warning,) = caught
    assert "plain PyTorch, which is slow: no C++ compiler" in str(warning.message)
    assert "install g++ or clang++" in str(warning.message)
    assert warning.filename == __file__


def test_without_compiler_forcing_the_kernel_is_an_error(no_compiler):
    value, locations, weights = make_inputs(D=4)
    with pytest.raises(RuntimeError, match=r"'cpu' is not available: no C\+\+ compiler.*install"):
        ms_deform_attn(value, SHAPES, locations, weights, backend="cpu")
    assert "install g++" in backends()["cpu"]


def test_where_kernels_cannot_be_kept_safely_the_reference_runs(monkeypatch, tmp_path):
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o777)
    monkeypatch.setenv("DEFORMABLE_DETR_CACHE", str(folder))
    caches = cache_folder, cpu.why_not, cpu.load, dispatch._say_once
    for cache in caches:
        cache.cache_clear()
    try:
        value, locations, weights = make_inputs(D=4)
        with pytest.warns(UserWarning, match="plain PyTorch, .* other users can write to"):
            output = ms_deform_attn(value, SHAPES, locations, weights)
        torch.testing.assert_close(output, attention_by_loops(value, SHAPES, locations, weights))
        assert "chmod go-w" in backends()["cpu"]
    finally:
        monkeypatch.undo()
        for cache in caches:
            cache.cache_clear()


def test_a_gpu_of_another_maker_is_no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cuda.why_not.__wrapped__() == "torch is built for another maker's GPUs, not for CUDA"


def test_a_compiler_that_is_asked_for_and_not_there_is_named(no_compiler, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    compiler.cache_clear()
    assert backends()["cpu"].startswith("no C++ compiler: no-such-compiler not on the path")


@pytest.fixture
def simple():
    """Float64 inputs of one level, and the operator as a function of its three tensors."""
    inputs = make_inputs(B=1, Q=2, M=2, D=3, K=2, shapes=[(4, 5)])
    return inputs, lambda *x: ms_deform_attn(x[0], [(4, 5)], *x[1:])


@needs_compiler
def test_third_derivatives(simple):
    inputs, _ = simple

    def third(backend):
        value, locations, weights = (x.detach().requires_grad_() for x in inputs)
        output = ms_deform_attn(value, [(4, 5)], locations, weights, backend=backend)
        first = torch.autograd.grad(output.pow(3).sum(), value, create_graph=True)[0]
        second = torch.autograd.grad(first.pow(2).sum(), weights, create_graph=True)[0]
        return torch.autograd.grad(second.pow(2).sum(), (value, locations, weights))

    torch.testing.assert_close(third("cpu"), third("gather"))


@forward_mode
def test_forward_mode_derivatives(simple):
    inputs, operator = simple
    tangents = tuple(torch.randn_like(x) for x in inputs)
    given, step = torch.func.jvp(operator, inputs, tangents)[1], 1e-6
    ahead, back = (
        operator(*(x + sign * step * t for x, t in zip(inputs, tangents, strict=True)))
        for sign in (1, -1)
    )
    torch.testing.assert_close(given, (ahead - back) / (2 * step), rtol=1e-5, atol=1e-6)
    with torch.autograd.forward_ad.dual_level():
        dual = [
            torch.autograd.forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)
        ]
        tangent = torch.autograd.forward_ad.unpack_dual(operator(*dual)).tangent
        forced = lambda: ms_deform_attn(dual[0], [(4, 5)], *dual[1:], backend="cpu")  # noqa: E731
        if cpu.why_not() is None:
            with pytest.raises(RuntimeError, match="backend 'cpu' has neither forward-mode"):
                forced()
            with pytest.raises(RuntimeError, match="has neither forward-mode"):  # and no silence
                torch.ops.deformable_detr.ms_deform_attn(dual[0], [4, 5], *dual[1:])
            ms_deform_attn(inputs[0], [(4, 5)], *inputs[1:], backend="cpu")  # without tangents
    torch.testing.assert_close(tangent, given)


def test_transforms_of_functions(simple):
    inputs, operator = simple
    gradient = torch.func.grad(lambda *x: operator(*x).pow(2).sum())(*inputs)
    value = inputs[0].clone().requires_grad_()
    expected = torch.autograd.grad(operator(value, *inputs[1:]).pow(2).sum(), value)[0]
    torch.testing.assert_close(gradient, expected)
    many = [torch.stack([x, x.flip(1)]) for x in inputs]
    expected = torch.stack([operator(*x) for x in zip(*many, strict=True)])
    torch.testing.assert_close(torch.func.vmap(operator)(*many), expected)


@needs_compiler
@forward_mode
def test_a_forced_kernel_is_not_transformed(simple, monkeypatch):
    inputs, operator = simple
    forced = lambda *x: ms_deform_attn(x[0], [(4, 5)], *x[1:], backend="cpu").sum()  # noqa: E731
    with pytest.raises(RuntimeError, match="backend 'cpu' has neither forward-mode"):
        torch.func.grad(forced)(*inputs)
    monkeypatch.setenv("DEFORMABLE_DETR_BACKEND", "cpu")
    refusal = pytest.raises(RuntimeError, match="DEFORMABLE_DETR_BACKEND 'cpu' has neither")
    with refusal:
        torch.func.grad(lambda *x: operator(*x).sum())(*inputs)
    with torch.autograd.forward_ad.dual_level(), refusal:
        operator(torch.autograd.forward_ad.make_dual(inputs[0], inputs[0]), *inputs[1:])


@needs_compiler
def test_a_traced_program_is_checked_too():
    value, locations, weights = make_inputs(dtype=torch.float32, shapes=[(4, 5)])
    run = torch.ops.deformable_detr.ms_deform_attn
    with pytest.raises(ValueError, match="hold 10000 tokens, but value has S=20"):
        run(value, [100, 100], locations, weights)
    with pytest.raises(ValueError, match="pairs of positive ints"):
        run(
            value,
            [10, 10, -8, 10],
            *(x.expand(-1, -1, -1, 2, -1, *x.shape[5:]) for x in (locations, weights)),
        )
    for half in ((locations, weights.half()), (locations.bfloat16(), weights)):
        with pytest.raises(TypeError, match=r"must be torch.float32 for the kernel, got"):
            run(value, [4, 5], *half)
    backward = torch.ops.deformable_detr.ms_deform_attn_backward
    output = run(value, [4, 5], locations, weights)
    for wrong in (torch.zeros(1), output.half()):
        with pytest.raises(ValueError, match="grad_output must be"):
            backward(value, [4, 5], locations, weights, wrong)


def test_what_is_no_tensor_is_refused():
    value, locations, weights = make_inputs()
    with pytest.raises(TypeError, match="value must be a Tensor, got ndarray"):
        ms_deform_attn(value.numpy(), SHAPES, locations, weights)
    with pytest.raises(TypeError, match="attention_weights must be a Tensor, got NoneType"):
        ms_deform_attn(value, SHAPES, locations, None)


def test_the_variable_is_named_and_leaves_shapes_alone(monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "cuda")
    inputs = make_inputs()
    with pytest.raises(
        RuntimeError, match=f"{dispatch.VARIABLE} 'cuda' needs tensors on cuda, got cpu"
    ):
        ms_deform_attn(inputs[0], SHAPES, *inputs[1:])
    value, locations, weights = (x.to("meta") for x in inputs)
    assert ms_deform_attn(value, SHAPES, locations, weights).is_meta


def test_gather_counts_tokens_beyond_what_float32_holds():
    value = torch.zeros(1, 4200 * 4200, 1, 1)
    value[0, 4100 * 4200 + 4001] = 1
    locations = (torch.tensor([4001, 4100]) + 0.5) / 4200
    output = ms_deform_attn(
        value, [(4200, 4200)], locations.view(1, 1, 1, 1, 1, 2), torch.ones(1, 1, 1, 1, 1), "gather"
    )
    assert output.item() > 0.99
