"""Looks at many slots again and again, and reads documents only of those that have changed.

A look at a slot is 8 bytes of its header, a try of its owner's lock and the process behind it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import NamedTuple, Optional

from ..layout import files, process
from ..reader import Directory, HeaderReader, HookError, Slot
from ..reader.ownership import HELD, lock_at
from .directories import slots_of_each
from .overview import SlotOverview, overview_of

Key = tuple[str, str]  # directory and slot


class _Known(NamedTuple):
    slot: Slot
    overview: SlotOverview
    header: Optional[HeaderReader]  # None: there is none, so the state is read each time
    sequence: int
    process: tuple[Optional[int], Optional[int]]  # of the owner: pid and start time


class SlotPolling:
    """Every slot of some directories, which need not exist yet."""

    def __init__(self, directories: Iterable[Directory]) -> None:
        self.directories = list(directories)
        self.problems: dict[str, str] = {}  # by directory, why its slots are not known
        self.documents_read = 0  # how often a slot's documents were
        self._known: dict[Key, _Known] = {}

    def poll(self) -> dict[Key, SlotOverview]:
        """All slots as they are now, in the order of directories and numbers."""
        found: dict[Key, SlotOverview] = {}
        self.problems = {}
        for directory, slots in slots_of_each(self.directories).items():
            if isinstance(slots, HookError):
                self.problems[directory.path] = str(slots)
                continue
            for slot in slots:
                key = slot.directory, slot.name
                known = self._known.get(key)
                if known is None or _has_changed(known):
                    if known is not None and known.header is not None:
                        known.header.close()
                    known = self._known[key] = self._read(slot)
                found[key] = known.overview
        for key in self._known.keys() - found.keys():
            gone = self._known.pop(key)
            if gone.header is not None:
                gone.header.close()
        return found

    def slot(self, key: Key) -> Slot:
        """One of those that `poll` has found.  Raises HookError."""
        known = self._known.get(key)
        if known is None:
            raise HookError(f"slot {key[1]} is no longer published in {key[0]}")
        return known.slot

    def close(self) -> None:
        for known in self._known.values():
            if known.header is not None:
                known.header.close()
        self._known.clear()

    def _read(self, slot: Slot) -> _Known:
        self.documents_read += 1
        reader, sequence = None, 0
        owner: tuple[Optional[int], Optional[int]] = (None, None)
        with contextlib.suppress(HookError):
            reader = slot.open_header()
            header = reader.read()  # before the documents: a change meanwhile is met again
            sequence, owner = header.sequence, (header.pid, header.process_start_ticks)
        return _Known(slot, overview_of(slot), reader, sequence, owner)


def _has_changed(known: _Known) -> bool:
    """Whether documents or the owner may be other ones than they were."""
    if known.header is None:
        return True
    try:
        if known.header.sequence != known.sequence or not known.header.is_current():
            return True
    except HookError:
        return True
    if not known.overview.owner_alive:
        # Stale it stays until another process takes the slot, which replaces the header.
        return known.overview.owner_alive is None
    pid, ticks = known.process
    if lock_at(known.slot.path(files.OWNER_LOCK)) != HELD or pid is None:
        return True
    return process.is_running(pid, ticks) is False
