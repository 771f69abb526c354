"""The changes of all slots in order, for any number of readers that each go at their own pace.

A ring: whoever falls behind by more than it holds begins again with everything.  So a slow reader
costs the agent nothing, and none is waited for.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import NamedTuple, Optional

from .entry import Entry
from .identity import Identity

KEPT = 1024
KEEP_ALIVE = 15.0  # seconds

STATE, REMOVED, RESET, AGENT = "state", "removed", "reset", "agent"


class _Message(NamedTuple):
    number: int
    kind: str
    id: str  # of the slot
    data: bytes


class Feed:
    """Belongs to one event loop; `publish` is called there."""

    def __init__(self, kept: int = KEPT, identity: Optional[Identity] = None) -> None:
        """``identity``: what the agent has registered under, which each stream begins with."""
        self.identity = identity
        self.boot = secrets.token_hex(8)  # of this agent: numbers of another one mean nothing
        self.number = 0
        self.is_closed = False
        self._kept: deque[_Message] = deque(maxlen=kept)
        self._news = asyncio.Event()

    def publish(self, entry: Optional[Entry], id: str) -> None:
        """``entry`` is new or another one; None: the slot ``id`` is gone."""
        self.number += 1
        if entry is None:
            data = json.dumps({"id": id}).encode()
            self._kept.append(_Message(self.number, REMOVED, id, data))
        else:
            self._kept.append(_Message(self.number, STATE, id, entry.encoded))
        self._wake()

    def close(self) -> None:
        """End every stream."""
        self.is_closed = True
        self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    def position(self, last: Optional[str]) -> Optional[int]:
        """After which number to go on for a reader that knows ``last``; None: with everything."""
        boot, _, text = (last or "").rpartition("-")
        if boot != self.boot or not text.isdecimal() or len(text) > 18:
            return None
        number = int(text)
        return number if self._reaches(number) and number <= self.number else None

    def _reaches(self, number: int) -> bool:
        """Whether everything after ``number`` is still here."""
        return number >= self.number - len(self._kept)

    async def stream(
        self,
        entries: Callable[[], Sequence[Entry]],
        wanted: Optional[str] = None,
        last: Optional[str] = None,
    ) -> AsyncGenerator[bytes, None]:
        """The text of an event stream: every slot as it is, then each change.

        ``wanted``: only the slot of that id.  ``last``: the Last-Event-ID of a reader that had a
        stream before.
        """
        if self.identity is not None:
            yield message(AGENT, json.dumps(self.identity._asdict()).encode())
        at = self.position(last)
        if at is None:
            if last is not None:
                yield message(RESET, b"{}")
            at = self.number
            for text in self._everything(entries, wanted, at):
                yield text
        while not self.is_closed:
            news = self._news
            if not self._reaches(at):
                yield message(RESET, b"{}")
                at = self.number
                for text in self._everything(entries, wanted, at):
                    yield text
                continue
            missing = self.number - at
            found = [self._kept[index] for index in range(-missing, 0)]
            at = self.number
            for one in found:
                if wanted is None or one.id == wanted:
                    yield message(one.kind, one.data, f"{self.boot}-{one.number}")
            if found:
                continue
            try:
                await asyncio.wait_for(news.wait(), KEEP_ALIVE)
            except (asyncio.TimeoutError, TimeoutError):
                yield b": keep-alive\n\n"

    def _everything(
        self, entries: Callable[[], Sequence[Entry]], wanted: Optional[str], number: int
    ) -> list[bytes]:
        """Only the end has an id: who is cut off before has to have all of it again."""
        found = [one for one in entries() if wanted is None or one.id == wanted]
        texts = [message(STATE, one.encoded) for one in found]
        return [*texts, f"id: {self.boot}-{number}\n: all slots\n\n".encode()]


def message(kind: str, data: bytes, id: Optional[str] = None) -> bytes:
    r"""One event of a stream; JSON has no line break of its own.

    >>> message("state", b"{}", "a-1")
    b'event: state\nid: a-1\ndata: {}\n\n'
    """
    head = f"event: {kind}\n" + (f"id: {id}\n" if id else "")
    return head.encode() + b"data: " + data + b"\n\n"
