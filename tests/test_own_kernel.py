"""A kernel of the reader's own through the operator's tests (the end of chapter making_it_fast):

    python -m pytest tests/test_own_kernel.py --kernel my_kernel.cu

The file defines `__global__ void head(...)` with chapter making_it_fast's arguments, one thread a
head. Without
--kernel the tests run the plain one of tests/own_kernel.cu.
"""

from pathlib import Path

import pytest
import torch

from deformable_detr.exercises.cuda import build
from tests.oracle import attention_by_loops, make_inputs

CASES = {
    "one of everything": {"B": 1, "Q": 1, "M": 1, "D": 1, "K": 1, "shapes": [(1, 1)]},
    "all sizes different": {"B": 1, "Q": 5, "M": 3, "D": 6, "K": 4, "shapes": [(5, 7), (3, 4)]},
    "as in the paper": {"B": 1, "Q": 4, "M": 8, "D": 32, "K": 4, "shapes": [(4, 6), (2, 3)]},
    "odd channels": {"B": 1, "Q": 3, "M": 2, "D": 7, "K": 3, "shapes": [(6, 5)]},
    "several images": {"B": 3, "Q": 4, "M": 2, "D": 5, "K": 2, "shapes": [(3, 4), (2, 1)]},
    "no queries": {"B": 1, "Q": 0, "M": 2, "D": 8, "K": 2, "shapes": [(3, 4)]},
}


@pytest.fixture(scope="module")
def own_kernel(request):
    """The kernel as (value, shapes, locations, weights) -> (B, Q, M * D), image by image."""
    path = request.config.getoption("--kernel") or Path(__file__).parent / "own_kernel.cu"
    kernel = build(Path(path).read_text(), "head")

    def run(value, shapes, locations, weights):
        B, S, M, D = value.shape
        _, Q, _, L, K = weights.shape
        output, sizes = torch.zeros(B, Q, M * D), torch.tensor(shapes, dtype=torch.int32)
        for image in range(B):  # 7 threads a block: the last block has some too many
            arrays = value[image], sizes, locations[image], weights[image], output[image]
            kernel(-(-Q * M // 7), 7, *arrays, S, Q, M, D, L, K)
        return output

    return run


@pytest.mark.parametrize("name", CASES)
def test_own_kernel_against_loops(own_kernel, name):
    inputs = make_inputs(**CASES[name], dtype=torch.float32)
    shapes = CASES[name]["shapes"]
    value, locations, weights = (x.double() for x in inputs)
    expected = attention_by_loops(value, shapes, locations, weights).float()
    given = own_kernel(inputs[0], shapes, *inputs[1:])
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("coordinate", [torch.nan, torch.inf, -torch.inf, 1e30, -1e30])
def test_own_kernel_ignores_what_is_no_place(own_kernel, coordinate):
    shapes = [(5, 7), (3, 4)]
    value, locations, weights = make_inputs(B=1, shapes=shapes, dtype=torch.float32)
    without = weights.clone()
    without[..., 1] = 0
    locations[..., 1, 0] = coordinate
    far = locations.clone()
    far[..., 1, 0] = -5
    expected = own_kernel(value, shapes, far, without)
    given = own_kernel(value, shapes, locations, weights)
    torch.testing.assert_close(given, expected)
