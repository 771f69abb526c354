"""Connections that nobody uses now, kept for who asks the same server next.

To connect takes a tenth of a second.  But an engine of this process listens as long as it lives, on
all interfaces and without authentication (docs/transfer.md), so none is kept for long.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any, Generic, Optional, TypeVar

MOST = 4
SECONDS = 10.0

_T = TypeVar("_T")
# Of the parent of a forked child: their destructors would wait for threads that the child has not.
_foreign: list[Any] = []


class Idle(Generic[_T]):
    """By what they are good for.  Safe in several threads; a forked child has none."""

    def __init__(self, most: int = MOST, seconds: float = SECONDS) -> None:
        self._most, self._seconds = most, seconds
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._kept: dict[Any, tuple[_T, float]] = {}
        self._is_watched = False

    def _forget_parents(self) -> None:
        if self._pid != os.getpid():
            _foreign.append(self._kept)
            self._begin()

    def take(self, key: Any) -> Optional[_T]:
        self._forget_parents()
        with self._lock:
            found = self._kept.pop(key, None)
        return None if found is None else found[0]

    def put(self, key: Any, connection: _T) -> None:
        self._forget_parents()
        dropped = []
        with self._lock:
            dropped.append(self._kept.pop(key, None))
            while len(self._kept) >= self._most:
                dropped.append(self._kept.pop(next(iter(self._kept))))
            self._kept[key] = connection, time.monotonic()
            self._watch()
        # `dropped` ends here, outside the lock: an engine's end waits for its threads.

    def _watch(self) -> None:
        """Have a thread drop what is too old.  Under the lock."""
        if not self._is_watched:
            watch = threading.Thread(target=self._drop_old, name="idle connections", daemon=True)
            watch.start()
            self._is_watched = True

    def _drop_old(self) -> None:
        while True:
            with self._lock:
                if not self._kept:
                    self._is_watched = False
                    return
                oldest = min(since for _, since in self._kept.values())
            time.sleep(max(oldest + self._seconds - time.monotonic(), 0.01))
            now = time.monotonic()
            with self._lock:
                old = [
                    key for key, (_, since) in self._kept.items() if since + self._seconds <= now
                ]
                dropped = [self._kept.pop(key) for key in old]
            dropped.clear()
