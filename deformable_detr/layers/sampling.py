"""Bilinear sampling by hand: the one primitive under everything else.
Chapter sampling derives it."""

from torch import Tensor

from deformable_detr.ops.reference import sample_levels


def normalised_to_pixel(points: Tensor, size: tuple[int, int]) -> Tensor:
    """Pixel coordinates, with pixel centres at integers, of normalised points.

    points: (..., 2) as (x, y); (0, 0) is the top-left corner of the top-left pixel and (1, 1) the
    bottom-right corner of the bottom-right pixel. size: (H, W). Returns (..., 2) as (x, y).
    """
    height, width = size
    return points * points.new_tensor([width, height]) - 0.5


def pixel_to_normalised(points: Tensor, size: tuple[int, int]) -> Tensor:
    """The inverse of `normalised_to_pixel`, with the same shapes."""
    height, width = size
    return (points + 0.5) / points.new_tensor([width, height])


def bilinear_sample(feature_map: Tensor, points: Tensor) -> Tensor:
    """Values of a feature map between its pixels; G(q, p) of the deformable convolution
    paper, Eq. 3.

    feature_map: (C, H, W). points: (..., 2) as (x, y), normalised as in `normalised_to_pixel`;
    any value is allowed, and whatever lies outside the map counts as zero, NaN included.
    Returns (..., C), differentiable in both arguments; on a pixel's centre, where the slope jumps,
    it is the one to the right and below. Raises ValueError on other shapes.
    """
    if feature_map.ndim != 3:
        raise ValueError(f"feature_map must be (C, H, W), got {tuple(feature_map.shape)}")
    if points.shape[-1:] != (2,):
        raise ValueError(f"points must be (..., 2) as (x, y), got {tuple(points.shape)}")
    channels, *size = feature_map.shape
    value = feature_map.flatten(1).t()[None, :, None]  # (1, H*W, 1, C): one level, one head
    samples = sample_levels(value, [tuple(size)], points.reshape(1, -1, 1, 1, 1, 2))
    return samples.view(*points.shape[:-1], channels)
