"""Whether the process that publishes a slot still lives."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Optional

from ..layout import process
from .errors import HookError
from .files import open_regular

HELD, FREE, ABSENT, UNKNOWN = "held", "free", "absent", "unknown"


class Liveness(NamedTuple):
    """Whether a slot's owner lives, and whether that is beyond doubt."""

    alive: bool
    certain: bool
    why: str  # what the answer rests on


def process_of(part: dict[str, Any]) -> tuple[Any, ...]:
    return part.get("pid"), part.get("process_start_ticks"), part.get("boot_id")


def same_instance(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two documents are of one runner, as far as both say so: release 0.1 does not."""
    mine, theirs = one.get("instance"), other.get("instance")
    return mine is None or theirs is None or bool(mine == theirs)


def lock_at(path: str) -> str:
    """`HELD`, `FREE`, `ABSENT`, or `UNKNOWN` where it cannot be had: not ours to read, no file."""
    try:
        descriptor = open_regular(path, follow=False)
    except HookError:
        return UNKNOWN
    if descriptor is None:
        return ABSENT
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return HELD if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else UNKNOWN
    finally:
        os.close(descriptor)
    return FREE


def liveness(
    lock: str, state: Optional[Mapping[str, Any]], namespace: Callable[[], Optional[str]]
) -> Liveness:
    """Whether the owner lives: its lock is held, and the process that the state names exists.

    A held lock alone is no proof, for whoever may read the file may lock it, too.
    ``namespace``: the owner's pid namespace as its layout tells it; asked only where it counts.
    """
    if lock == ABSENT:
        return Liveness(False, True, "there is no owner lock")
    if state is None:
        why = "there is no state file yet that would say whose lock it is"
        return Liveness(lock != FREE, lock == FREE, "its lock is free" if lock == FREE else why)
    here = _is_of_this_boot(state)
    if lock == FREE:
        return Liveness(
            False, here, "its lock is free" + ("" if here else ", as far as this host can see")
        )
    says = "its lock is held" if lock == HELD else "its lock cannot be read"
    if not here:
        return Liveness(True, False, f"{says}, and its process is on another host")
    found = process.is_running(state["pid"], state.get("process_start_ticks"))
    if found is None:
        return Liveness(True, False, f"{says}, and its process cannot be looked at")
    if found:
        return Liveness(True, True, f"{says}, and its process runs")
    theirs = namespace()
    if theirs is not None and theirs == process.pid_namespace():
        return Liveness(False, True, "its process has exited; what holds its lock is another one")
    if lock == UNKNOWN and theirs is None and state.get("hostname") == socket.gethostname():
        return Liveness(False, False, f"{says}, and there is no such process here")
    return Liveness(True, False, f"{says}, and its process is in another pid namespace")


def _is_of_this_boot(state: Mapping[str, Any]) -> bool:
    """Whether the state's process runs, or ran, under this kernel, since it was started last."""
    theirs, mine = state.get("boot_id"), process.boot_id()
    if mine is None or theirs is None:  # not Linux: the name is all there is
        return bool(state.get("hostname") == socket.gethostname())
    return bool(theirs == mine)
