"""Say each problem once: an update that fails a thousand times fills no log."""

from __future__ import annotations

import logging

logger = logging.getLogger("sglang_weight_hook")

_said: set[str] = set()


def warn(key: str, message: str, *arguments: object) -> None:
    """Log a warning, unless ``key`` was logged already.  Never raises."""
    _log(logging.WARNING, key, message, arguments)


def info(key: str, message: str, *arguments: object) -> None:
    """Log a piece of good news, unless ``key`` was logged already.  Never raises."""
    _log(logging.INFO, key, message, arguments)


def _log(level: int, key: str, message: str, arguments: tuple[object, ...]) -> None:
    if key in _said:
        return
    _said.add(key)
    try:
        logger.log(level, "SGLang weight hook: " + message, *arguments)
    except Exception:
        pass


def solved(key: str) -> None:
    """The problem is gone; should it come back, it is news again."""
    _said.discard(key)
