"""Talking to a slot's owner over its control socket: requests out, answers in.

One JSON object a line out, one in (`docs/format.md`); bytes and descriptors may follow an answer.
Neither the socket's name in the state document nor an answer is trusted: a name leads nowhere but
into the slot's directory, an answer has a size and types.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Optional

from ..layout.files import CONTROL
from ..layout.variables import CHECK_SECONDS
from .errors import FOREIGN, ControlError, NoAnswer, NoSocket, NotAllowed, OwnerGone

if TYPE_CHECKING:
    from .slot import Slot

MAX_ANSWER = 1 << 20  # bytes of a line
MAX_DESCRIPTORS = 64  # that come with one answer
# What sun_path holds, less the NUL at its end (unix(7)).
_MAX_PATH = 107
_RETRY = 0.005  # seconds, when the owner has as many connections waiting as it takes


class Conversation:
    """One connection to a slot's owner.

    ``timeout``: seconds for each request until its answer has come whole.
    """

    def __init__(self, slot: Slot, state: Mapping[str, Any], timeout: float) -> None:
        """Connect.  ``state``: the slot's state document, which names the socket.

        Raises ControlError.
        """
        self._slot = slot
        self._state = state
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout
        self._asked = 0
        self.is_open = True
        self._received = bytearray()  # behind the answers that were taken
        self._descriptors: list[int] = []
        self._name = _socket_name(slot, state)
        self._peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with self._explained():
                self._connect()
        except BaseException:
            self.close()
            raise

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to ``request``, whatever it says.  Raises ControlError."""
        self._deadline = time.monotonic() + self._timeout
        self._asked += 1
        try:
            answer = self._answer({**request, "n": self._asked})
        except BaseException:
            # What still comes would be taken for the answer to the next request.
            self.close()
            raise
        if answer.get("error") == "not_allowed":
            raise _not_allowed(self._slot)
        return answer

    def _answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        slot = self._slot
        with self._explained():
            self._peer.settimeout(self._left())
            with contextlib.suppress(BrokenPipeError):  # it may have said why before it hung up
                self._peer.sendall(json.dumps(request).encode("ascii") + b"\n")
            line = self._line()
        if not line.endswith(b"\n"):
            if len(line) > MAX_ANSWER:
                raise garbled(slot, f"it has more than {MAX_ANSWER} bytes")
            raise _hung_up(slot) if slot.owner_alive() else gone(slot, self._state)
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise garbled(slot, f"it is not JSON ({error})") from error
        if not isinstance(answer, dict):
            raise garbled(slot, "it is no JSON object")
        if answer.get("n", request["n"]) != request["n"]:
            raise garbled(slot, "it is the answer to another request")
        return answer

    def take_into(self, target: memoryview) -> None:
        """Fill ``target`` with the bytes that follow the answer.  Raises ControlError."""
        try:
            self._take_into(target)
        except BaseException:
            self.close()
            raise

    def _take_into(self, target: memoryview) -> None:
        ready = min(len(self._received), len(target))
        target[:ready] = self._received[:ready]
        del self._received[:ready]
        with self._explained():
            while ready < len(target):
                self._peer.settimeout(self._left())
                got = self._peer.recv_into(target[ready:])
                if not got:
                    raise (
                        _hung_up(self._slot)
                        if self._slot.owner_alive()
                        else gone(self._slot, self._state)
                    )
                ready += got

    def take_descriptors(self) -> list[int]:
        """The file descriptors that came with the answers; the caller closes them."""
        found, self._descriptors = self._descriptors, []
        return found

    def close(self) -> None:
        """Also after anything went wrong: another request takes another conversation."""
        self.is_open = False
        for descriptor in self.take_descriptors():
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._peer.close()

    def __enter__(self) -> Conversation:
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        self.close()

    # -- the socket

    def _connect(self) -> None:
        with _address(self._slot.directory, self._name) as address:
            while True:
                self._peer.settimeout(self._left())
                try:
                    self._peer.connect(address)
                    return
                except BlockingIOError:  # its queue is full, and connect(2) does not wait
                    time.sleep(min(_RETRY, self._left()))

    def _line(self) -> bytes:
        """What came up to the first end of line; without one where the other side has hung up, or
        has more than `MAX_ANSWER` bytes to say."""
        received = self._received
        searched = 0
        while True:
            end = received.find(b"\n", searched)
            if end >= 0:
                line = bytes(received[: end + 1])
                del received[: end + 1]
                return line
            searched = len(received)
            if searched > MAX_ANSWER:
                return bytes(received)
            self._peer.settimeout(self._left())
            data, descriptors, _, _ = socket.recv_fds(self._peer, 65536, MAX_DESCRIPTORS)
            self._descriptors += descriptors
            if not data:
                return bytes(received)
            received += data

    def _left(self) -> float:
        """Seconds until the deadline.  Raises TimeoutError."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """What the socket raises inside as a ControlError."""
        try:
            yield
        except (TimeoutError, socket.timeout):
            raise _late(self._slot, self._timeout) from None
        except OSError as error:
            raise _unreachable(self._slot, self._state, self._name, error) from error


def _socket_name(slot: Slot, state: Mapping[str, Any]) -> str:
    """The socket's file name in the slot's directory."""
    if "control" not in state:
        return CONTROL.format(state["pid"])
    name = state["control"]
    if name is None:
        if not slot.owner_alive():
            raise gone(slot, state)
        raise _no_socket(slot, "has no control socket")
    prefix, suffix = CONTROL.split("{}")
    if not (
        isinstance(name, str)
        and name.startswith(prefix)
        and name.endswith(suffix)
        and name.isascii()
        and name.isprintable()
        and os.sep not in name
    ):
        raise ControlError(f"the state of slot {slot.name} has no valid 'control'; {FOREIGN}")
    return name


@contextlib.contextmanager
def _address(directory: str, name: str) -> Iterator[bytes]:
    """A path of the socket that fits into a socket address, however long the directory's is."""
    path = os.fsencode(os.path.join(directory, name))
    if len(path) <= _MAX_PATH:
        yield path
        return
    folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield os.fsencode(f"/proc/self/fd/{folder}/{name}")
    finally:
        os.close(folder)


# --- what went wrong ----------------------------------------------------------------------


def _unreachable(slot: Slot, state: Mapping[str, Any], name: str, error: OSError) -> ControlError:
    if error.errno in (errno.EACCES, errno.EPERM):
        return _not_allowed(slot)
    if not slot.owner_alive():
        return gone(slot, state)
    if error.errno == errno.ENOENT:
        return _no_socket(slot, f"has no control socket {name}")
    if error.errno == errno.ECONNREFUSED:
        return _no_socket(slot, f"does not listen on {name} any more, see its log;")
    if error.errno in (errno.EPIPE, errno.ECONNRESET):
        return _hung_up(slot)
    return ControlError(
        f"the owner of slot {slot.name} cannot be asked over {name}: {error.strerror or error}; "
        f"ask on the machine and in the container where the server runs"
    )


def _not_allowed(slot: Slot) -> NotAllowed:
    return NotAllowed(
        f"the control socket of slot {slot.name} is another user's; ask as the user that runs the "
        f"server, or as root"
    )


def _no_socket(slot: Slot, why: str) -> NoSocket:
    return NoSocket(
        f"the owner of slot {slot.name} {why} (was it started with {CHECK_SECONDS}=0, or with an "
        f"older release?); start the server with checks to have them on demand"
    )


def gone(slot: Slot, state: Mapping[str, Any]) -> OwnerGone:
    return OwnerGone(
        f"slot {slot.name} is stale: its owner (pid {state.get('pid')}) has exited, so its "
        f"addresses are invalid; start the server again"
    )


def _late(slot: Slot, timeout: float) -> NoAnswer:
    return NoAnswer(
        f"the owner of slot {slot.name} has not answered within {timeout:g} s; see whether it is "
        f"stopped (SIGSTOP, a debugger), or wait longer"
    )


def _hung_up(slot: Slot) -> NoAnswer:
    return NoAnswer(
        f"the owner of slot {slot.name} hung up without an answer: it is ending, or has too many "
        f"connections; ask again"
    )


def garbled(slot: Slot, why: str) -> ControlError:
    return ControlError(
        f"the answer about slot {slot.name} is no answer of the hook's: {why}; see what listens on "
        f"its control socket"
    )
