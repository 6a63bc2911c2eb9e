"""Boxes that were drawn twice, found in a time that grows with their number, not its square."""

from collections.abc import Iterator
from itertools import product

import numpy as np

SAME_BOX = 0.95  # overlap (IoU) from which two boxes are taken for one object annotated twice
CELL = 0.12  # sides of two such boxes differ by less than half of this, relative to the larger


def duplicate_boxes(boxes: np.ndarray, groups: np.ndarray) -> Iterator[tuple[int, int]]:
    """(later, earlier) for each box that has nearly the place of an earlier one in its group.

    boxes: (N, 4) xyxy, of some size. groups: (N,) int. Boxes are put into the cells of a grid over
    their sizes and places. Two that are nearly the same can lie on both sides of a border, but not
    in all of the 16 grids that are shifted by half a cell.
    """
    earlier = np.full(len(boxes), -1)
    alone = np.bincount(groups, minlength=1)[groups] == 1
    with np.errstate(all="ignore"):  # of sides that are next to nothing
        for shifts in product((0.0, 0.5), repeat=4):
            rows = np.flatnonzero((earlier < 0) & ~alone)
            cells = _cells(boxes[rows], np.array(shifts))
            keys = _key(np.column_stack([groups[rows], cells]))
            _compare(boxes, groups, rows, keys, earlier)
    yield from ((int(row), int(earlier[row])) for row in np.flatnonzero(earlier >= 0))


def _cells(boxes: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """(N, 4): of each box, its cell among sizes, by their logarithms, and among places, in the unit
    of that cell's size."""
    sizes = np.log(boxes[:, 2:] - boxes[:, :2]) / CELL
    by_size = np.floor(sizes + shifts[:2])
    unit = CELL * np.exp((by_size - shifts[:2] + 1) * CELL)
    return np.hstack([by_size, np.floor(boxes[:, :2] / unit + shifts[2:])])


def _key(cells: np.ndarray) -> np.ndarray:
    """(N,): one number for each row of numbers; that of another row may be the same by chance."""
    key = np.zeros(len(cells), np.uint64)
    for column in cells.T:
        key = (key ^ column.astype(np.int64).view(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    return key ^ key >> np.uint64(32)


def _compare(
    boxes: np.ndarray, groups: np.ndarray, rows: np.ndarray, keys: np.ndarray, earlier: np.ndarray
) -> None:
    """Write into `earlier` which rows have the place of the first one in their cell, then of the
    first of those that are left, and so on: only few fit into a cell without being the same."""
    order = np.argsort(keys, kind="stable")  # the earlier row comes first
    rows, keys = rows[order], keys[order]
    while len(rows):
        starts = np.concatenate([[True], keys[1:] != keys[:-1]])
        first, others = rows[starts][(np.cumsum(starts) - 1)[~starts]], rows[~starts]
        overlap = _overlap(boxes[first], boxes[others])
        same = (overlap > SAME_BOX) & (groups[first] == groups[others])
        earlier[others[same]] = first[same]
        rows, keys = others[~same], keys[~starts][~same]


def _overlap(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The intersection over union, (N,), of N pairs of boxes, (N, 4) xyxy each."""
    sides = np.minimum(one[:, 2:], other[:, 2:]) - np.maximum(one[:, :2], other[:, :2])
    both = sides.clip(0).prod(1)
    return both / ((one[:, 2:] - one[:, :2]).prod(1) + (other[:, 2:] - other[:, :2]).prod(1) - both)
