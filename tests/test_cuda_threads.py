"""The GPU's specialisation of the kernel, every CUDA thread a thread of the operating system."""

import platform
from importlib import resources

import numpy as np
import pytest
import torch

from deformable_detr.ops import cpu, cuda, reference, threads
from tests.oracle import SHAPES, attention_by_loops, make_inputs

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))

# 3 levels of 3 points: no multiple of the lanes. 10 heads: the last block is not full. Lanes times
# groups is one warp, or two, or part of one.
CASES = {
    "two warps": (torch.float32, 32, 8),
    "odd D": (torch.float32, 7, 4),
    "idle lanes": (torch.float32, 36, 4),
    "passes": (torch.float32, 200, 3),
    "one lane": (torch.float32, 1, 4),
    "float64, a warp a head": (torch.float64, 64, 1),
    "float16": (torch.float16, 64, 4),
    "bfloat16": (torch.bfloat16, 40, 4),
}
TOLERANCES = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
    torch.float64: {"rtol": 1e-10, "atol": 1e-10},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-2},
}


def inputs(dtype, D, **changes):
    """value, locations, weights and grad_output as the kernel for this dtype takes them."""
    value, locations, weights = make_inputs(**{"B": 1, "Q": 5, "M": 2, "D": D, "K": 3} | changes)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(1)
    B, Q, M = weights.shape[:3]
    grad_output = torch.randn(B, Q, M * D, generator=generator).to(dtype)
    return value.to(dtype), locations.to(real), weights.to(real), grad_output


def exact_gradients(value, locations, weights, grad_output):
    """By autograd through the reference, in float64."""
    leaves = [x.double().requires_grad_() for x in (value, locations, weights)]
    output = reference.ms_deform_attn(leaves[0], SHAPES, *leaves[1:])
    return torch.autograd.grad(output, leaves, grad_output.double())


@pytest.mark.parametrize(("dtype", "D", "groups"), CASES.values(), ids=CASES)
def test_equal_to_loops_and_their_gradients(dtype, D, groups):
    value, locations, weights, grad_output = inputs(dtype, D)
    result = threads.forward(value, SHAPES, locations, weights, groups=groups)
    assert result.dtype == dtype
    expected = attention_by_loops(value.double(), SHAPES, locations, weights)
    torch.testing.assert_close(result.double(), expected, **TOLERANCES[dtype])
    results = threads.backward(value, SHAPES, locations, weights, grad_output, groups=groups)
    exact = exact_gradients(value, locations, weights, grad_output)
    for given, right, like in zip(results, exact, (value, locations, weights), strict=True):
        assert given.dtype == like.dtype
        torch.testing.assert_close(given.double(), right, **TOLERANCES[dtype])


def test_cases_cover_what_the_gpu_does():
    macros = [cuda.specialise(*case[:2], 9, False, False, 80) for case in CASES.values()]
    assert {m["LANES"] for m in macros} == {1, 8, 16, 32}
    assert {m["VECTOR"] for m in macros} == {1, 2, 4, 8}
    assert any(m["VECTORS"] > 1 for m in macros)
    warps = {m["LANES"] * case[2] / 32 for m, case in zip(macros, CASES.values(), strict=True)}
    assert min(warps) < 1 and 1 in warps and max(warps) >= 2


def test_64_bit_offsets_give_the_same_bits():
    value, locations, weights, grad_output = inputs(torch.float32, 32)
    arguments = value, SHAPES, locations, weights
    one, other = (threads.forward(*arguments, groups=8, huge=huge) for huge in (False, True))
    assert torch.equal(one, other)
    gradients = threads.backward(*arguments, grad_output, groups=8, huge=True)
    exact = exact_gradients(value, locations, weights, grad_output)
    for given, right in zip(gradients, exact, strict=True):
        torch.testing.assert_close(given, right.float(), **TOLERANCES[torch.float32])


@pytest.mark.parametrize("hostile", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 3e9])
def test_hostile_coordinates_add_nothing(hostile):
    value, locations, weights, grad_output = inputs(torch.float32, 32)
    locations[0, 1, 0, 1, 2, 0] = hostile
    locations[0, 2, 1, 0, 1, 1] = hostile
    without = weights.clone()
    without[0, 1, 0, 1, 2] = without[0, 2, 1, 0, 1] = 0
    harmless = locations.nan_to_num(0.5, 0.5, 0.5).where(locations.abs() < 9, torch.tensor(0.5))
    expected = reference.ms_deform_attn(value, SHAPES, harmless, without)
    result = threads.forward(value, SHAPES, locations, weights, groups=8)
    torch.testing.assert_close(result, expected)
    gradients = threads.backward(value, SHAPES, locations, weights, grad_output, groups=8)
    exact = exact_gradients(value, harmless, without, grad_output)
    torch.testing.assert_close(gradients[0], exact[0].float(), **TOLERANCES[torch.float32])
    assert all(x.isfinite().all() for x in gradients)
    for index in ((0, 1, 0, 1, 2), (0, 2, 1, 0, 1)):
        assert gradients[2][index] == 0 and not gradients[1][index].any()


@pytest.mark.parametrize(("dtype", "D"), [(torch.float16, 64), (torch.bfloat16, 40)], ids=str)
def test_half_types_round_as_torch_does(dtype, D):
    patterns = torch.arange(-(2**15), 2**15, 37).to(torch.int16).view(dtype)
    rows = patterns[patterns.isfinite()][: 24 * D].view(24, D)  # of every size, subnormal ones too
    assert rows.abs()[rows != 0].min() < torch.finfo(dtype).tiny
    # Each query asks for one row, exactly, times a weight of its own: one rounding each.
    locations = (torch.arange(24) + 0.5).div(24).view(1, 24, 1, 1, 1, 1).repeat(1, 1, 1, 1, 9, 2)
    locations[..., 0] = 0.5
    weights = torch.zeros(1, 24, 1, 1, 9)
    weights[0, :, 0, 0, 0] = torch.linspace(-6, 6, 24).exp()
    weights[0, 7, 0, 0, 0] = 1
    value = rows.view(1, 24, 1, D)
    result = threads.forward(value, [(24, 1)], locations, weights, groups=4)
    expected = (rows.float() * weights[0, :, 0, 0, :1]).to(dtype)
    assert torch.equal(result[0], expected)
    assert torch.equal(result[0, 7], rows[7])


def test_half_types_keep_nan():
    for dtype, D in ((torch.float16, 64), (torch.bfloat16, 40)):
        value, locations, weights, _ = inputs(dtype, D)
        weights[0, 2, 1] = float("nan")
        result = threads.forward(value, SHAPES, locations, weights, groups=4)
        assert torch.equal(result.isnan(), weights.isnan().any((3, 4)).repeat_interleave(D, 2))


def test_fixed_point_sums_do_not_depend_on_the_order():
    value, locations, weights, grad_output = inputs(torch.float32, 32)
    arguments = value, SHAPES, locations, weights, grad_output
    floating, fixed = (
        [
            threads.backward(*arguments, deterministic=mode, groups=8, seed=seed)[0]
            for seed in range(4)
        ]
        for mode in (False, True)
    )
    assert len({x.numpy().tobytes() for x in floating}) > 1, "the order of threads did not change"
    assert len({x.numpy().tobytes() for x in fixed}) == 1
    torch.testing.assert_close(fixed[0], floating[0])


def test_fixed_point_holds_any_scale_and_passes_on_what_is_not_finite():
    value, locations, weights, grad_output = inputs(torch.float32, 32)
    exact = exact_gradients(value, locations, weights, grad_output)[0]
    for size in (1e-30, 1e30):
        given = threads.backward(
            value, SHAPES, locations, weights, grad_output * size, deterministic=True, groups=8
        )[0]
        torch.testing.assert_close(given.double() / size, exact, **TOLERANCES[torch.float32])
    grad_output[0, 0, 0] = float("inf")
    given = threads.backward(
        value, SHAPES, locations, weights, grad_output, deterministic=True, groups=8
    )[0]
    assert given.isnan().any()


def test_empty_inputs():
    value, locations, weights, grad_output = inputs(torch.float32, 32)
    assert threads.forward(value, SHAPES, locations[:, :0], weights[:, :0]).shape == (1, 0, 64)
    for deterministic in (False, True):
        none = (x[:0] for x in (locations, weights, grad_output))
        empty = threads.backward(value[:0], SHAPES, *none, deterministic=deterministic)
        assert [x.shape[0] for x in empty] == [0, 0, 0]


def test_trace_of_the_forward_pass():
    value, locations, weights, _ = inputs(torch.float32, 32)
    locations[0, 0, 0] = float("nan")
    trace = threads.trace(value, SHAPES, locations, weights, groups=4)
    assert len(trace) == 32 * (9 * 4 + 1) and set(trace["block"]) == {0}
    assert set(trace["bytes"]) == {16}  # a lane loads four channels at once
    reads, writes = trace[trace["array"] == "value"], trace[trace["array"] == "output"]
    assert set(reads["kind"]) == {"r"} and set(writes["kind"]) == {"w"}
    # Thread t has head t / 8 and its channels from 4 * (t % 8) on.
    thread = reads["thread"]
    assert (reads["offset"] % 64 == thread // 8 % 2 * 32 + thread % 8 * 4).all()
    assert (writes["offset"] == 4 * np.arange(32)).all()


def test_trace_of_the_backward_pass_and_of_the_last_block():
    arguments = inputs(torch.float32, 32)
    value, locations, weights, grad_output = arguments
    trace = threads.trace(value, SHAPES, locations, weights, grad_output, block=2, groups=4)
    assert set(trace["thread"]) == set(range(16))  # heads 8 and 9; the others return at once
    kinds = {name: set(trace["kind"][trace["array"] == name]) for name in np.unique(trace["array"])}
    assert kinds == {"value": {"r"}, "grad_output": {"r"}, "grad_value": {"a"}}
    read, added = (trace["offset"][trace["array"] == name] for name in ("value", "grad_value"))
    assert np.array_equal(read, added)


def test_trace_says_which_blocks_there_are():
    value, locations, weights, _ = inputs(torch.float32, 32)
    with pytest.raises(IndexError, match=r"block must be in \[0, 3\), got 3"):
        threads.trace(value, SHAPES, locations, weights, block=3, groups=4)


@pytest.fixture(scope="module", params=[True, False], ids=["atomic", "plain"])
def races(request):
    try:
        return request.param, threads.races(request.param)
    except threads.NoSanitizerError as error:
        pytest.skip(str(error))


def test_thread_sanitizer_finds_a_race_only_where_there_is_one(races):
    atomic, (report, sums, expected) = races
    assert len(sums) == 64
    if atomic:
        assert report == ""
        assert set(sums) == {expected}
    else:
        assert report.startswith("WARNING: ThreadSanitizer: data race")
        assert "atomicAdd<float> cuda_threads.cpp:" in report and "/" not in report
        assert min(sums) < expected == max(*sums, expected)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="see meet()")
@pytest.mark.parametrize("barrier", range(4))
def test_thread_sanitizer_sees_a_missing_barrier(barrier, tmp_path, monkeypatch):
    folder = resources.files("deformable_detr.kernels")
    call = "__syncwarp();"
    parts = folder.joinpath("ms_deform_attn.cu").read_text().split(call)
    assert len(parts) == 5
    without = call.join(parts[: barrier + 1]) + call.join(parts[barrier + 1 :])
    (tmp_path / "ms_deform_attn.cu").write_text(without)
    (tmp_path / threads.SOURCE).write_bytes(folder.joinpath(threads.SOURCE).read_bytes())
    monkeypatch.setattr(resources, "files", lambda package: tmp_path)
    try:
        assert "data race" in threads.races().report
    except threads.NoSanitizerError as error:
        pytest.skip(str(error))
