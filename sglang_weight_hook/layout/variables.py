"""The environment variables that a server's process reads: names, defaults, meanings."""

from __future__ import annotations

from typing import NamedTuple, Optional

from .location import DEFAULT_DIRECTORY, DIRECTORY

SWITCH = "SGLANG_WEIGHT_HOOK"
LOCK_TIMEOUT = "SGLANG_WEIGHT_HOOK_LOCK_TIMEOUT"
CHECKSUM = "SGLANG_WEIGHT_HOOK_CHECKSUM"
DEBUG = "SGLANG_WEIGHT_HOOK_DEBUG"

DEFAULT_LOCK_TIMEOUT = 10.0  # seconds


class Variable(NamedTuple):
    name: str
    default: str  # as it is told to people
    meaning: str


VARIABLES = (
    Variable(SWITCH, "on", "0 switches the hook off"),
    Variable(DIRECTORY, DEFAULT_DIRECTORY, "where a server publishes"),
    Variable(
        LOCK_TIMEOUT,
        f"{DEFAULT_LOCK_TIMEOUT:g} s",
        "how long an update waits for readers that hold the lock",
    ),
    Variable(CHECKSUM, "off", "1 publishes a checksum of every tensor after each event"),
    Variable(DEBUG, "off", "1 says on stderr why the hook is not active"),
)


def seconds_from(value: Optional[str], default: float) -> float:
    """A duration below a day; ``default`` where ``value`` is none.

    >>> seconds_from("2.5", 10.0), seconds_from("soon", 10.0), seconds_from("nan", 10.0)
    (2.5, 10.0, 10.0)
    """
    try:
        seconds = float(value) if value else default
    except ValueError:
        return default
    # Also refuses nan, with which every comparison is false.
    return seconds if 0.0 <= seconds < 86400.0 else default
