"""The kernel on a GPU: every dtype, determinism, streams, devices, graphs. Needs CUDA and CuPy."""

import random
from dataclasses import replace

import pytest
import torch

from deformable_detr import backends, ms_deform_attn
from deformable_detr.ops import cuda, reference
from tests import fuzz
from tests.oracle import SHAPES, attention_by_loops, make_inputs

pytestmark = pytest.mark.skipif(cuda.why_not() is not None, reason=str(cuda.why_not()))
FLAT = [size for shape in SHAPES for size in shape]
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 2e-2,
}


@pytest.fixture(autouse=True)
def only_cuda(monkeypatch):
    """The pure-PyTorch form on a GPU's tensors raises: what ran was the kernel."""
    plain = reference.ms_deform_attn

    def guarded(value, *others):
        assert not value.is_cuda, "reference ran, the kernel was asked for"
        return plain(value, *others)

    monkeypatch.setattr(reference, "ms_deform_attn", guarded)


def on_gpu(*, dtype=torch.float32, device="cuda", **sizes):
    """Value in this dtype, locations and weights in float32, or float64 where value is."""
    real = torch.float64 if dtype == torch.float64 else torch.float32
    value, locations, weights = make_inputs(dtype=real, **sizes)
    return value.to(device, dtype), locations.to(device), weights.to(device)


def with_gradients(inputs, shapes=SHAPES):
    """The output and the gradients of its sum of squares, by the backend that is the default."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = ms_deform_attn(leaves[0], shapes, *leaves[1:])
    return output.detach(), *torch.autograd.grad(output.float().square().sum(), leaves)


def test_the_backend_is_there():
    assert backends()["cuda"] == "available"


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("D", [1, 2, 7, 32, 33, 64, 256])
def test_against_loops(dtype, D):
    """D from one lane of one channel to a warp of several vectors, with tails."""
    inputs = on_gpu(Q=5, M=3, D=D, dtype=dtype)
    given = ms_deform_attn(inputs[0], SHAPES, *inputs[1:], backend="cuda")
    expected = attention_by_loops(inputs[0].cpu().double(), SHAPES, *(x.cpu() for x in inputs[1:]))
    assert given.dtype == dtype
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(given.cpu().double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("specification", fuzz.SPECIFICATIONS, ids=str)
@pytest.mark.parametrize("deterministic", [False, True])
def test_random_and_hostile_inputs_with_gradients(specification, deterministic):
    """The fuzz of tests/fuzz.py, forward and backward, in both modes of the gradient of value."""
    rng = random.Random(0)
    halves = (None, torch.float16, torch.bfloat16)
    torch.use_deterministic_algorithms(deterministic)
    try:
        for count in range(30):
            case = fuzz.random_case(rng)
            while len(case.shapes) != specification[2]:
                case = fuzz.random_case(rng)
            half = halves[count % 3] if specification[0] == torch.float32 else None
            fuzz.check(replace(case, specification=specification, half=half), ("cuda",), "cuda")
    finally:
        torch.use_deterministic_algorithms(False)


def test_second_derivatives(monkeypatch):
    monkeypatch.undo()  # they are the reference's
    shapes = [(2, 3), (1, 2)]
    inputs = make_inputs(B=1, Q=2, M=1, D=2, K=1, shapes=shapes)
    inputs = [x.cuda().requires_grad_() for x in inputs]
    function = lambda v, p, w: ms_deform_attn(v, shapes, p, w, "cuda")  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs, nondet_tol=1e-9)
    assert torch.autograd.gradgradcheck(function, inputs, nondet_tol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_deterministic_mode_gives_the_same_bits(dtype):
    """All points on one pixel: the worst there is for sums in changing order."""
    value, locations, weights = on_gpu(Q=2000, M=2, D=32, dtype=dtype)
    locations = torch.full_like(locations, 0.5)
    expected = with_gradients((value, locations, weights))
    torch.use_deterministic_algorithms(True)
    try:
        results = [with_gradients((value, locations, weights)) for _ in range(5)]
    finally:
        torch.use_deterministic_algorithms(False)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))
    scale = expected[1].abs().max().item()
    tolerance = 100 * torch.finfo(dtype).eps * scale
    torch.testing.assert_close(results[0][1], expected[1], atol=tolerance, rtol=0)


def test_deterministic_mode_keeps_nan_and_zero():
    value, locations, weights = on_gpu(D=4)
    leaves = [x.requires_grad_() for x in (value, locations, weights)]
    torch.use_deterministic_algorithms(True)
    try:
        output = ms_deform_attn(value, SHAPES, locations, weights)
        (zero,) = torch.autograd.grad(output, value, torch.zeros_like(output), retain_graph=True)
        (nan, *_) = torch.autograd.grad(output, leaves, torch.full_like(output, torch.nan))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not zero.any() and nan.isnan().any()


def test_runs_on_the_current_stream():
    """The inputs are made on a side stream, late: on another stream the kernel would read zeros."""
    inputs = on_gpu(D=32)
    expected = with_gradients(inputs)
    late = [torch.zeros_like(x) for x in inputs]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # cycles: about a tenth of a second
        for to, x in zip(late, inputs, strict=True):
            to.copy_(x)
        given = with_gradients(late)
    stream.synchronize()
    torch.testing.assert_close(given, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
def test_runs_on_the_tensors_own_device():
    expected = with_gradients(on_gpu(D=32))
    assert torch.cuda.current_device() == 0
    given = with_gradients(on_gpu(D=32, device="cuda:1"))
    assert {x.device.index for x in given} == {1} and torch.cuda.current_device() == 0
    torch.testing.assert_close([x.cpu() for x in given], [x.cpu() for x in expected])


def test_cuda_graph_of_forward_and_backward():
    """Captured once, replayed with other numbers in the same memory."""
    inputs = [x.requires_grad_() for x in on_gpu(D=32)]

    def step():
        output = ms_deform_attn(inputs[0], SHAPES, *inputs[1:])
        return output, *torch.autograd.grad(output.square().sum(), inputs)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # builds the kernel, which a capture must not
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in inputs:
            x.copy_(x.flip(1))
    graph.replay()
    torch.testing.assert_close(captured, step())


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_storage_that_begins_anywhere(dtype):
    """Contiguous tensors one element off the 16 bytes that a lane loads at once."""
    inputs = on_gpu(D=32, dtype=dtype)
    moved = []
    for x in inputs:
        room = torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")
        moved.append(room[1:].view(x.shape).copy_(x))
        assert moved[-1].is_contiguous() and moved[-1].data_ptr() % 16
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    expected = with_gradients(inputs)
    tolerance = TOLERANCES[dtype]
    for given in (with_gradients(moved), with_gradients(strided)):
        torch.testing.assert_close(given, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_opcheck(dtype):
    inputs = [x.requires_grad_() for x in on_gpu(D=4, dtype=dtype)]
    arguments = inputs[0], FLAT, *inputs[1:]
    torch.library.opcheck(torch.ops.deformable_detr.ms_deform_attn, arguments)
    grad_output = torch.randn(2, 3, 8, device="cuda").to(dtype)
    torch.library.opcheck(
        torch.ops.deformable_detr.ms_deform_attn_backward, (*arguments, grad_output)
    )


def test_compiles_whole_for_changing_shapes():
    compiled = torch.compile(
        lambda v, s, p, w: ms_deform_attn(v * 2, s, p, w), fullgraph=True, dynamic=True
    )
    for Q, shapes in ((3, SHAPES), (5, [(4, 3), (6, 2), (5, 8)])):
        value, locations, weights = on_gpu(Q=Q, D=32, shapes=shapes)
        expected = ms_deform_attn(value * 2, shapes, locations, weights)
        torch.testing.assert_close(compiled(value, shapes, locations, weights), expected)


def test_coordinates_stay_float32_under_autocast():
    shapes = [(1, 1000)]
    value, locations, weights = on_gpu(D=32, shapes=shapes)
    expected = ms_deform_attn(value, shapes, locations, weights)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert torch.equal(ms_deform_attn(value, shapes, locations, weights), expected)


@pytest.mark.parametrize(("B", "Q"), [(0, 3), (2, 0)])
def test_empty(B, Q):
    inputs = on_gpu(B=B, Q=Q, D=4)
    output, *gradients = with_gradients(inputs)
    assert output.shape == (B, Q, 8)
    for x, gradient in zip(inputs, gradients, strict=True):
        assert torch.equal(gradient, torch.zeros_like(x))


@pytest.mark.skipif(
    cuda.why_not() is None and torch.cuda.get_device_properties(0).total_memory < 20 << 30,
    reason="needs 20 GiB of GPU memory",
)
def test_an_image_of_2_to_the_31_elements():
    """4 GiB of float16, read at its last token: offsets of 64 bits."""
    shapes, M, D = [(256, 512)], 512, 32
    value = torch.zeros(1, 256 * 512, M, D, dtype=torch.float16, device="cuda")
    value[0, -1] = torch.randn(M, D)
    locations = torch.tensor([511.5 / 512, 255.5 / 256], device="cuda").expand(1, 1, M, 1, 1, 2)
    weights = torch.ones(1, 1, M, 1, 1, device="cuda")
    output = ms_deform_attn(value, shapes, locations, weights)
    assert torch.equal(output.view(M, D), value[0, -1])


def test_too_many_points_is_an_error_that_names_the_way_out():
    value, locations, weights = on_gpu(B=1, Q=1, M=1, D=4, K=513, shapes=[(2, 3)])
    with pytest.raises(ValueError, match=r"takes L \* K <= 512, got 513; backend='reference'"):
        ms_deform_attn(value, [(2, 3)], locations, weights)


def test_forcing_the_cpu_on_a_gpus_tensors_is_an_error():
    value, locations, weights = on_gpu(D=4)
    with pytest.raises(RuntimeError, match="'cpu' needs tensors on cpu, got cuda"):
        ms_deform_attn(value, SHAPES, locations, weights, backend="cpu")
