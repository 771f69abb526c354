"""The arithmetic of a GPU's memory, for one process's layout and for sums over several."""

from __future__ import annotations

from typing import NamedTuple


class Remainder(NamedTuple):
    """What closes the sum ``counted + other + free - unbacked == total``.  In bytes."""

    other: int  # used by nothing that was counted: CUDA, NCCL, other processes
    unbacked: int  # counted in addresses, while its physical memory is given back


def remainder(total: int, free: int, counted: int, released: int) -> Remainder:
    """What of a device is left over beside ``counted``, of which ``released`` has no pages.

    ``released`` is what is known to be released; where the device's own figures leave room for
    less than the rest of ``counted``, more must be.

    >>> remainder(total=80, free=60, counted=30, released=30)   # 20 are somebody else's
    Remainder(other=20, unbacked=30)
    >>> remainder(total=80, free=60, counted=30, released=0)
    Remainder(other=0, unbacked=10)
    """
    rest = total - free - counted + released
    return Remainder(max(rest, 0), released + max(-rest, 0))
