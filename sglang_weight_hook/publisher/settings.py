"""The environment variables, read once per process.

Read early (when the first SGLang module is patched) so that a relative directory means the
one the server was started in, whatever changes directory afterwards.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple, Optional

from ..layout import variables
from ..layout.location import DIRECTORY, directory_from
from . import once


class Settings(NamedTuple):
    directory: str  # absolute
    lock_timeout: float  # seconds; how long an update waits for readers, at most
    checksum: bool = False  # whether every tensor's bytes are summed after each event
    check_seconds: float = variables.DEFAULT_CHECK_SECONDS  # between two checks; 0: none
    quiet_seconds: float = variables.DEFAULT_QUIET_MS / 1000  # that end a stream; 0: at once
    # Users (uid) besides this process's own and root that may read weights over the control
    # socket; None: nobody may.
    share: Optional[frozenset[int]] = None
    subscribers: tuple[str, ...] = ()  # names
    subscriber_timeout: float = variables.DEFAULT_SUBSCRIBER_TIMEOUT  # seconds
    transfer_host: str = variables.DEFAULT_TRANSFER_HOST
    mooncake_protocol: str = variables.DEFAULT_MOONCAKE_PROTOCOL
    mooncake_device: str = ""  # RDMA devices, with commas; empty: any


_base: Optional[str] = None  # the working directory when the settings were first asked for
_settings: Optional[Settings] = None
_pid = 0  # the process that _settings belong to: a forked child has another {pid}


def load() -> Settings:
    """The settings of this process."""
    global _base, _settings, _pid
    if _base is None:
        _base = os.getcwd()
    if _settings is None or _pid != os.getpid():
        _settings = parse(os.environ, _base)
        _pid = os.getpid()
    return _settings


def parse(environment: Mapping[str, str], base: str) -> Settings:
    """Settings from ``environment``, relative paths under ``base``."""

    def duration(name: str, default: float) -> float:
        return variables.duration_from(environment.get(name), default)

    return Settings(
        directory=directory_from(environment.get(DIRECTORY), base),
        lock_timeout=duration(variables.LOCK_TIMEOUT, variables.DEFAULT_LOCK_TIMEOUT),
        checksum=environment.get(variables.CHECKSUM) == "1",
        check_seconds=duration(variables.CHECK_SECONDS, variables.DEFAULT_CHECK_SECONDS),
        quiet_seconds=duration(variables.QUIET_MS, variables.DEFAULT_QUIET_MS) / 1000,
        share=users_from(environment.get(variables.SHARE)),
        subscribers=names_from(environment.get(variables.SUBSCRIBERS)),
        subscriber_timeout=duration(
            variables.SUBSCRIBER_TIMEOUT, variables.DEFAULT_SUBSCRIBER_TIMEOUT
        ),
        transfer_host=environment.get(variables.TRANSFER_HOST) or variables.DEFAULT_TRANSFER_HOST,
        mooncake_protocol=environment.get(variables.MOONCAKE_PROTOCOL)
        or variables.DEFAULT_MOONCAKE_PROTOCOL,
        mooncake_device=environment.get(variables.MOONCAKE_DEVICE) or "",
    )


def names_from(value: Optional[str]) -> tuple[str, ...]:
    """The names in a list with commas, each once, in their order.

    >>> names_from("mooncake, my.module:make,,mooncake"), names_from(None), names_from(" ")
    (('mooncake', 'my.module:make'), (), ())
    """
    words = (word.strip() for word in (value or "").split(","))
    return tuple(dict.fromkeys(word for word in words if word))


def users_from(value: Optional[str]) -> Optional[frozenset[int]]:
    """Who else may read weights: user ids for names and numbers; None where sharing is off.

    Only ``1`` and users that there are switch it on: a word that is neither leaves it off.

    >>> users_from(None), users_from("0"), users_from("off"), users_from("nobody-of-that-name")
    (None, None, None, None)
    >>> users_from("1"), users_from("1000, 1001") == {1000, 1001}
    (frozenset(), True)
    """
    found: set[int] = set()
    words = (value or "").replace(",", " ").split()
    if not words or words == ["0"]:
        return None
    for word in words:
        uid = int(word) if word.isdecimal() else _uid_of(word)
        if uid is None:
            once.warn(
                "share",
                "no weights are shared: %s has %r, which is neither 1 nor a user here",
                variables.SHARE,
                word,
            )
            return None
        found.add(uid)
    return frozenset(found - {0, 1})


def _uid_of(name: str) -> Optional[int]:
    if name.lower() in ("off", "no", "false", "none", "disabled"):
        return None  # meant as they are said, and no user is asked for
    try:
        import pwd

        return pwd.getpwnam(name).pw_uid
    except (ImportError, KeyError, ValueError):
        return None
