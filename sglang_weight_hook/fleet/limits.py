"""What the agent bears from its clients: slow ones, greedy ones, and too many of them."""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import socket
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..reader import HookError

MAX_HEADER = 16 * 1024  # bytes of a request's line and headers
MAX_WAITING = 16  # requests that wait for a layout to be read as a whole
MAX_WAITING_EACH = 4  # of one client's address
REQUEST_SECONDS = 10.0  # a request has come as a whole
STALLED_SECONDS = 30.0  # a client has taken nothing of what it asked for
KEEP_ALIVE_SECONDS = 30
END_SECONDS = 5  # for what is under way when the agent is ended
SAID_AGAIN_SECONDS = 60.0  # until the log tells again that nobody can be let in
_FURTHER_FILES = 256  # that the agent has open beside its connections
_FURTHER_CONNECTIONS = 32  # that are told that there are too many

_log = logging.getLogger(__name__)


class Limits(NamedTuple):
    connections: int = 256
    connections_each: int = 128  # of one client's address
    streams: int = 128  # of events
    streams_each: int = 64

    @classmethod
    def of(cls, connections: int, streams: int) -> Limits:
        """One address has half of what there is, or what is usual if that is more."""
        usual = cls()
        return cls(
            connections,
            max(connections // 2, usual.connections_each),
            streams,
            max(streams // 2, usual.streams_each),
        )

    @property
    def accepted(self) -> int:
        """Most connections that are open, those among them that are about to be refused."""
        return 2 * (self.connections + _FURTHER_CONNECTIONS)

    @property
    def accepted_each(self) -> int:
        return self.connections + _FURTHER_CONNECTIONS


class Listener(socket.socket):
    """Counts what it lets in from the first moment: a client in a TLS handshake is none to uvicorn.

    Whom it does not let in finds the connection closed.
    """

    limits = Limits()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.open: Counter[str] = Counter()

    def accept(self) -> tuple[socket.socket, Any]:
        made, address = super().accept()
        client = str(address[0])
        total = self.open.total()
        if total >= self.limits.accepted or self.open[client] >= self.limits.accepted_each:
            made.close()
            raise ConnectionAbortedError("there are too many connections")
        self.open[client] += 1
        return _Accepted(made, lambda: self._give(client)), address

    def _give(self, client: str) -> None:
        self.open[client] -= 1
        if self.open[client] <= 0:
            del self.open[client]


class _Accepted(socket.socket):
    def __init__(self, made: socket.socket, closed: Callable[[], None]) -> None:
        family, kind, protocol = made.family, made.type, made.proto
        super().__init__(family, kind, protocol, fileno=made.detach())
        self._closed_once: Optional[Callable[[], None]] = closed

    def close(self) -> None:
        super().close()
        closed, self._closed_once = self._closed_once, None
        if closed is not None:
            closed()


def allow_files(limits: Limits) -> None:
    """See that so many connections can be open.  Raises HookError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = limits.accepted + _FURTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise HookError(
            f"{limits.connections} connections need {wanted} open files, and this process may have "
            f"{hard}; give a smaller --max-connections, or raise the limit (ulimit -n, LimitNOFILE)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class AcceptErrors:
    """An event loop's exception handler: that files have run out is said, and not each time."""

    def __init__(self) -> None:
        self._said_at = float("-inf")

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if not str(context.get("message")).startswith("socket.accept()"):
            loop.default_exception_handler(context)
        elif time.monotonic() - self._said_at >= SAID_AGAIN_SECONDS:
            self._said_at = time.monotonic()
            _log.error("no connection can be let in now: %s", context.get("exception"))


class Streams:
    """How many event streams there are, and whose."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.open: Counter[str] = Counter()

    def __len__(self) -> int:
        return self.open.total()

    def take(self, client: str) -> Optional[str]:
        """Count one more; else why not."""
        if len(self) >= self._limits.streams:
            return f"there are {len(self)} event streams; close some, or poll /slots"
        if self.open[client] >= self._limits.streams_each:
            return (
                f"your address has {self.open[client]} event streams; close some: one tells of "
                f"every slot"
            )
        self.open[client] += 1
        return None

    def give(self, client: str) -> None:
        self.open[client] -= 1
        if self.open[client] <= 0:
            del self.open[client]


class LimitedProtocol(H11Protocol):
    """uvicorn's, with a time for a request to come and for an answer to be taken.

    uvicorn itself waits for ever for the rest of a request, and for a client that reads no more.
    """

    limits = Limits()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadline: Optional[asyncio.TimerHandle] = None
        self._stalled: Optional[asyncio.TimerHandle] = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        mine = self.client[0] if self.client else ""
        each = sum(
            1 for one in self.connections if (getattr(one, "client", None) or ("",))[0] == mine
        )
        if len(self.connections) > self.limits.connections or each > self.limits.connections_each:
            self._refuse(503, "there are too many connections; try again later")
            return
        self._expect_request()

    def connection_lost(self, exc: Optional[Exception]) -> None:
        for timer in (self._deadline, self._stalled):
            if timer is not None:
                timer.cancel()
        self._deadline = self._stalled = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self._expect_request()  # the timer goes on where part of it had come before
        else:
            self._drop_deadline()

    def on_response_complete(self) -> None:
        if self.conn.their_state is h11.SEND_BODY:
            # Answered before the request's body had come, which nobody wants.
            self.transport.close()
        super().on_response_complete()

    def timeout_keep_alive_handler(self) -> None:
        self._drop_deadline()
        super().timeout_keep_alive_handler()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stalled is None:
            self._stalled = self.loop.call_later(STALLED_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        too_large = self.conn.our_state is not h11.ERROR and (
            len(self.conn.trailing_data[0]) > MAX_HEADER
        )
        self._refuse(431 if too_large else 400, "this is no HTTP request that can be answered")

    def _expect_request(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(REQUEST_SECONDS, self.transport.abort)

    def _drop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _refuse(self, status: int, error: str) -> None:
        """Answer without the application, and close."""
        body = json.dumps({"error": error}).encode()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            head = (
                f"HTTP/1.1 {status} {'Too Many' if status == 503 else 'Bad Request'}\r\n"
                f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
                f"connection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()
