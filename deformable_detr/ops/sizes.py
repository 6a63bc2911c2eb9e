"""Sizes of levels, also where they are not numbers yet: while torch.compile, torch.export or an
ONNX exporter looks at a program, a size is a symbol (SymInt), or a 0-d tensor where it was traced
or is read from a tensor. What is computed from them here stays so, and holds at other sizes.

Chapter many_scales lays the levels one after another.
"""

import operator
import warnings
from collections.abc import Callable, Sequence
from functools import wraps

import torch
from torch import SymInt, Tensor
from torch._subclasses.fake_tensor import FakeTensor

Size = int | SymInt | Tensor
Shapes = list[tuple[Size, Size]]
SpatialShapes = Sequence[tuple[int, int]] | Tensor


def check_spatial_shapes(spatial_shapes: SpatialShapes) -> Shapes:
    """The levels' sizes as a list of (H, W); ValueError unless they are pairs of positive ints."""
    if isinstance(spatial_shapes, Tensor) and _is_hidden(spatial_shapes):
        return _rows(spatial_shapes)
    if hasattr(spatial_shapes, "tolist"):  # a tensor, or an array of numpy
        spatial_shapes = spatial_shapes.tolist()
    try:
        shapes = [(_size(height), _size(width)) for height, width in spatial_shapes]
    except (TypeError, ValueError):
        raise ValueError(
            f"spatial_shapes must be L pairs (H, W) of ints, got {spatial_shapes!r}"
        ) from None
    known = [n for shape in shapes for n in shape if not isinstance(n, Tensor)]
    if not shapes or any(n < 1 for n in known):
        raise ValueError(f"spatial_shapes must be L >= 1 pairs of positive ints, got {shapes}")
    return shapes


def are_known(shapes: Shapes) -> bool:
    """Whether all sizes are numbers or symbols, rather than tensors."""
    return not any(isinstance(n, Tensor) for shape in shapes for n in shape)


def numbers(sizes: Sequence[Size], like: Tensor) -> Tensor:
    """Sizes as a tensor (N,) of the dtype and on the device of `like`."""
    # new_tensor would write down the numbers that a traced program was shown, for all times
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if not traced and all(isinstance(n, int) for n in sizes):
        return like.new_tensor(sizes)
    each = (n.to(like) if isinstance(n, Tensor) else like.new_full((), n) for n in sizes)
    return torch.stack(list(each))


def smaller(size: int, other: Size) -> Size:
    """The smaller of a number and a size."""
    if isinstance(other, Tensor):
        return other.clamp(max=size)
    return torch.sym_min(size, other)


def quietly(check: Callable[..., None]) -> Callable[..., None]:
    """A check of shapes that, where it is traced, gives no warning that its comparisons are not."""

    @wraps(check)
    def checked(*args: object) -> None:
        if not torch.jit.is_tracing():
            return check(*args)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            return check(*args)

    return checked


def _is_hidden(sizes: Tensor) -> bool:
    """Whether a tensor's numbers cannot be read, or must not be because others may follow."""
    looked_at = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return looked_at or isinstance(sizes, FakeTensor) or sizes.is_meta


def _rows(sizes: Tensor) -> Shapes:
    """The rows of a tensor (L, 2) whose numbers are hidden, as pairs of 0-d tensors."""
    if sizes.ndim != 2 or sizes.shape[1] != 2 or sizes.shape[0] < 1 or sizes.is_floating_point():
        given = f"{tuple(sizes.shape)}, {sizes.dtype}"
        raise ValueError(f"spatial_shapes must be L >= 1 pairs (H, W) of ints, got {given}")
    return [tuple(row.unbind()) for row in sizes.unbind()]


def _size(n: object) -> Size:
    if isinstance(n, Tensor) and n.ndim == 0 and _is_hidden(n):
        return n
    return n if isinstance(n, (int, SymInt)) else operator.index(n)  # such as numpy's
