"""Many slots on several cores, for each takes a moment."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import TypeVar

from ..reader import Slot

_SLOTS_A_CORE = 4

Found = TypeVar("Found")


def for_each(work: Callable[[Slot], Found], slots: list[Slot]) -> list[Found]:
    """What ``work`` finds in each slot; it and what it finds go from one process to another."""
    cores = min(os.cpu_count() or 1, len(slots) // _SLOTS_A_CORE)
    # What others have read is waited for rather than worked for, over connections of this process.
    if cores < 2 or any(slot.is_remote for slot in slots):
        return list(map(work, slots))
    # Here, for few slots and `--help` need neither.
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    # Forked, so that nothing is imported again; this process has one thread.
    context = multiprocessing.get_context("fork")
    # Documents are trees, which need no garbage collector; it would go through each several times.
    with ProcessPoolExecutor(cores, mp_context=context, initializer=gc.disable) as pool:
        return list(pool.map(work, slots))
