"""Waiting for a directory to change: inotify(7) through ctypes, polling where there is none.

A wake-up says "look again", never what has changed.  inotify does not see what another host
writes on a shared file system, so callers also look again after a timeout.
"""

from __future__ import annotations

import contextlib
import os
import select
import struct
import time
from types import TracebackType
from typing import Any, Optional

# <sys/inotify.h>
_IN_CLOSE_WRITE = 0x8
_IN_MOVED_FROM = 0x40
_IN_MOVED_TO = 0x80
_IN_DELETE = 0x200
_IN_DELETE_SELF = 0x400
_IN_MOVE_SELF = 0x800
_IN_IGNORED = 0x8000
_IN_Q_OVERFLOW = 0x4000
_IN_ONLYDIR = 0x1000000

# Documents come by rename.  A process that ends closes its lock files, which it holds open for
# writing: that is how its end is seen at once.
_MASK = (
    _IN_CLOSE_WRITE
    | _IN_MOVED_FROM
    | _IN_MOVED_TO
    | _IN_DELETE
    | _IN_DELETE_SELF
    | _IN_MOVE_SELF
    | _IN_ONLYDIR
)
_LOST = _IN_DELETE_SELF | _IN_MOVE_SELF | _IN_IGNORED
_EVENT = struct.Struct("iIII")  # watch, mask, cookie, length of the name that follows

POLL_INTERVAL = 0.1  # seconds


class DirectoryWatch:
    """Wakes up when files of ``path`` are replaced; files named ``.…`` count for nothing.

    The directory need not exist yet, and may go and come again.  What happens between making
    this object and the first `wait` is not lost, so make it before you look.

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as path, DirectoryWatch(path) as watch:
        ...     quiet = watch.wait(0.01)
        ...     open(os.path.join(path, "new"), "w").close()
        ...     quiet, watch.wait(5.0)
        (False, True)
    """

    def __init__(self, path: str, kernel: bool = True) -> None:
        """``kernel=False`` polls also where inotify is at hand."""
        self.path = path
        self._libc = _inotify() if kernel else None
        self._descriptor = -1
        self._made_for = self._now()
        self._start()
        self._seen = self._look()

    @property
    def kernel(self) -> bool:
        """Whether the kernel tells us; otherwise we look every `POLL_INTERVAL` seconds."""
        return self._descriptor >= 0

    def wait(self, timeout: float) -> bool:
        """Whether something may have changed; False after ``timeout`` seconds of quiet."""
        deadline = time.monotonic() + timeout
        while True:
            left = max(deadline - time.monotonic(), 0.0)
            if self.kernel:
                if self._wait_for_kernel(left):
                    return True
            else:
                time.sleep(min(left, POLL_INTERVAL))
                if self._start():
                    return True  # it has come into being, perhaps with files in it
                seen = self._look()
                if seen != self._seen:
                    self._seen = seen
                    return True
            if time.monotonic() >= deadline:
                return False

    def is_fresh(self) -> bool:
        """Whether it can be used again later: same process, same directory behind the path."""
        return self._made_for == self._now()

    def _now(self) -> tuple[int, Optional[tuple[int, int]]]:
        try:
            status = os.stat(self.path)
        except OSError:
            return os.getpid(), None
        return os.getpid(), (status.st_dev, status.st_ino)

    def close(self) -> None:
        # In a forked child the number may long be another file's; what is still ours there
        # ends with the child.
        if self._descriptor >= 0 and self._made_for[0] == os.getpid():
            os.close(self._descriptor)
        self._descriptor = -1

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # half made, or at the interpreter's end
            self.close()

    def __enter__(self) -> DirectoryWatch:
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        self.close()

    # -- inotify

    def _start(self) -> bool:
        """Whether the kernel watches from now on; no reason to fail where it can't."""
        if self._libc is None:
            return False
        descriptor = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if descriptor < 0:  # e.g. fs.inotify.max_user_instances is used up
            self._libc = None
            return False
        if self._libc.inotify_add_watch(descriptor, os.fsencode(self.path), _MASK) < 0:
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        return True

    def _wait_for_kernel(self, timeout: float) -> bool:
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        if not poll.poll(timeout * 1000):
            return False
        try:
            data = os.read(self._descriptor, 65536)
        except BlockingIOError:
            return False
        changed = False
        offset = 0
        while offset + _EVENT.size <= len(data):
            _, mask, _, length = _EVENT.unpack_from(data, offset)
            offset += _EVENT.size
            name = data[offset : offset + length].rstrip(b"\0")
            offset += length
            if mask & _LOST:
                # Removed or renamed away: from now on we look for a new one of its name.
                self.close()
                self._seen = self._look()
                return True
            if mask & _IN_Q_OVERFLOW or not name.startswith(b"."):
                changed = True
        return changed

    # -- polling

    def _look(self) -> dict[str, tuple[int, int, int]]:
        """What a rename into place changes about each file."""
        found = {}
        try:
            with os.scandir(self.path) as entries:
                for entry in entries:
                    if not entry.name.startswith("."):
                        status = entry.stat(follow_symlinks=False)
                        found[entry.name] = (status.st_ino, status.st_mtime_ns, status.st_size)
        except OSError:
            pass  # not there (any more), or a file went while we looked
        return found


def _inotify() -> Optional[Any]:
    """The C library, if it has inotify."""
    try:
        import ctypes  # some builds of Python go without it

        libc = ctypes.CDLL(None)
        libc.inotify_init1.argtypes = [ctypes.c_int]
        libc.inotify_add_watch.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32]
    except (ImportError, OSError, AttributeError, TypeError):
        return None
    return libc
