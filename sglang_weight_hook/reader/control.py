"""Asking a slot's owner over its control socket whether the published map is still true.

One JSON object a line out, one in (`docs/format.md`).  Neither the socket's name in the state
document nor the answer is trusted: a name leads nowhere but into the slot's directory, an answer
has a size and types.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ..layout.files import CONTROL
from ..layout.variables import CHECK_SECONDS
from .errors import FOREIGN, Busy, ControlError, NoAnswer, NoSocket, NotAllowed, OwnerGone
from .fields import is_size

if TYPE_CHECKING:
    from .slot import Slot

MAX_ANSWER = 1 << 20  # bytes
# What sun_path holds, less the NUL at its end (unix(7)).
_MAX_PATH = 107
_RETRY = 0.005  # seconds, when the owner has as many connections waiting as it takes


class Check(NamedTuple):
    """What the owner found when it compared its map with memory."""

    equal: bool  # whether every tensor was where the published map said
    published: bool  # whether it was not, and the map that is true now has been published since
    checked_at: float  # when the owner answered, in seconds since 1970-01-01 UTC
    state: str  # of the slot, after the check: ``ready``, ...
    instance: str  # of the runner: another one means that everything known is stale
    layout_generation: int  # of the map that the answer is about
    content_generation: int
    tensors: tuple[str, ...]  # the first few that were elsewhere, came or went


def check(slot: Slot, state: Mapping[str, Any], timeout: float) -> Check:
    """Have the owner compare now, and wait ``timeout`` seconds at most.  Raises ControlError.

    ``state``: the slot's state document, which names the socket.
    """
    answer = _ask(slot, state, {"op": "check", "slot": slot.name}, timeout)
    if answer.get("ok") is not True:
        raise _refusal(slot, answer)
    names = answer.get("tensors")
    checked_at = answer.get("checked_at")
    if not (
        isinstance(answer.get("equal"), bool)
        and isinstance(answer.get("published"), bool)
        and isinstance(checked_at, (int, float))
        and not isinstance(checked_at, bool)
        and math.isfinite(checked_at)
        and isinstance(answer.get("state"), str)
        and isinstance(answer.get("instance"), str)
        and is_size(answer.get("layout_generation"))
        and is_size(answer.get("content_generation"))
        and isinstance(names, list)
        and all(isinstance(name, str) for name in names)
    ):
        raise _garbled(slot, "it lacks a field, or one has another type")
    values = {field: answer[field] for field in Check._fields if field != "tensors"}
    return Check(**values, tensors=tuple(names))


def _refusal(slot: Slot, answer: Mapping[str, Any]) -> ControlError:
    word, said = answer.get("error"), str(answer.get("message"))[:200]
    if word == "busy":
        return Busy(f"slot {slot.name} cannot be checked now ({said}); ask again when it is over")
    if word == "no_slot":
        return OwnerGone(
            f"the process behind the control socket does not publish slot {slot.name} any more; "
            f"read the state file again"
        )
    if word == "unknown":
        return ControlError(
            f"the owner of slot {slot.name} cannot check ({said}); install the hook's newer "
            f"release in the server's environment"
        )
    return ControlError(f"the owner of slot {slot.name} could not check: {said}; see its log")


def _garbled(slot: Slot, why: str) -> ControlError:
    return ControlError(
        f"the answer about slot {slot.name} is no answer of the hook's: {why}; see what listens on "
        f"its control socket"
    )


# --- the socket ---------------------------------------------------------------------------


def _ask(
    slot: Slot, state: Mapping[str, Any], request: Mapping[str, Any], timeout: float
) -> dict[str, Any]:
    deadline = time.monotonic() + timeout
    name = _socket_name(slot, state)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        try:
            _connect(peer, slot.directory, name, deadline)
            _give(peer, json.dumps(request).encode("ascii") + b"\n", deadline)
            line = _line_from(peer, deadline)
        except (TimeoutError, socket.timeout):
            raise _late(slot, timeout) from None
        except OSError as error:
            raise _unreachable(slot, state, name, error) from error
    if not line.endswith(b"\n"):
        if len(line) > MAX_ANSWER:
            raise _garbled(slot, f"it has more than {MAX_ANSWER} bytes")
        raise _hung_up(slot) if slot.owner_alive() else _gone(slot, state)
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _garbled(slot, f"it is not JSON ({error})") from error
    if not isinstance(answer, dict):
        raise _garbled(slot, "it is no JSON object")
    return answer


def _socket_name(slot: Slot, state: Mapping[str, Any]) -> str:
    """The socket's file name in the slot's directory."""
    if "control" not in state:
        return CONTROL.format(state["pid"])
    name = state["control"]
    if name is None:
        if not slot.owner_alive():
            raise _gone(slot, state)
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


def _connect(peer: socket.socket, directory: str, name: str, deadline: float) -> None:
    with _address(directory, name) as address:
        while True:
            peer.settimeout(_left(deadline))
            try:
                peer.connect(address)
                return
            except BlockingIOError:  # its queue is full, and connect(2) does not wait
                time.sleep(min(_RETRY, _left(deadline)))


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


def _give(peer: socket.socket, data: bytes, deadline: float) -> None:
    peer.settimeout(_left(deadline))
    peer.sendall(data)


def _line_from(peer: socket.socket, deadline: float) -> bytes:
    """What came up to the first end of line; without one where the other side has hung up, or
    has more than `MAX_ANSWER` bytes to say."""
    received = bytearray()
    while len(received) <= MAX_ANSWER:
        peer.settimeout(_left(deadline))
        data = peer.recv(65536)
        received += data
        end = received.find(b"\n", len(received) - len(data))
        if end >= 0:
            return bytes(received[: end + 1])
        if not data:
            break
    return bytes(received)


def _left(deadline: float) -> float:
    """Seconds until ``deadline``.  Raises TimeoutError."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


# --- what went wrong ----------------------------------------------------------------------


def _unreachable(slot: Slot, state: Mapping[str, Any], name: str, error: OSError) -> ControlError:
    if error.errno in (errno.EACCES, errno.EPERM):
        return NotAllowed(
            f"the control socket of slot {slot.name} is another user's; ask as the user that runs "
            f"the server, or as root"
        )
    if not slot.owner_alive():
        return _gone(slot, state)
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


def _no_socket(slot: Slot, why: str) -> NoSocket:
    return NoSocket(
        f"the owner of slot {slot.name} {why} (was it started with {CHECK_SECONDS}=0, or with an "
        f"older release?); start the server with checks to have them on demand"
    )


def _gone(slot: Slot, state: Mapping[str, Any]) -> OwnerGone:
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
