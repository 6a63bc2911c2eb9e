"""Levels with different numbers of points, as RT-DETRv2 has them, in the form of the operator.
Chapter many_scales derives that."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

OUTSIDE = -2.0  # a location off every map: nothing is read there


def even_points(
    locations: Tensor, weights: Tensor, num_points: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Locations (B, Q, M, L, K, 2) and weights (B, Q, M, L, K) of K_l points on level l, given as
    (B, Q, M, sum(K_l), 2) and (B, Q, M, sum(K_l)). num_points: the L numbers K_l, of which K is the
    largest; levels with fewer get points of weight zero outside the map."""
    K = max(num_points)
    each = locations.split(list(num_points), dim=3)
    locations = torch.stack([F.pad(x, (0, 0, 0, K - x.shape[3]), value=OUTSIDE) for x in each], 3)
    each = weights.split(list(num_points), dim=3)
    return locations, torch.stack([F.pad(x, (0, K - x.shape[3])) for x in each], 3)
