"""Bilinear sampling by hand: the one primitive under everything else. Chapter 1 derives it."""

from torch import Tensor


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
    Returns (..., C), differentiable in both arguments. Raises ValueError on other shapes.
    """
    if feature_map.ndim != 3:
        raise ValueError(f"feature_map must be (C, H, W), got {tuple(feature_map.shape)}")
    if points.shape[-1:] != (2,):
        raise ValueError(f"points must be (..., 2) as (x, y), got {tuple(points.shape)}")
    channels, height, width = feature_map.shape
    pixel = normalised_to_pixel(points, (height, width))
    x, y = pixel.unbind(-1)
    inside = (x > -1) & (x < width) & (y > -1) & (y < height)  # False for NaN
    x, y = x.where(inside, x.new_zeros(())), y.where(inside, y.new_zeros(()))

    rows = feature_map.flatten(1).t()  # (H*W, C): one row per pixel
    left, top = x.floor(), y.floor()
    result = feature_map.new_zeros(*points.shape[:-1], channels)
    for corner_x, corner_y in ((0, 0), (1, 0), (0, 1), (1, 1)):
        column, row = left + corner_x, top + corner_y
        weight = (1 - (x - column).abs()) * (1 - (y - row).abs())
        exists = inside & (column >= 0) & (column < width) & (row >= 0) & (row < height)
        index = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).long()
        result = result + rows[index] * (weight * exists).unsqueeze(-1)
    return result
