"""Images of one size share a batch: none is padded, and none is seen otherwise than alone.

Padding changes what a detector finds: the official code reckons an image's part of a feature map in
whole cells, and normalises over padding. `models.exact_tokens` says more.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import TypeVar

Found = TypeVar("Found")


def batches_of_one_size(sizes: Sequence[Hashable], most: int) -> list[list[int]]:
    """The places of equal sizes, `most` at most in a batch, batches in the order of their first.

    sizes: of images, (H, W) each, or whatever tells them apart. ValueError where most is below 1.
    """
    if most < 1:
        raise ValueError(f"batch_size must be at least 1, got {most}")
    batches: list[list[int]] = []
    last: dict[Hashable, list[int]] = defaultdict(list)
    for i, size in enumerate(sizes):
        if len(last[size]) % most == 0:
            last[size] = []
            batches.append(last[size])
        last[size].append(i)
    return batches


def in_order(
    batches: Iterable[list[int]], look_at: Callable[[list[int]], list[Found]]
) -> Iterator[Found]:
    """What is found at the places 0, 1, 2 ..., each as soon as all before it are there.

    batches: of places, together all of them. look_at: gives what is found at the places of one.
    """
    ready: dict[int, Found] = {}
    place = 0
    for batch in batches:
        ready |= zip(batch, look_at(batch), strict=True)
        while place in ready:
            yield ready.pop(place)
            place += 1
