"""The process's control socket: one JSON object a line in, one out.  For the same user and root.

A Unix stream socket ``weight_hook_{pid}.sock`` in the output directory, mode 0600; the kernel
says who is at the other end (SO_PEERCRED, unix(7)).  Everything is non-blocking: a client that
sends nothing, too much or never reads costs a descriptor for a while, and no more.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import selectors
import socket
import stat
import struct
import time
from collections import deque
from collections.abc import Callable, Collection
from typing import Any, NamedTuple, Optional, Union

from ..layout.files import CONTROL
from ..layout.sharing import IDLE_SECONDS
from . import once

MAX_CONNECTIONS = 32
MAX_REQUEST = 4096  # bytes of a line
# No descriptor, no memory: nobody is accepted for so many seconds.
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_PAUSE_SECONDS = 1.0
_STALE_SECONDS = 10.0  # a dead process's socket is removed when it is older than this

_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


class Answered(NamedTuple):
    """An answer that is followed by bytes, or comes with file descriptors.

    The descriptors are closed as soon as they are sent, or cannot be.
    """

    answer: dict[str, Any]
    payload: bytes = b""
    descriptors: tuple[int, ...] = ()


def refused(word: str, message: str) -> dict[str, Any]:
    """An answer that says why there is none.  ``word``: for programs (docs/format.md)."""
    return {"ok": False, "error": word, "message": message}


Answer = Callable[[dict[str, Any]], Union[dict[str, Any], Answered]]
# Connections that may have bytes of weights waiting to be taken; further ones ask again.
MAX_PAYLOADS = 4


class ControlSocket:
    """The socket and its connections, served by one thread; others only call `wake`."""

    def __init__(
        self, directory: Optional[str], answer: Answer, users: Collection[int] = ()
    ) -> None:
        """Listen in ``directory``, or not at all where that is None.  Never raises.

        ``users``: who may connect besides this process's own user and root.
        """
        self._users = frozenset(users)
        self.name: Optional[str] = None
        self._directory = directory
        self._answer = answer
        self._connections: dict[socket.socket, _Connection] = {}
        self._listener: Optional[socket.socket] = None
        self._listens_again_at: Optional[float] = None  # set while there is no room for more
        self._inode: Optional[tuple[int, int]] = None
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe()
        for descriptor in (self._wake_read, self._wake_write):
            os.set_blocking(descriptor, False)
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._listen()

    # -- listening

    def _listen(self) -> None:
        if self._directory is None:
            return
        try:
            os.makedirs(self._directory, exist_ok=True)
            remove_stale(self._directory)
            self._bind(self._directory)
        except OSError as error:
            once.warn("control", "no control socket, so no check on demand: %s", error)

    def _bind(self, directory: str) -> None:
        folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            for number in range(1, 100):
                # Another pid namespace may have a process with our pid.
                suffix = str(os.getpid()) + (f"-{number}" if number > 1 else "")
                name = CONTROL.format(suffix)
                try:
                    listener.bind(short_path(folder, name))
                    break
                except OSError as error:
                    if error.errno != errno.EADDRINUSE:
                        raise
            else:
                raise OSError(errno.EADDRINUSE, "no free name for the control socket", directory)
            # Nobody can connect before listen(), so the mode is right from the beginning.
            os.chmod(name, 0o666 if self._users else 0o600, dir_fd=folder)
            listener.listen(MAX_CONNECTIONS)
            listener.setblocking(False)
            status = os.stat(name, dir_fd=folder)
            self._inode = (status.st_dev, status.st_ino)
        except BaseException:
            listener.close()
            raise
        finally:
            os.close(folder)
        self._listener, self.name = listener, name
        self._selector.register(listener, selectors.EVENT_READ)

    def _listen_again_if_lost(self) -> None:
        """The directory or the socket's file was removed under us."""
        if self._directory is None or self._is_there():
            return
        if self._listener is not None:
            if self._listens_again_at is None:
                self._selector.unregister(self._listener)
            self._listens_again_at = None
            self._listener.close()
            self._listener = self.name = None
        if os.path.isdir(self._directory):
            self._listen()

    def _is_there(self) -> bool:
        if self._directory is None or self.name is None:
            return False
        try:
            status = os.lstat(os.path.join(self._directory, self.name))
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self._inode

    # -- serving

    def wake(self) -> None:
        """Make `serve` return.  From any thread; never blocks and never raises."""
        with contextlib.suppress(OSError):
            os.write(self._wake_write, b"w")

    def serve(self, timeout: Optional[float]) -> None:
        """Answer who asks, for ``timeout`` seconds or until `wake`; None: until `wake` alone."""
        if self._listens_again_at is not None:
            timeout = min(timeout if timeout is not None else _PAUSE_SECONDS, _PAUSE_SECONDS)
        if self._connections:
            timeout = min(timeout if timeout is not None else IDLE_SECONDS, IDLE_SECONDS)
        for key, events in self._selector.select(timeout):
            if key.fileobj == self._wake_read:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_read, 4096)
                self._listen_again_if_lost()
            elif key.fileobj is self._listener:
                self._accept()
            else:
                self._talk(key.data, events)
        now = time.monotonic()
        if self._listens_again_at is not None and now >= self._listens_again_at:
            self._listens_again_at = None
            if self._listener is not None:
                self._selector.register(self._listener, selectors.EVENT_READ)
        for connection in list(self._connections.values()):
            if now - connection.last_word > IDLE_SECONDS:
                self._drop(connection)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            peer, _ = self._listener.accept()
        except OSError as error:
            if error.errno in _NO_ROOM:  # who waits keeps the listener readable
                self._selector.unregister(self._listener)
                self._listens_again_at = time.monotonic() + _PAUSE_SECONDS
            return  # else it has gone already
        try:
            peer.setblocking(False)
            found = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            _, uid, _ = _CREDENTIALS.unpack(found)
            if uid not in {0, os.geteuid(), *self._users}:
                peer.send(_line_of(refused("not_allowed", f"user {uid} may not ask")))
                peer.close()
                return
            if len(self._connections) >= MAX_CONNECTIONS:
                peer.close()
                return
        except OSError:
            peer.close()
            return
        connection = _Connection(peer)
        self._connections[peer] = connection
        self._selector.register(peer, selectors.EVENT_READ, connection)

    def _talk(self, connection: _Connection, events: int) -> None:
        try:
            if events & selectors.EVENT_READ:
                data = connection.peer.recv(MAX_REQUEST)
                if not data:
                    self._drop(connection)
                    return
                connection.last_word = time.monotonic()
                connection.received += data
            # One answer at a time: who does not take it asks for no other.
            while b"\n" in connection.received and not connection.unsent:
                line, _, connection.received = connection.received.partition(b"\n")
                self._reply(connection, line)
                self._send(connection)
            if len(connection.received) > MAX_REQUEST:
                self._drop(connection)
                return
            self._send(connection)
            wanted = selectors.EVENT_WRITE if connection.unsent else selectors.EVENT_READ
            self._selector.modify(connection.peer, wanted, connection)
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self._drop(connection)

    def _reply(self, connection: _Connection, line: bytes) -> None:
        """Answer one request."""
        answered: Union[dict[str, Any], Answered]
        request: Any = None
        try:
            request = json.loads(line)
            if not isinstance(request, dict):
                raise ValueError("a request is a JSON object")
        except (ValueError, RecursionError) as error:
            answered = refused("malformed", str(error))
        else:
            if request.get("op") != "check" and self._payloads() >= MAX_PAYLOADS:
                answered = refused("busy", "other readers are served")
            else:
                try:
                    answered = self._answer(request)
                except Exception as error:
                    answered = refused("failed", repr(error))
        if not isinstance(answered, Answered):
            answered = Answered(answered)
        number = request.get("n") if isinstance(request, dict) else None
        if isinstance(number, int):  # so that an answer is not taken for another request's
            answered = answered._replace(answer={**answered.answer, "n": number})
        connection.unsent.append(memoryview(_line_of(answered.answer)))
        connection.descriptors = answered.descriptors
        if answered.payload:
            connection.unsent.append(memoryview(answered.payload))

    def _payloads(self) -> int:
        """How many connections have bytes waiting."""
        return sum(1 for connection in self._connections.values() if connection.unsent)

    @staticmethod
    def _send(connection: _Connection) -> None:
        """Send what the peer takes now.  Raises OSError."""
        unsent = connection.unsent
        try:
            while unsent:
                if connection.descriptors:
                    sent = socket.send_fds(connection.peer, [unsent[0]], connection.descriptors)
                    connection.let_go()
                else:
                    sent = connection.peer.send(unsent[0])
                if sent < len(unsent[0]):
                    unsent[0] = unsent[0][sent:]
                    return
                unsent.popleft()
                connection.last_word = time.monotonic()
        except (BlockingIOError, InterruptedError):
            pass

    def _drop(self, connection: _Connection) -> None:
        self._connections.pop(connection.peer, None)
        with contextlib.suppress(KeyError, ValueError, OSError):
            self._selector.unregister(connection.peer)
        connection.let_go()
        connection.peer.close()

    def close(self, remove: bool) -> None:
        """Close everything.  ``remove``: the socket's file too; in a forked child it is the
        parent's."""
        if remove and self._is_there() and self._directory is not None and self.name is not None:
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(self._directory, self.name))
        self.name = None
        for connection in list(self._connections.values()):
            connection.let_go()
            connection.peer.close()
        self._connections.clear()
        if self._listener is not None:
            self._listener.close()
        with contextlib.suppress(OSError):
            self._selector.close()
        for descriptor in (self._wake_read, self._wake_write):
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._wake_read = self._wake_write = -1


def _line_of(answer: dict[str, Any]) -> bytes:
    return json.dumps(answer).encode("ascii") + b"\n"


class _Connection:
    def __init__(self, peer: socket.socket) -> None:
        self.peer = peer
        self.received = b""
        self.unsent: deque[memoryview] = deque()
        self.descriptors: tuple[int, ...] = ()  # to go with the next bytes
        self.last_word = time.monotonic()

    def let_go(self) -> None:
        """Close the descriptors that were sent, or will not be."""
        descriptors, self.descriptors = self.descriptors, ()
        for descriptor in descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)


def short_path(folder: int, name: str) -> str:
    """A path to ``name`` in the open directory ``folder`` that fits into 108 bytes (unix(7))."""
    return f"/proc/self/fd/{folder}/{name}"


def remove_stale(directory: str) -> None:
    """Remove sockets of processes that are gone.  Raises OSError."""
    pattern = re.compile(re.escape(CONTROL).replace(r"\{\}", r"(\d+)(?:-\d+)?") + r"\Z")
    for name in os.listdir(directory):
        match = pattern.match(name)
        if match is None:
            continue
        path = os.path.join(directory, name)
        try:
            status = os.lstat(path)
            is_old = time.time() - status.st_mtime > _STALE_SECONDS
            if stat.S_ISSOCK(status.st_mode) and is_old and not _is_served(directory, name):
                os.unlink(path)
        except OSError:
            continue


def _is_served(directory: str, name: str) -> bool:
    """Whether somebody listens; another pid namespace's process is told only by asking."""
    folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        try:
            client.setblocking(False)
            client.connect(short_path(folder, name))
        except ConnectionRefusedError:
            return False
        except OSError:
            return True
        finally:
            os.close(folder)
    return True
