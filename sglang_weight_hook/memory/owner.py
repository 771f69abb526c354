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
from ..layout.states import READY
from ..layout.variables import SHARE
from ..reader import Busy, Document, HookError, NoSocket, NotAllowed, OwnerGone, Tensor
from ..reader.conversation import Conversation
from .backend import Run, Span, fetch_one_by_one
from .errors import Changed, NotReadable

NAME = "owner"

_TIMEOUT = 10.0  # seconds, for an answer
_PAUSE, _LONGEST_PAUSE = 0.002, 0.05  # while the owner is busy


class OwnerMemory:
    """Asks the owner of ``document`` for copies."""

    name = NAME

    def __init__(self, document: Document) -> None:
        """Connect, and ask for nothing.  Raises NotReadable and Changed."""
        self._document = document
        self._asked_at = time.monotonic()
        try:
            self._conversation = self._connected()
        except (NoSocket, NotAllowed) as error:
            raise NotReadable(str(error)) from error
        except OwnerGone as error:
            raise Changed(str(error)) from error
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
            try:
                self._ask(some)
                self._conversation.take_into(target[start : start + size])
            except BaseException as error:
                # Bytes may still come that belong to this request.
                self._conversation.close()
                if isinstance(error, OwnerGone):
                    raise Changed(str(error)) from error
                raise
            start += size

    def fetch_at(self, spans: Sequence[Span], target: memoryview) -> None:
        fetch_one_by_one(self, spans, target)

    def buffer(self, size: int) -> memoryview:
        return memoryview(bytearray(size))

    def _ask(self, runs: Sequence[Run]) -> None:
        """Have the runs copied; their bytes follow.

        Raises NotReadable, Changed, and ControlError where no answer can be had at the moment.
        """
        request = {
            "op": "copy",
            "slot": self._document.slot.name,
            "instance": self._document.instance,
            "runs": [list(run) for run in runs],
        }
        # The owner closes a connection on which nothing was said for long.
        idle = time.monotonic() > self._asked_at + IDLE_SECONDS / 2
        if idle or not self._conversation.is_open:
            self._conversation.close()
            self._conversation = self._connected()
        self._asked_at = time.monotonic()
        answer = self._answer(request)
        if answer.get("ok") is not True:
            raise refusal(self._document, answer)
        if answer.get("bytes") != sum(length for _, length in runs):
            raise HookError(
                f"the owner of slot {self._document.slot.name} announces {answer.get('bytes')!r} "
                f"bytes where another number was asked for; see what listens on its control socket"
            )

    def _answer(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """The owner's answer, asked again for a while if it is busy."""
        deadline, pause = time.monotonic() + _TIMEOUT, _PAUSE
        while True:
            try:
                answer = self._conversation.ask(request)
            except NotAllowed as error:
                raise NotReadable(str(error)) from error
            if answer.get("error") != "busy" or time.monotonic() > deadline:
                return answer
            state = self._document.slot.header().state
            if state != READY:
                raise Changed(
                    f"slot {self._document.slot.name} is {state}, and its owner copies only while "
                    f"it is ready; wait until it is, and read the document again"
                )
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _connected(self) -> Conversation:
        return Conversation(self._document.slot, self._document.state, _TIMEOUT)

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
    if word == "busy":
        return Busy(f"the owner of slot {name} has no time for a copy ({said}); ask again")
    if word in ("changed", "no_slot"):
        return Changed(f"slot {name} is not as the document says ({said}); read it again")
    return NotReadable(f"the owner of slot {name} could not copy: {said}; see its log")
