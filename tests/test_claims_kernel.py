"""What the chapters on kernels say of barriers, shuffles and slopes, and what they build with."""

import pytest
import torch

from deformable_detr import ms_deform_attn
from deformable_detr.exercises.cuda import build, build_team, library_of
from deformable_detr.ops import cpu

needs_compiler = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))

WAITING = """
__global__ void turn_round(const int* given, int* result) {
    __shared__ int shared[8];
    int lane = threadIdx.x;
    shared[lane] = given[blockIdx.x * 8 + lane];
    __syncwarp();
    result[blockIdx.x * 8 + lane] = shared[7 - lane];
}
"""
TALKING = """
__global__ void sums(const float* given, float* by_shuffle, float* by_atomics) {
    float x = given[blockIdx.x * 8 + threadIdx.x];
    atomicAdd(by_atomics + blockIdx.x, x);
    for (int step = 4; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffff, x, step);
    by_shuffle[blockIdx.x * 8 + threadIdx.x] = x;
}
"""


@needs_compiler
def test_lanes_of_a_team_wait_for_one_another():
    given = torch.arange(40, dtype=torch.int32)
    result = torch.zeros(40, dtype=torch.int32)
    build_team(WAITING)(5, 8, given, result)
    assert torch.equal(result.view(5, 8), given.view(5, 8).flip(1))


@needs_compiler
def test_shuffles_and_atomics_sum_the_lanes_of_a_block():
    given = torch.arange(24.0)  # small whole numbers: sums do not depend on their order
    by_shuffle, by_atomics = torch.zeros(24), torch.zeros(3)
    build_team(TALKING)(3, 8, given, by_shuffle, by_atomics)
    wanted = given.view(3, 8).sum(1)
    assert torch.equal(by_atomics, wanted)
    assert torch.equal(by_shuffle.view(3, 8), wanted[:, None].expand(3, 8))


@needs_compiler
def test_a_text_that_does_not_compile_is_refused_in_one_line():
    with pytest.raises(AssertionError, match=r"^it does not compile: .+$"):
        library_of("int main() { return nothing; }")
    with pytest.raises(AssertionError, match="no `__global__ void head"):
        build("int main() {}", "head")


def test_a_location_has_the_slope_of_its_pixel_times_the_size_of_the_map():
    height, width, channels = 3, 7, 2
    torch.manual_seed(0)
    feature_map = torch.randn(channels, height, width, dtype=torch.float64)
    size = torch.tensor([width, height], dtype=torch.float64)
    pixel = torch.tensor([[2.3, 1.6]], dtype=torch.float64, requires_grad=True)
    location = ((pixel.detach() + 0.5) / size).requires_grad_()
    x, y = (pixel - pixel.floor()).unbind(-1)
    top, bottom = feature_map[:, 1, 2:4].sum(0), feature_map[:, 2, 2:4].sum(0)  # left, right
    upper, lower = ((1 - x) * left + x * right for left, right in (top, bottom))
    ((1 - y) * upper + y * lower).sum().backward()
    value = feature_map.flatten(1).t()[None, :, None]
    places, ones = location.view(1, 1, 1, 1, 1, 2), torch.ones(1, 1, 1, 1, 1).double()
    ms_deform_attn(value, [(height, width)], places, ones, "reference").sum().backward()
    torch.testing.assert_close(location.grad, pixel.grad * size)
