"""The operator: multi-scale deformable attention without its projections. Chapter 5 derives it."""

from collections.abc import Sequence

from torch import Tensor

from deformable_detr.backends import reference

SpatialShapes = Sequence[tuple[int, int]] | Tensor


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Sample K points on each of L levels for every query and head, and sum them by weight.

    The inner sums of Eq. 3 in "Deformable DETR" (Zhu et al., 2021).

    value: (B, S, M, D), the L maps one after another, each flattened row by row;
        S = sum(H_l * W_l).
    spatial_shapes: L pairs (H_l, W_l), or an integer tensor (L, 2).
    sampling_locations: (B, Q, M, L, K, 2) as (x, y), normalised: (0, 0) is the top-left corner of
        the top-left pixel, (1, 1) the bottom-right corner of the bottom-right one. Samples outside
        a map count as zero, also where the coordinate is NaN or infinite.
    attention_weights: (B, Q, M, L, K), usually a softmax over the last two axes together.
    Returns (B, Q, M * D), the heads side by side. Differentiable in all three float tensors.
    Raises ValueError or TypeError where shapes, dtypes or devices do not fit together.
    """
    shapes = check_spatial_shapes(spatial_shapes)
    _check(value, shapes, sampling_locations, attention_weights)
    return reference.ms_deform_attn(value, shapes, sampling_locations, attention_weights)


def check_spatial_shapes(spatial_shapes: SpatialShapes) -> list[tuple[int, int]]:
    """The levels' sizes as a list of (H, W); ValueError unless they are pairs of positive ints."""
    if isinstance(spatial_shapes, Tensor):
        spatial_shapes = spatial_shapes.tolist()
    try:
        shapes = [(int(height), int(width)) for height, width in spatial_shapes]
    except (TypeError, ValueError):
        raise ValueError(f"spatial_shapes must be L pairs (H, W), got {spatial_shapes!r}") from None
    if not shapes or any(height < 1 or width < 1 for height, width in shapes):
        raise ValueError(f"spatial_shapes must be L >= 1 pairs of positive ints, got {shapes}")
    return shapes


def _check(
    value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor
) -> None:
    if value.ndim != 4:
        raise ValueError(f"value must be (B, S, M, D), got {tuple(value.shape)}")
    B, S, M, _ = value.shape
    total = sum(height * width for height, width in shapes)
    if total != S:
        raise ValueError(f"spatial_shapes {shapes} hold {total} tokens, but value has S={S}")
    expected = (B, M, len(shapes), 2)
    if locations.ndim != 6 or (locations.shape[0], *locations.shape[2:4], locations.shape[5]) != (
        expected
    ):
        raise ValueError(
            f"sampling_locations must be (B={B}, Q, M={M}, L={len(shapes)}, K, 2), "
            f"got {tuple(locations.shape)}"
        )
    if weights.shape != locations.shape[:-1]:
        raise ValueError(
            f"attention_weights must be {tuple(locations.shape[:-1])} as (B, Q, M, L, K), "
            f"got {tuple(weights.shape)}"
        )
    tensors = (value, locations, weights)
    if not value.is_floating_point() or len({t.dtype for t in tensors}) > 1:
        raise TypeError(
            "value, sampling_locations and attention_weights must have one floating dtype, got "
            + ", ".join(str(t.dtype) for t in tensors)
        )
    if len({t.device for t in tensors}) > 1:
        raise ValueError(
            "value, sampling_locations and attention_weights must be on one device, got "
            + ", ".join(str(t.device) for t in tensors)
        )
