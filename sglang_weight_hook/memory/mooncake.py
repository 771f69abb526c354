"""The memory of a server on a trusted network, read with Mooncake's transfer engine.

Needs the subscriber `mooncake` in the server.  The engine of this process listens, too, on all
interfaces and without authentication (docs/transfer.md).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, Optional

from ..layout.transport_document import MOONCAKE
from ..layout.variables import DEFAULT_TRANSFER_HOST, MOONCAKE_DEVICE, TRANSFER_HOST
from ..reader import Document
from . import environment
from .engine import EngineMemory, Read
from .errors import NotReadable
from .idle import Idle
from .staging import Buffer
from .transport import Transport, session_of

NAME = MOONCAKE

_TIMEOUT = 15.0  # seconds, for the first answer of a server
# What Mooncake is told where the environment does not say otherwise.  It logs each step to stderr,
# and two lines at its start whatever it is told; and it waits 30 s for a server that is stopped.
_SETTINGS = {
    "MC_LOG_LEVEL": "ERROR",
    "MC_TCP_STATUS_TIMEOUT_SEC": "10",
    "MC_TCP_PROGRESS_TIMEOUT_SEC": "10",
    "MC_HANDSHAKE_CONNECT_TIMEOUT": "10",
    "MC_TRANSFER_TIMEOUT": "600",
}

# By what they are good for: an engine keeps what it has learned of a server, which the next runner
# there makes untrue.
_idle: Idle[_Connection] = Idle()
# Of calls that have not come back, with what they may write into.
_stuck: list[Any] = []
# Connections on which a batch has failed, the latest last.  Mooncake answers at the first read of a
# batch that fails while others are still under way, so what they write into is kept.
_failed: list[_Connection] = []
_MOST_FAILED = 2


class MooncakeMemory(EngineMemory):
    """Reads through Mooncake."""

    name = NAME

    def __init__(self, document: Document, address: Optional[str] = None) -> None:
        """Connect.  Raises NotReadable and Changed."""
        super().__init__(document, address, _connected)


class _Connection:
    most_reads = 128  # it has a queue of some thousand, and gives up where that is full

    def __init__(self, session: str, protocol: str, key: Any) -> None:
        self.key = key
        self.is_used = False
        self._session = session
        self._registers = protocol != "tcp"  # over TCP it writes anywhere
        self._engine: Any = _engine(protocol)
        self._buffers: list[Buffer] = []
        self._has_answered = False

    def register(self, buffer: Buffer) -> None:
        self._buffers.append(buffer)
        if not self._registers:
            return
        if self._engine.register_memory(buffer.address, buffer.size) != 0:
            raise NotReadable(
                f"mooncake cannot register {buffer.size} bytes of this process for RDMA; see its "
                f"messages with MC_LOG_LEVEL=INFO, and ulimit -l"
            )

    def read(self, reads: Sequence[Read], is_header: bool = False) -> None:
        local, remote, sizes = zip(*reads)

        def call() -> int:
            return int(
                self._engine.batch_transfer_sync_read(
                    self._session, list(local), list(remote), list(sizes)
                )
            )

        if self._has_answered:
            code = call()
        else:
            code = _within(_TIMEOUT, call, (self, self._session))
        if code != 0:
            self._keep()
            raise NotReadable(
                f"mooncake could not read from {self._session} (it answers {code}): the server has "
                f"exited, is stopped or has withdrawn the memory, or a firewall is in between; "
                f"MC_LOG_LEVEL=INFO shows what mooncake does"
            )
        self._has_answered = True

    def _keep(self) -> None:
        """Give nothing back that an engine may still write into."""
        if self not in _failed:
            _failed.append(self)
        while len(_failed) > _MOST_FAILED:
            _failed.pop(0)._engine = None  # it ends its threads, before its buffers go

    def close(self, is_good: bool) -> None:
        if self in _failed:
            return
        for buffer in self._buffers[1:] if is_good else ():
            if self._registers:
                self._engine.unregister_memory(buffer.address)
        del self._buffers[1:]
        if is_good:
            self.is_used = True
            _idle.put(self.key, self)


def _connected(
    transport: Transport, document: Document, address: Optional[str], may_be_used: bool
) -> _Connection:
    session = session_of(document, transport, address)
    key = (
        *(os.getpid(), threading.get_ident(), session),
        *(document.instance, document.layout_generation, document.physical_epoch),
    )
    known = _idle.take(key)
    if known is not None and may_be_used:
        return known
    return _Connection(session, transport.protocol, key)


def _engine(protocol: str) -> Any:
    """A new engine.  Raises NotReadable."""
    with environment.defaults(_SETTINGS):
        try:
            from mooncake.engine import TransferEngine
        except ImportError as error:
            raise NotReadable(
                f"mooncake cannot be imported ({error}); pip install "
                f"mooncake-transfer-engine-non-cuda (on a GPU machine mooncake-transfer-engine or "
                f"mooncake-transfer-engine-cuda13), and Debian's libibverbs1, librdmacm1, "
                f"libnl-3-200, libnl-route-3-200 and libnuma1"
            ) from error
        engine = TransferEngine()
        host = os.environ.get(TRANSFER_HOST) or DEFAULT_TRANSFER_HOST
        device = os.environ.get(MOONCAKE_DEVICE, "") if protocol == "rdma" else ""
        if engine.initialize(host, "P2PHANDSHAKE", protocol, device) != 0:
            raise NotReadable(
                f"mooncake cannot start here for {protocol}; MC_LOG_LEVEL=INFO shows why"
            )
    return engine


def _within(seconds: float, call: Callable[[], int], of: Any) -> int:
    """What ``call`` answers.  Raises NotReadable where it does not within ``seconds``.

    It goes on in its thread then: a handshake with a process that is stopped has no time limit.
    """
    answers: list[int] = []
    thread = threading.Thread(target=lambda: answers.append(call()), daemon=True)
    thread.start()
    thread.join(seconds)
    if not answers:
        _stuck.append(of)
        raise NotReadable(
            f"the server of {of[1]} has not answered mooncake within {seconds:g} s; it is stopped, "
            f"or a firewall is in between"
        )
    return answers[0]
