"""What tells one process from every other one, also from a later one with its pid."""

from __future__ import annotations

import os
import socket
from typing import Any, Optional


def identity() -> dict[str, Any]:
    """What tells this process from every other one, also from a later one with its pid."""
    pid = os.getpid()
    return {
        "hostname": socket.gethostname(),
        "boot_id": boot_id(),
        "pid": pid,
        "pid_namespace": pid_namespace(),
        "process_start_ticks": start_ticks(pid),
    }


def boot_id() -> Optional[str]:
    """This boot of this kernel (``/proc/sys/kernel/random/boot_id``, proc(5)); None off Linux."""
    return _read("/proc/sys/kernel/random/boot_id")


def start_ticks(pid: int) -> Optional[int]:
    """When the process started, in clock ticks since boot (``/proc/PID/stat`` field 22)."""
    fields = _stat(pid)
    return None if fields is None else int(fields[19])


def is_running(pid: int, ticks: Optional[int]) -> Optional[bool]:
    """Whether the process that has ``pid`` here started at ``ticks`` and has not exited.

    None where that cannot be seen: /proc hides other users' processes, or ``ticks`` is None.
    """
    if not 0 < pid < 1 << 31:
        return False  # and nothing that kill(2) takes for a group
    fields = _stat(pid)
    if fields is None:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except OSError:
            return None
        return None
    if ticks is not None and int(fields[19]) != ticks:
        return False
    # One that has exited and waits for its parent holds nothing any more; with threads left
    # (field 20) only its main thread has ended.
    if fields[0] in ("Z", "X") and int(fields[17]) <= 1:
        return False
    return None if ticks is None else True


def pid_namespace() -> Optional[str]:
    """This process's pid namespace (``readlink /proc/self/ns/pid``), where it can be told."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _stat(pid: int) -> Optional[list[str]]:
    """The fields of /proc/PID/stat from the third on (proc(5)); None where there is none."""
    stat = _read(f"/proc/{pid}/stat")
    if not stat:
        return None
    # Field 2 is the command in parentheses and may itself hold spaces and parentheses.
    return stat.rsplit(")", 1)[1].split()


def _read(path: str) -> Optional[str]:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return None
