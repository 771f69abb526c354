"""The slot's header, read by a transfer engine in the memory of the server's process.

It is what makes a transfer good for anything: a completed one proves nothing, for memory that was
freed or registered no more may still be read, and metadata may be a dead process's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Optional

from ..layout.header import SIZE, unpack
from ..reader import Header
from .errors import Changed

# The owner takes some microseconds to rewrite it, and milliseconds if it loses the processor.
_SECONDS = 2.0
_PAUSE, _LONGEST_PAUSE = 0.0002, 0.02


class RemoteHeader:
    """Looks at a header through ``fetch``, which gives `SIZE` bytes of it or raises HookError."""

    is_cheap = False  # a round trip to another machine

    def __init__(self, slot: str, fetch: Callable[[], bytes]) -> None:
        self._slot = slot
        self._fetch = fetch

    def look(self, known: int) -> Optional[Header]:
        deadline, pause = time.monotonic() + _SECONDS, _PAUSE
        while True:
            try:
                header = unpack(self._fetch())
            except ValueError as error:
                raise Changed(
                    f"where slot {self._slot} had its header lies something else ({error}): its "
                    f"owner has left the slot or exited; read the document again"
                ) from error
            if header is not None:
                return None if header.sequence == known else header
            if time.monotonic() > deadline:
                raise Changed(
                    f"the header of slot {self._slot} is not consistent: its owner was stopped or "
                    f"killed while it wrote it; read the document again"
                )
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def close(self) -> None:
        """Nothing: the engine is another's."""


assert SIZE == 128  # as the transport document has it
