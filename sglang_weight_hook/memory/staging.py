"""Memory of this process that an engine writes into: registered once, filled in batches."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .backend import Run

_LARGE = 4 << 20


class Part(NamedTuple):
    """A piece of one run, and where it goes."""

    address: int  # in the owner's address space
    size: int
    offset: int  # from the start of the batch's target


class Buffer:
    """Anonymous pages, which no allocator hands to anybody else while an engine may write."""

    def __init__(self, size: int) -> None:
        self._map = mmap.mmap(-1, max(size, 1))
        if size >= _LARGE:  # the kernel takes as long for small pages as an engine to fill them
            with contextlib.suppress(AttributeError, OSError):
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self.size = size
        self.view = memoryview(self._map)[:size]
        self.address = address_of(memoryview(self._map))

    def holds(self, address: int, size: int) -> bool:
        return self.address <= address and address + size <= self.address + self.size


def address_of(target: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(target))


def batches(runs: Sequence[Run], most_bytes: int, most_parts: int) -> Iterator[list[Part]]:
    """The runs one after the other, in batches of bounded size; long ones in parts.

    >>> [[tuple(part) for part in batch] for batch in batches([(0, 6), (100, 2)], 4, 9)]
    [[(0, 4, 0)], [(4, 2, 0), (100, 2, 2)]]
    """
    batch: list[Part] = []
    filled = 0
    for address, size in runs:
        while size:
            part = min(size, most_bytes - filled)
            batch.append(Part(address, part, filled))
            address, size, filled = address + part, size - part, filled + part
            if filled == most_bytes or len(batch) == most_parts:
                yield batch
                batch, filled = [], 0
    if batch:
        yield batch
