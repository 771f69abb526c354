"""The event log of a slot: one JSON line an event, appended, rotated once.

It outlives the process that wrote it, for it answers what has changed, not what is so now.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import Any

from ..layout.files import EVENTS, EVENTS_BEFORE
from .publish import encode

LIMIT = 1 << 20  # bytes, beyond which the file becomes the one before


class EventLog:
    """The log of one slot; the file is opened for each line, so nothing is held in between."""

    def __init__(self, directory: str, slot: str) -> None:
        self.path = os.path.join(directory, EVENTS.format(slot))
        self._before = os.path.join(directory, EVENTS_BEFORE.format(slot))

    def append(self, line: dict[str, Any]) -> None:
        """Add one line in one write.  Raises OSError.

        Through no link, and into nothing but a regular file.
        """
        with contextlib.suppress(FileNotFoundError):
            if os.lstat(self.path).st_size > LIMIT:
                os.replace(self.path, self._before)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(self.path, flags | os.O_CLOEXEC, 0o644)
        try:
            status = os.fstat(descriptor)
            # A second name is somebody else's file, planted here to be written to.
            if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
                raise OSError(errno.EINVAL, "the event log is not a file of its own", self.path)
            os.write(descriptor, encode(line, indent=False) + b"\n")
        finally:
            os.close(descriptor)
