"""How one file gets into purelib and out of it.

Atomically: under a temporary name in the same directory, flushed to disk, then by rename.  A
file that is there is never opened for writing, because uv hard-links installed files to its cache
and other environments would change with it; a symbolic link is replaced, never followed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from . import Refusal

#: What an interrupted run may leave; the end is not .pth, so that no interpreter reads it.
TEMPORARY = re.compile(r"\.sglang-weight-hook-\d+-\d+\.tmp")

#: Exists while an installation or removal runs, or after one was killed.
LOCK = ".sglang-weight-hook.lock"

#: Seconds that one installation or removal waits for another.
LOCK_TIMEOUT = 60.0

#: No file of an installation, and no RECORD, comes near this; a larger one is not read.
LARGEST = 64 * 1024 * 1024

_counter = itertools.count()


@dataclass(frozen=True)
class Kept:
    """A file as it was, to put it back: its bytes, or where the symbolic link pointed."""

    data: bytes
    link: str | None
    mode: int
    mtime_ns: int


class Disk:
    """The files under one purelib, by paths relative to it with forward slashes."""

    def __init__(self, purelib: str) -> None:
        self.purelib = purelib
        umask = os.umask(0)
        os.umask(umask)
        # The umask decides, as for every other installer; but every user who may read
        # site-packages may read our files, or else a root shell with umask 077 would leave a
        # .pth and a loader that make every Python of every other user complain at start-up.
        shared = stat.S_IMODE(os.stat(purelib).st_mode)
        self._file_mode = (0o666 & ~umask) | (0o444 & shared)
        self._directory_mode = (0o777 & ~umask) | (0o555 & shared)

    def absolute(self, path: str) -> str:
        return os.path.join(self.purelib, *path.split("/"))

    def exists(self, path: str) -> bool:
        return os.path.lexists(self.absolute(path))

    def is_plain(self, path: str) -> bool:
        try:
            return stat.S_ISREG(os.lstat(self.absolute(path)).st_mode)
        except OSError:
            return False

    def is_directory(self, path: str) -> bool:
        try:
            return stat.S_ISDIR(os.lstat(self.absolute(path)).st_mode)
        except OSError:
            return False

    def names(self, directory: str) -> list[str]:
        """What is in a directory; nothing where there is none, or only a link to one."""
        place = self.absolute(directory) if directory else self.purelib
        if directory and os.path.islink(place):
            return []
        try:
            return sorted(os.listdir(place))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def read(self, path: str) -> bytes | None:
        """The bytes of a plain file; ``None`` for anything else, and where there is nothing."""
        try:
            # O_NONBLOCK: a FIFO without a writer would be waited for.
            descriptor = os.open(
                self.absolute(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            )
        except OSError:
            return None
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST:
            os.close(descriptor)
            return None
        with open(descriptor, "rb") as stream:
            return stream.read()

    def write(
        self,
        path: str,
        data: bytes,
        mtime_ns: int | None = None,
        mode: int | None = None,
    ) -> None:
        final = self.absolute(path)
        self._make_directories(os.path.dirname(final))
        temporary = self._temporary(final)
        try:
            descriptor = os.open(
                temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            )
            with open(descriptor, "wb") as stream:
                os.fchmod(descriptor, self._file_mode if mode is None else mode)
                stream.write(data)
                stream.flush()
                if mtime_ns is not None:
                    os.utime(descriptor, ns=(mtime_ns, mtime_ns))
                # A name never stands for a file that a power cut could leave empty or short:
                # a loader like that, beside its .pth, makes every interpreter complain.
                os.fsync(descriptor)
            os.replace(temporary, final)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    def flush(self, directories: Iterable[str]) -> None:
        """Make the names in these directories ("" is purelib) outlive a power cut."""
        for directory in directories:
            place = self.absolute(directory) if directory else self.purelib
            try:
                descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                os.fsync(descriptor)
            except OSError as error:
                # Some network file systems have no such thing for directories.
                if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
                    raise
            finally:
                os.close(descriptor)

    def remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.unlink(self.absolute(path))

    def remove_directory(self, path: str) -> bool:
        """Remove a directory if it is empty; whether it no longer exists."""
        with contextlib.suppress(OSError):
            os.rmdir(self.absolute(path))
        return not self.exists(path)

    def keep(self, path: str) -> Kept | None:
        place = self.absolute(path)
        try:
            status = os.lstat(place)
        except OSError:
            return None
        link, data = None, b""
        if stat.S_ISLNK(status.st_mode):
            link = os.readlink(place)
        else:
            with open(place, "rb") as stream:
                data = stream.read()
        return Kept(data, link, stat.S_IMODE(status.st_mode), status.st_mtime_ns)

    def put_back(self, path: str, kept: Kept) -> None:
        if kept.link is None:
            self.write(path, kept.data, kept.mtime_ns, kept.mode)
            return
        temporary = self._temporary(self.absolute(path))
        os.symlink(kept.link, temporary)
        os.replace(temporary, self.absolute(path))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One installation or removal at a time; waits up to a minute for another one.

        The lock is on a file that only those can open who may write to purelib: a lock on the
        directory itself could be held by anybody who can read it, for ever.  The file is
        removed at the end; after a kill the kernel has let go of it, and the next run takes it.
        Where the file system has no such locks (some network ones) the work goes on without.
        """
        deadline = time.monotonic() + LOCK_TIMEOUT
        while (descriptor := self._try_to_lock()) is None:
            if time.monotonic() > deadline:
                raise Refusal(
                    f"another installation or removal has held {self.absolute(LOCK)} for "
                    f"{LOCK_TIMEOUT:.0f} seconds; run this again when it has ended."
                )
            time.sleep(0.05)
        try:
            yield
        finally:
            # Removed while it is held.  Whoever waits finds that its file is no longer there.
            # One with something in it is no lock of ours, and stays.
            with contextlib.suppress(OSError):
                if os.fstat(descriptor).st_size == 0:
                    os.unlink(self.absolute(LOCK))
            os.close(descriptor)

    def wait_for_others(self) -> None:
        """Wait until no installation or removal runs, as far as this user can see."""
        deadline = time.monotonic() + LOCK_TIMEOUT
        while time.monotonic() < deadline:
            try:
                descriptor = os.open(
                    self.absolute(LOCK), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                )
            except OSError:
                return
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:
                return
            else:
                return
            finally:
                os.close(descriptor)

    def _try_to_lock(self) -> int | None:
        """The descriptor of the locked file, or ``None`` while somebody else has it."""
        place = self.absolute(LOCK)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            descriptor = os.open(place, flags, 0o600)
        except OSError as error:
            if os.path.lexists(place) and not self.is_plain(LOCK):
                raise Refusal(f"{place} is not a file; remove it first.") from None
            if error.errno == errno.EACCES and os.path.lexists(place):
                raise Refusal(
                    f"{place} is another user's: an installation of theirs runs or was killed; "
                    "remove that file if none runs."
                ) from None
            raise
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise Refusal(f"{place} is not a file; remove it first.")
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return None
            except OSError:
                return descriptor
            # The one that held it before may have removed it since it was opened here.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.lstat(place)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None

    def _make_directories(self, place: str) -> None:
        if os.path.isdir(place):
            return
        self._make_directories(os.path.dirname(place))
        os.mkdir(place)
        os.chmod(place, self._directory_mode)

    @staticmethod
    def _temporary(final: str) -> str:
        name = f".sglang-weight-hook-{os.getpid()}-{next(_counter)}.tmp"
        return os.path.join(os.path.dirname(final), name)
