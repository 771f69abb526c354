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
        "pid_namespace": _namespace("pid"),
        "process_start_ticks": start_ticks(pid),
    }


def boot_id() -> Optional[str]:
    """This boot of this kernel (``/proc/sys/kernel/random/boot_id``, proc(5)); None off Linux."""
    return _read("/proc/sys/kernel/random/boot_id")


def start_ticks(pid: int) -> Optional[int]:
    """When the process started, in clock ticks since boot (``/proc/PID/stat`` field 22)."""
    stat = _read(f"/proc/{pid}/stat")
    if stat is None:
        return None
    # Field 2 is the command in parentheses and may itself hold spaces and parentheses.
    return int(stat.rsplit(")", 1)[1].split()[19])


def _namespace(kind: str) -> Optional[str]:
    try:
        return os.readlink(f"/proc/self/ns/{kind}")
    except OSError:
        return None


def _read(path: str) -> Optional[str]:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return None
