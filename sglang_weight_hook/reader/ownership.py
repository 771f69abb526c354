"""Whether the process that publishes a slot still lives."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

from ..layout import process


def process_of(part: dict[str, Any]) -> tuple[Any, ...]:
    return part.get("pid"), part.get("process_start_ticks"), part.get("boot_id")


def same_instance(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two documents are of one runner, as far as both say so: release 0.1 does not."""
    mine, theirs = one.get("instance"), other.get("instance")
    return mine is None or theirs is None or bool(mine == theirs)


def process_lives(state: dict[str, Any]) -> bool:
    """Best answer without the owner lock; another host's process is taken to live."""
    if (state.get("hostname"), state.get("boot_id")) != (socket.gethostname(), process.boot_id()):
        return True
    return bool(process.start_ticks(state["pid"]) == state.get("process_start_ticks"))
