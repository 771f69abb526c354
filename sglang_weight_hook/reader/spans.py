"""Which of many address spans cover an address."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable
from itertools import accumulate
from typing import Generic, TypeVar

Item = TypeVar("Item")


class SpanIndex(Generic[Item]):
    """Which of many spans cover an address, in O(log n + hits) after O(n log n) to build.

    Spans may overlap and nest as they like; addresses are at least 0 and below 2**64.

    >>> index = SpanIndex([(0, 100, "all"), (10, 20, "left"), (15, 30, "right"), (9, 9, "empty")])
    >>> index.at(17)
    ['all', 'left', 'right']
    >>> index.at(30), index.at(100)
    (['all'], [])
    """

    def __init__(self, spans: Iterable[tuple[int, int, Item]]) -> None:
        """``spans``: ``(start, end, item)``, ``end`` exclusive."""
        ordered = sorted((span for span in spans if span[0] < span[1]), key=lambda s: s[:2])
        # Not lists: a look-up would wait for the memory of one integer after the other.
        self._starts = array("Q", [start for start, _, _ in ordered])
        self._ends = [end for _, end, _ in ordered]
        self._items = [item for _, _, item in ordered]
        # How far the spans up to each one reach: what ends there cannot cover what lies behind.
        reach = [0, *accumulate(self._ends, max)]
        # One that ends behind all addresses is a lie, and has a list.
        self._reach = array("Q", reach) if reach[-1] < 2**64 else reach
        # _furthest[k][i]: which of the spans i .. i + 2**k - 1 ends last.  Two look-ups answer
        # that for any range, so each hit found costs a constant.
        self._furthest = [list(range(len(ordered)))]
        width = 1
        while 2 * width <= len(ordered):
            below = self._furthest[-1]
            self._furthest.append([self._later(i, j) for i, j in zip(below, below[width:])])
            width *= 2

    def at(self, address: int) -> list[Item]:
        """The items of all spans that cover ``address``, by start address."""
        behind, reach = bisect_right(self._starts, address), self._reach
        if reach[behind] <= address:
            return []
        if reach[behind - 1] <= address:
            return [self._items[behind - 1]]
        found = []
        ranges = [(0, behind)]
        while ranges:
            low, high = ranges.pop()
            if low >= high:
                continue
            level = (high - low).bit_length() - 1
            row = self._furthest[level]
            last = self._later(row[low], row[high - (1 << level)])
            if self._ends[last] > address:
                found.append(last)
                ranges += [(low, last), (last + 1, high)]
        return [self._items[position] for position in sorted(found)]

    def _later(self, one: int, other: int) -> int:
        return one if self._ends[one] >= self._ends[other] else other
