"""How one file gets into purelib and out of it.

Atomically: under a temporary name in the same directory, then by rename.  A file
that is there is never opened for writing, because uv hard-links installed files to its cache
and other environments would change with it; a symbolic link is replaced, never followed.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import re
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass

from . import Refusal
from .contents import LOADER

#: What an interrupted run may leave; the end is not .pth, so that no interpreter reads it.
TEMPORARY = re.compile(r"\.sglang-weight-hook-\d+-\d+\.tmp")

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
            descriptor = os.open(self.absolute(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return None
        with open(descriptor, "rb") as stream:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return None
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
                # After a power cut an empty loader beside an intact .pth would make every
                # interpreter complain.  Any other file that is found empty then is silent
                # (and --check tells), and waiting for a busy disk some 40 times is not worth it.
                if path == LOADER:
                    os.fsync(descriptor)
            os.replace(temporary, final)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

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
    def locked(self, shared: bool = False) -> Iterator[None]:
        """One installation or removal at a time; waits up to a minute for another one.

        The lock is on the directory itself, so that there is no lock file to leave behind,
        and the kernel lets go of it however the process ends.  Where the file system has no
        such locks (some network ones) the work goes on without.
        """
        descriptor = os.open(self.purelib, os.O_RDONLY | os.O_CLOEXEC)
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    fcntl.flock(
                        descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB
                    )
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise Refusal(
                            f"another installation or removal has held {self.purelib} for a "
                            "minute; run this again when it has ended."
                        ) from None
                    time.sleep(0.05)
                except OSError:
                    break
                else:
                    break
            yield
        finally:
            os.close(descriptor)

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
