"""Random inputs of the operator, and what it should make of them: plain float64 loops."""

import torch

from tests.test_sampling import sample_by_loop

SHAPES = [(5, 7), (3, 4), (1, 2)]  # odd, non-square, one row


def make_inputs(B=2, Q=3, M=2, D=5, K=4, shapes=SHAPES, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    S = sum(height * width for height, width in shapes)
    value = torch.randn(B, S, M, D, generator=generator, dtype=dtype)
    size = (B, Q, M, len(shapes), K)
    locations = torch.rand(*size, 2, generator=generator, dtype=dtype) * 1.6 - 0.3
    weights = torch.rand(*size, generator=generator, dtype=dtype)
    return value, locations, weights


def attention_by_loops(value, shapes, locations, weights):
    B, _, M, D = value.shape
    _, Q, _, L, K, _ = locations.shape
    result = torch.zeros(B, Q, M * D, dtype=torch.float64)
    starts = [sum(h * w for h, w in shapes[:level]) for level in range(L)]
    for b in range(B):
        for q in range(Q):
            for m in range(M):
                for level, (height, width) in enumerate(shapes):
                    rows = value[b, starts[level] : starts[level] + height * width, m]
                    feature_map = rows.t().reshape(D, height, width)
                    for k in range(K):
                        x, y = locations[b, q, m, level, k].tolist()
                        sample = sample_by_loop(feature_map, x, y)
                        weight = weights[b, q, m, level, k].item()
                        for d in range(D):
                            result[b, q, m * D + d] += weight * sample[d]
    return result
