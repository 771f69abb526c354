"""The impure edge: whole files by rename, the lock that readers share, and slots.

A *slot* names one model runner's files in the output directory.  Two lock files belong to
it, neither ever deleted (deleting a lock file that somebody holds lets a second holder in):

``weight_saving_{slot}.lock``
    held exclusively while weights change, shared by readers who look at GPU memory;
``weight_owner_{slot}.lock``
    held exclusively for the life of the process that publishes the slot.  The kernel lets go
    of it when the process dies, however it dies, so a reader that can lock it knows that the
    slot's addresses are stale.

Both are ``flock`` locks (flock(2)): advisory, per open file, usable from C, Python and shell.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import socket
import stat
import time
from collections.abc import Callable, Iterator
from typing import Any, Optional

from ..layout.files import DOCUMENTS, HEADER, LAYOUT, OWNER_LOCK, SAVING_LOCK, STATE, TRANSPORT
from . import once

_TEMPORARY = ".tmp-"

_OWNER_PATIENCE = 0.25  # seconds


# --- bytes to files -----------------------------------------------------------------------


def encode(document: Any, indent: bool = True) -> bytes:
    """JSON in UTF-8, indented as in the legacy format; by orjson where SGLang brought it."""
    try:
        import orjson

        data: bytes = orjson.dumps(document, option=orjson.OPT_INDENT_2 if indent else 0)
        return data
    except (ImportError, TypeError):
        # Not installed, or something that only the standard library writes: names with lone
        # surrogates (undecodable bytes), integers beyond 64 bits.
        return json.dumps(document, indent=2 if indent else None).encode("ascii")


def write_whole(path: str, data: bytes, mode: int = 0o644) -> None:
    """Replace ``path`` by a new file with ``data``; readers see the old file or the new one.

    The temporary file is made with O_EXCL and O_NOFOLLOW, and rename replaces a link rather
    than following it: what was planted at either name is never written through.
    Raises OSError, and leaves no temporary file behind then.
    """
    directory, name = os.path.split(path)
    temporary = os.path.join(directory, f".{name}{_TEMPORARY}{os.getpid()}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(temporary, flags, mode)
    except FileExistsError:  # of an earlier process with this pid, killed while publishing
        os.unlink(temporary)
        descriptor = os.open(temporary, flags, mode)
    try:
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
        finally:
            os.close(descriptor)
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def open_lock_file(path: str) -> int:
    """Open (or make) a lock file; never through a link, never something that is no file.

    Raises OSError.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(path, flags, 0o644)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "the lock file is not a regular file", path)
    return descriptor


def try_lock(descriptor: int, timeout: float) -> bool:
    """Take an exclusive flock, waiting ``timeout`` seconds at most for its holder."""
    deadline = time.monotonic() + timeout
    pause = 0.0005
    while True:
        if _flock(descriptor, fcntl.LOCK_EX):
            return True
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(pause, left))
        pause = min(pause * 2, 0.05)


# --- slots --------------------------------------------------------------------------------


class Slot:
    """One runner's place in the output directory: owned for the life of this object.

    Nothing here is thread-safe; the recorder calls it under its own mutex.
    """

    def __init__(self, directory: str, wanted: str, lock_timeout: float) -> None:
        """Claim ``wanted``, or ``wanted.{hostname}-{pid}`` if a live process owns that.

        Raises OSError when the directory can't be made or written.
        """
        self.directory = directory
        self.wanted = wanted
        self.lock_timeout = lock_timeout  # seconds
        self.name = wanted
        self._owner_fd = -1
        self._saving_fd = -1
        self._patient = True  # whether the next wait for the lock may take lock_timeout
        self.lock_status = "not held"
        self._claim()

    def path(self, document: str) -> str:
        """Absolute path of one of `DOCUMENTS` or of the lock files."""
        return os.path.join(self.directory, document.format(self.name))

    # -- ownership

    def _claim(self) -> None:
        os.makedirs(self.directory, exist_ok=True)
        for name in self._candidates():
            self.name = name
            descriptor = open_lock_file(self.path(OWNER_LOCK))
            try:
                owned = _take_ownership(descriptor, self._clear_predecessor)
            except OSError:
                os.close(descriptor)
                raise
            if owned:
                self._owner_fd = descriptor
                break
            os.close(descriptor)
        if self.name != self.wanted:
            once.warn(
                "slot " + self.name,
                "another live process publishes slot %s in %s; this one publishes as %s",
                self.wanted,
                self.directory,
                self.name,
            )

    def _candidates(self) -> Iterator[str]:
        yield self.wanted
        host = re.sub(r"[^A-Za-z0-9_.-]", "_", socket.gethostname())
        own = f"{self.wanted}.{host}-{os.getpid()}"
        yield own
        # Only a second engine in this very process can hold that one.
        for number in range(2, 1000):
            yield f"{own}-{number}"
        raise OSError(errno.EBUSY, "no free slot", self.directory)

    def _clear_predecessor(self) -> None:
        """Remove what a dead owner left: its addresses mean nothing now, its temporary files
        never will."""
        gone = (*DOCUMENTS, HEADER, TRANSPORT)
        for document in gone:
            with contextlib.suppress(OSError):
                os.unlink(self.path(document))
        mine = tuple(f".{document.format(self.name)}{_TEMPORARY}" for document in gone)
        with contextlib.suppress(OSError):
            for entry in os.listdir(self.directory):
                if entry.startswith(mine):
                    with contextlib.suppress(OSError):
                        os.unlink(os.path.join(self.directory, entry))

    def is_ours(self) -> bool:
        """Whether the slot's files are this object's: its owner file was not replaced."""
        return _is_same_file(self._owner_fd, self.path(OWNER_LOCK))

    def reclaim_if_lost(self) -> None:
        """Claim anew when the directory or the owner file was removed under us.  Raises OSError."""
        if not self.is_ours():
            self.abandon()
            self._claim()

    def keep(self) -> None:
        """Before a publication: see to it that it goes into a slot of ours.  Raises nothing.

        Where there is none, `write` says why.
        """
        with contextlib.suppress(OSError):
            self.reclaim_if_lost()

    def _disown(self) -> None:
        descriptor, self._owner_fd = self._owner_fd, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def abandon(self) -> None:
        """Close the descriptors.  The locks go with them, unless a forked parent has them too."""
        for descriptor in (self._saving_fd, self._owner_fd):
            if descriptor >= 0:
                with contextlib.suppress(OSError):
                    os.close(descriptor)
        self._saving_fd = self._owner_fd = -1
        self.lock_status = "not held"

    # -- the lock that readers share

    def lock(self, patience: Optional[float] = None) -> None:
        """Take the saving lock; `lock_status` says how that went.

        ``patience``: how many seconds to wait at most; None: ``lock_timeout``.

        After one full timeout the following waits are not repeated: a reader that never lets
        go costs the server one wait, not one for each of a thousand buckets.
        Raises nothing: without the lock the server goes on.
        """
        patience = self.lock_timeout if patience is None else patience
        try:
            self.reclaim_if_lost()
            if not _is_same_file(self._saving_fd, self.path(SAVING_LOCK)):
                if self._saving_fd >= 0:
                    os.close(self._saving_fd)
                    self._saving_fd = -1
                self._saving_fd = open_lock_file(self.path(SAVING_LOCK))
            if try_lock(self._saving_fd, patience if self._patient else 0.0):
                self.lock_status = "held"
                self._patient = True
                once.solved("lock " + self.name)
                return
            if patience <= 0:
                self.lock_status = "not waited for"
                return
            self.lock_status = "timeout"
            self._patient = False
            once.warn(
                "lock " + self.name,
                "%s is held by a reader for more than %g s; weights change without waiting on",
                self.path(SAVING_LOCK),
                self.lock_timeout,
            )
        except OSError as error:
            self.lock_status = f"unavailable: {error.strerror or error}"
            once.warn("lock file " + self.name, "no lock, SGLang goes on without it: %s", error)

    def unlock(self) -> None:
        if self._saving_fd >= 0:
            with contextlib.suppress(OSError):
                fcntl.flock(self._saving_fd, fcntl.LOCK_UN)
        self.lock_status = "not held"

    # -- documents

    def write(self, document: str, content: Any) -> bytes:
        """Publish one document; its bytes.  Raises OSError."""
        # The layout is for programs, and at 3,000 tensors indentation would double it.
        data = encode(content, indent=document != LAYOUT)
        if self._owner_fd < 0:  # what is at the path may be another process's
            self._claim()
        try:
            write_whole(self.path(document), data)
        except FileNotFoundError:
            # The directory was removed while the server runs: make it again.
            self.reclaim_if_lost()
            write_whole(self.path(document), data)
        return data

    def has(self, document: str) -> bool:
        return os.path.exists(self.path(document))

    def remove(self, document: str) -> None:
        """Take a document away.  Raises OSError, except where it is gone already.

        A state that can't be removed speaks of the past as if it were so now.  Then the slot is
        disowned: readers take what is there for a dead process's.  The next event claims anew.
        In a slot that is not ours any more nothing is removed.
        """
        if not self.is_ours():
            return
        try:
            os.unlink(self.path(document))
        except FileNotFoundError:
            pass
        except OSError:
            if document == STATE:
                self._disown()
            raise


def _take_ownership(descriptor: int, before: Optional[Callable[[], None]]) -> bool:
    """Lock an owner file for good, within `_OWNER_PATIENCE`; ``before``: what to do first.

    First shared: then nobody owns it, nobody else can come to own it, and readers, who ask with
    a shared lock, still find it free.  So when they find it held, ``before`` is done: what a dead
    owner left is never seen beside a living one.  The wait is for readers who are asking.
    Raises OSError.
    """
    deadline = time.monotonic() + _OWNER_PATIENCE
    while True:
        if _flock(descriptor, fcntl.LOCK_SH):
            if before is not None:
                before()
            if _flock(descriptor, fcntl.LOCK_EX):
                return True
            # Two that claim at once must not keep each other out.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.0005)


def _flock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EINTR):
            raise
        return False
    return True


def _is_same_file(descriptor: int, path: str) -> bool:
    if descriptor < 0:
        return False
    try:
        ours, theirs = os.fstat(descriptor), os.lstat(path)
    except OSError:
        return False
    return (ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino)
