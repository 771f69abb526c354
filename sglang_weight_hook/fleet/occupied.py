"""Where slots have something, so that a look-up reads only the layouts that it needs.

To read a layout of a large model takes a second; what is kept of it here are the bounds of its runs
of memory, of which a model has few.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from typing import Optional

from ..reader import Document

_KEPT = 256  # layouts
_MOST_RUNS = 100_000  # of one layout; of another nothing is kept


class Occupied:
    """The runs of memory of the layouts that were read last.  Used by one thread at a time."""

    def __init__(self) -> None:
        self._runs: OrderedDict[str, tuple[list[int], list[int]]] = OrderedDict()

    def excludes(self, etag: Optional[str], address: int) -> bool:
        """Whether it is known that the layout of this digest has nothing at ``address``."""
        runs = None if etag is None else self._runs.get(etag)
        if runs is None:
            return False
        starts, ends = runs
        place = bisect_right(starts, address) - 1
        return place < 0 or address >= ends[place]

    def learn(self, etag: Optional[str], document: Document) -> None:
        """Keep where the document's tensors, regions and KV cache lie.  Raises HookError.

        ``etag``: of the slot's layout as it was before the document was read.
        """
        starts: list[int] = []
        ends: list[int] = []
        for start, end in sorted(document.occupied()):
            if ends and start <= ends[-1]:
                ends[-1] = max(ends[-1], end)
            else:
                starts.append(start)
                ends.append(end)
        if etag is not None and len(starts) <= _MOST_RUNS:
            self._runs[etag] = starts, ends
            self._runs.move_to_end(etag)
            while len(self._runs) > _KEPT:
                self._runs.popitem(last=False)
