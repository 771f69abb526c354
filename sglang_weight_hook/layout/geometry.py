"""Byte spans: what a strided tensor touches, and how spans merge.  Pure integer arithmetic.

All sizes and addresses are in bytes.  A span is ``(start, end)``, ``end`` exclusive.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import attrgetter, itemgetter
from typing import NamedTuple


def touched_bytes(shape: Sequence[int], stride: Sequence[int], itemsize: int) -> int:
    """Bytes from a tensor's first element to behind its last one.

    This, not ``numel * itemsize``, is what a reader of the memory must cover: a padded or
    transposed tensor reaches further, an expanded one (stride 0) less far.

    >>> touched_bytes((2, 3), (3, 1), 4)
    24
    >>> touched_bytes((2, 3), (8, 1), 4)  # rows padded to 8 elements
    44
    >>> touched_bytes((5, 3), (0, 1), 2)  # expanded
    6
    >>> touched_bytes((0, 3), (3, 1), 2)
    0
    """
    last = 0
    for length, step in zip(shape, stride):
        if length == 0:
            return 0
        last += (length - 1) * step
    return (last + 1) * itemsize


class Region(NamedTuple):
    """A maximal gap-free run of weight bytes inside one allocation."""

    start: int
    end: int
    allocation: tuple[int, int]  # base address, size
    names: list[str]


_allocation_and_start = itemgetter(2, 0)


def merge(spans: Iterable[tuple[int, int, tuple[int, int], str]]) -> list[Region]:
    """Merge touching or overlapping spans ``(start, end, allocation, name)``.

    Spans in different allocations never merge, even where one ends at the address at which
    the other begins: an RDMA registration or an IPC handle covers one allocation.
    Sorted by address.
    """
    regions: list[Region] = []
    for start, end, allocation, name in sorted(spans, key=_allocation_and_start):
        if start >= end:
            continue
        last = regions[-1] if regions else None
        if last is not None and start <= last.end and last.allocation == allocation:
            last.names.append(name)
            if end > last.end:
                regions[-1] = last._replace(end=end)
        else:
            regions.append(Region(start, end, allocation, [name]))
    regions.sort(key=attrgetter("start"))
    return regions
