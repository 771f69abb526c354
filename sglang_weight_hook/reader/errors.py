"""The one exception type of the reading half."""

from __future__ import annotations


class HookError(Exception):
    """Anything that keeps a map from being read; the message says what to do about it."""


# Said of a file that has not the format.
FOREIGN = "it was not written by the hook"
