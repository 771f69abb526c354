"""The environment variables, read once per process.

Read early (when the first SGLang module is patched) so that a relative directory means the
one the server was started in, whatever changes directory afterwards.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple, Optional

from ..layout.location import DIRECTORY, directory_from
from ..layout.variables import CHECKSUM, DEFAULT_LOCK_TIMEOUT, LOCK_TIMEOUT, seconds_from


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
        lock_timeout=seconds_from(environment.get(LOCK_TIMEOUT), DEFAULT_LOCK_TIMEOUT),
        checksum=environment.get(CHECKSUM) == "1",
    )
