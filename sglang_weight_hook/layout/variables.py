"""The environment variables that a server's process reads: names, defaults, meanings."""

from __future__ import annotations

from typing import NamedTuple, Optional

from .location import DEFAULT_DIRECTORY, DIRECTORY

SWITCH = "SGLANG_WEIGHT_HOOK"
LOCK_TIMEOUT = "SGLANG_WEIGHT_HOOK_LOCK_TIMEOUT"
CHECK_SECONDS = "SGLANG_WEIGHT_HOOK_CHECK_SECONDS"
QUIET_MS = "SGLANG_WEIGHT_HOOK_QUIET_MS"
CHECKSUM = "SGLANG_WEIGHT_HOOK_CHECKSUM"
SHARE = "SGLANG_WEIGHT_HOOK_SHARE"
SUBSCRIBERS = "SGLANG_WEIGHT_HOOK_SUBSCRIBERS"
SUBSCRIBER_TIMEOUT = "SGLANG_WEIGHT_HOOK_SUBSCRIBER_TIMEOUT"
TRANSFER_HOST = "SGLANG_WEIGHT_HOOK_TRANSFER_HOST"
MOONCAKE_PROTOCOL = "SGLANG_WEIGHT_HOOK_MOONCAKE_PROTOCOL"
MOONCAKE_DEVICE = "SGLANG_WEIGHT_HOOK_MOONCAKE_DEVICE"
DEBUG = "SGLANG_WEIGHT_HOOK_DEBUG"

DEFAULT_LOCK_TIMEOUT = 10.0  # seconds
DEFAULT_CHECK_SECONDS = 10.0
DEFAULT_QUIET_MS = 50.0  # milliseconds
DEFAULT_SUBSCRIBER_TIMEOUT = 10.0  # seconds
DEFAULT_TRANSFER_HOST = "127.0.0.1"
DEFAULT_MOONCAKE_PROTOCOL = "tcp"


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
    Variable(
        CHECK_SECONDS,
        f"{DEFAULT_CHECK_SECONDS:g} s",
        "how often the server compares its map with memory; 0 never does",
    ),
    Variable(
        QUIET_MS,
        f"{DEFAULT_QUIET_MS:g} ms",
        "how long no bucket has come when a stream of buckets counts as over; 0 ends it at once",
    ),
    Variable(CHECKSUM, "off", "1 publishes a checksum of every tensor after each event"),
    Variable(
        SHARE,
        "off",
        "1 lets programs of the server's user read its weights over the control socket; a list of "
        "users (names or numbers, with commas) lets those, too",
    ),
    Variable(
        SUBSCRIBERS,
        "none",
        "code that runs in the server around each change of weights, with commas: mooncake, nixl, "
        "or module:factory",
    ),
    Variable(
        SUBSCRIBER_TIMEOUT,
        f"{DEFAULT_SUBSCRIBER_TIMEOUT:g} s",
        "how long an event waits for a call of a subscriber",
    ),
    Variable(
        TRANSFER_HOST,
        DEFAULT_TRANSFER_HOST,
        "name or address under which other machines reach the transfer engines of this server",
    ),
    Variable(
        MOONCAKE_PROTOCOL,
        DEFAULT_MOONCAKE_PROTOCOL,
        "tcp or rdma: how Mooncake transfers weights",
    ),
    Variable(MOONCAKE_DEVICE, "any", "names of the RDMA devices that Mooncake uses, with commas"),
    Variable(DEBUG, "off", "1 says on stderr why the hook is not active"),
)


# Those of them that are durations, below a day (in seconds; QUIET_MS in milliseconds).
DURATIONS = (LOCK_TIMEOUT, CHECK_SECONDS, QUIET_MS, SUBSCRIBER_TIMEOUT)


def duration_from(value: Optional[str], default: float) -> float:
    """A number from 0 to below 86,400; ``default`` where ``value`` is none.

    >>> duration_from("2.5", 10.0), duration_from("soon", 10.0), duration_from("nan", 10.0)
    (2.5, 10.0, 10.0)
    """
    try:
        seconds = float(value) if value else default
    except ValueError:
        return default
    # Also refuses nan, with which every comparison is false.
    return seconds if 0.0 <= seconds < 86400.0 else default
