"""The event log of a slot: what has happened to its weights, also when its owner has exited.

The files (``layout.files.EVENTS``) are appended to while they are read, rotated, cut short by a
full disk, and may hold what is not ours: what is no event is left out and counted.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple, Optional

from ..layout import files
from .errors import HookError
from .files import MAX_DOCUMENT_BYTES, open_regular

# An event's line has some 800 bytes; of a longer one no more than this is ever in memory.
MAX_LINE = 64 * 1024


class PastEvent(NamedTuple):
    """One event of a slot's log."""

    slot: str
    at: float  # when it was published, in seconds since 1970-01-01 UTC
    kind: str  # ``update_weights_from_disk``, ``unannounced_change``, ...
    raw: Mapping[str, Any]  # the line of the log


class History:
    """The events of one slot, the oldest first; made by `Slot.history`.

    Read anew by every iteration, one line at a time.  Iterating raises HookError where there is no
    log, or one that cannot be read.
    """

    def __init__(
        self, directory: str, slot: str, since: Optional[float], kind: Optional[str]
    ) -> None:
        self.slot = slot
        self.skipped: int = 0  # lines that are no events, of the iteration begun last
        self._paths = [
            os.path.join(directory, name.format(slot))
            for name in (files.EVENTS, files.EVENTS_BEFORE)
        ]
        self._since = since
        self._kind = kind

    def __iter__(self) -> Iterator[PastEvent]:
        self.skipped = 0
        with contextlib.ExitStack() as opened:
            # The current one first: one that is rotated meanwhile is then met a second time, by
            # its inode, and not lost.
            found: list[BinaryIO] = []
            for path in self._paths:
                file = _open(path)
                if file is not None:
                    opened.enter_context(file)
                    if not (found and _same_file(found[0], file)):
                        found.append(file)
            if not found:
                raise HookError(
                    f"{self._paths[0]} does not exist: no event of slot {self.slot} was logged in "
                    f"this directory; check the directory and the slot's name"
                )
            for file in reversed(found):
                yield from self._events(file)

    def _events(self, file: BinaryIO) -> Iterator[PastEvent]:
        for line in _lines(file):
            event = None if line is None else _event(self.slot, line)
            if event is None:
                self.skipped += 1
            elif self._is_wanted(event):
                yield event

    def _is_wanted(self, event: PastEvent) -> bool:
        return (self._since is None or event.at >= self._since) and (
            self._kind is None or fnmatch.fnmatchcase(event.kind, self._kind)
        )


def _open(path: str) -> Optional[BinaryIO]:
    """The file, or None where there is none.  Raises HookError."""
    descriptor = open_regular(path, follow=False, limit=MAX_DOCUMENT_BYTES)
    return None if descriptor is None else os.fdopen(descriptor, "rb")


def _same_file(one: BinaryIO, other: BinaryIO) -> bool:
    return os.path.sameopenfile(one.fileno(), other.fileno())


def _lines(file: BinaryIO) -> Iterator[Optional[bytes]]:
    """Each line up to the size that the file has now; None for one that is too long or torn."""
    left = os.fstat(file.fileno()).st_size
    while left > 0:
        line = file.readline(min(MAX_LINE, left))
        left -= len(line)
        if line.endswith(b"\n"):
            yield line
            continue
        while line and left > 0 and not line.endswith(b"\n"):
            line = file.readline(min(MAX_LINE, left))
            left -= len(line)
        yield None
        if not line:
            return  # it has become shorter


def _event(slot: str, line: bytes) -> Optional[PastEvent]:
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event_of(slot, raw)


def event_of(slot: str, raw: Any) -> Optional[PastEvent]:
    """The event that one line of a log is; None where it is none."""
    if not isinstance(raw, dict):
        return None
    at, kind = raw.get("updated_at"), raw.get("kind")
    if not isinstance(kind, str) or isinstance(at, bool) or not isinstance(at, (int, float)):
        return None
    try:
        at = float(at)
    except OverflowError:
        return None
    return PastEvent(slot, at, kind, raw) if math.isfinite(at) else None
