"""Copies that the owner makes for us and hands over its control socket.

For what cannot be reached otherwise: memory of a GPU that the driver exports to no other process
(the memory saver's), and processes that the kernel does not let us read.  The server has to be
started with SGLANG_WEIGHT_HOOK_SHARE=1.  It copies at most `PIECE` bytes at a time, between two of
its events, and waits for nobody who is slow to take them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..layout.sharing import COPY_BYTES, COPY_RUNS, IDLE_SECONDS
from ..layout.variables import SHARE
from ..reader import ControlError, Document, HookError, NotAllowed, Tensor
from ..reader.conversation import Conversation
from .backend import Run
from .errors import Changed, NotReadable

NAME = "owner"

_TIMEOUT = 10.0  # seconds, for an answer
_PAUSE = 0.002  # while the owner is busy


class OwnerMemory:
    """Asks the owner of ``document`` for copies."""

    name = NAME

    def __init__(self, document: Document) -> None:
        """Connect, and ask for nothing.  Raises NotReadable and Changed."""
        self._document = document
        self._asked_at = time.monotonic()
        self._conversation = self._connected()
        try:
            self._ask([])
        except BaseException:
            self.close()
            raise

    def reaches(self, tensor: Tensor) -> bool:
        return True

    def view(self, tensor: Tensor) -> None:
        return None

    def fetch(self, runs: Sequence[Run], target: memoryview) -> None:
        start = 0
        for some in requests(runs):
            size = sum(length for _, length in some)
            self._ask(some)
            try:
                self._conversation.take_into(target[start : start + size])
            except ControlError as error:
                raise Changed(str(error)) from error
            start += size

    def _ask(self, runs: Sequence[Run]) -> None:
        """Have the runs copied; their bytes follow.  Raises NotReadable and Changed."""
        request = {
            "op": "copy",
            "slot": self._document.slot.name,
            "instance": self._document.instance,
            "runs": [list(run) for run in runs],
        }
        deadline = time.monotonic() + _TIMEOUT
        if time.monotonic() > self._asked_at + IDLE_SECONDS / 2:
            # The owner closes a connection on which nothing was said for long.
            self._conversation.close()
            self._conversation = self._connected()
        self._asked_at = time.monotonic()
        while True:
            try:
                answer = self._conversation.ask(request)
            except NotAllowed as error:
                raise NotReadable(str(error)) from error
            except ControlError as error:
                raise Changed(str(error)) from error
            if answer.get("error") != "busy" or time.monotonic() > deadline:
                break
            time.sleep(_PAUSE)
        if answer.get("ok") is not True:
            raise refusal(self._document, answer)
        if answer.get("bytes") != sum(length for _, length in runs):
            raise HookError(
                f"the owner of slot {self._document.slot.name} announces {answer.get('bytes')!r} "
                f"bytes where another number was asked for; see what listens on its control socket"
            )

    def _connected(self) -> Conversation:
        document = self._document
        try:
            return Conversation(document.slot, document.state, _TIMEOUT)
        except ControlError as error:
            raise NotReadable(str(error)) from error

    def close(self) -> None:
        self._conversation.close()


def requests(runs: Sequence[Run]) -> Iterator[list[Run]]:
    """The runs in groups that one request may ask for; long ones in parts.

    >>> [len(some) for some in requests([(4096, 3 * COPY_BYTES)])]
    [1, 1, 1]
    >>> [some[0] for some in requests([(0, 16), (64, COPY_BYTES)])]
    [(0, 16), (4194352, 16)]
    """
    some: list[Run] = []
    size = 0
    for address, length in runs:
        while length:
            part = min(length, COPY_BYTES - size)
            some.append((address, part))
            address, length, size = address + part, length - part, size + part
            if size == COPY_BYTES or len(some) == COPY_RUNS:
                yield some
                some, size = [], 0
    if some:
        yield some


def refusal(document: Document, answer: Mapping[str, Any]) -> HookError:
    """What an answer that is not ``ok`` means."""
    word, said = answer.get("error"), str(answer.get("message"))[:200]
    name = document.slot.name
    if word == "not_shared":
        return NotReadable(
            f"the owner of slot {name} hands out no memory; start the server with {SHARE}=1"
        )
    if word == "unknown":
        return NotReadable(
            f"the owner of slot {name} knows nothing of sharing ({said}); install the hook's newer "
            f"release in the server's environment and start it with {SHARE}=1"
        )
    if word in ("busy", "changed", "no_slot"):
        return Changed(f"slot {name} is not as the document says ({said}); read it again")
    return NotReadable(f"the owner of slot {name} could not copy: {said}; see its log")
