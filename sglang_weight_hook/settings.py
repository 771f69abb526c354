"""The environment variables, read once per process.

Read early (when the first SGLang module is patched) so that a relative directory means the
one the server was started in, whatever changes directory afterwards.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import NamedTuple, Optional

DIRECTORY = "SGLANG_WEIGHT_HOOK_DIR"
LOCK_TIMEOUT = "SGLANG_WEIGHT_HOOK_LOCK_TIMEOUT"
CHECKSUM = "SGLANG_WEIGHT_HOOK_CHECKSUM"

DEFAULT_DIRECTORY = "weights_metadata"
DEFAULT_LOCK_TIMEOUT = 10.0  # seconds


class Settings(NamedTuple):
    directory: str  # absolute
    lock_timeout: float  # seconds; how long an update waits for readers, at most
    checksum: bool = False  # whether every tensor's bytes are summed after each event


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
    return Settings(
        directory=directory_from(environment.get(DIRECTORY), base),
        lock_timeout=_seconds(environment.get(LOCK_TIMEOUT)),
        checksum=environment.get(CHECKSUM) == "1",
    )


def directory_from(value: Optional[str], base: str) -> str:
    """Absolute output directory for a value of ``SGLANG_WEIGHT_HOOK_DIR``.

    ``{hostname}`` and ``{pid}`` are filled in; other braces stay as they are.

    >>> directory_from("maps/{hostname}", "/srv") == "/srv/maps/" + socket.gethostname()
    True
    >>> directory_from(None, "/srv")
    '/srv/weights_metadata'
    """
    path = value or DEFAULT_DIRECTORY
    path = path.replace("{hostname}", socket.gethostname()).replace("{pid}", str(os.getpid()))
    return os.path.normpath(os.path.join(base, os.path.expanduser(path)))


def _seconds(value: Optional[str]) -> float:
    try:
        seconds = float(value) if value else DEFAULT_LOCK_TIMEOUT
    except ValueError:
        return DEFAULT_LOCK_TIMEOUT
    # Also refuses nan, with which every comparison is false.
    return seconds if 0.0 <= seconds < 86400.0 else DEFAULT_LOCK_TIMEOUT
