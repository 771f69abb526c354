"""Copies of this process's GPU memory to the host, on a stream of our own."""

from __future__ import annotations

import errno
from collections.abc import Sequence


def copied(runs: Sequence[tuple[int, int]]) -> bytes:
    """The bytes of runs in the current context's device memory.  Raises OSError."""
    raise OSError(errno.ENOSYS, "copies of GPU memory are not made by this release")
