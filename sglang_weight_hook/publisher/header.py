"""The owner's side of a slot's header: 128 bytes of a file, rewritten in place.

Written with pwrite(2), not through a mapping: should somebody truncate the file, a store into a
mapping would end the server with SIGBUS.  Readers may map it; Linux keeps both in step.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any, NamedTuple, Optional

from ..layout.header import LEFT, SIZE, Header, pack

_SEQUENCE_OFFSET = 8  # bytes
_BODY_OFFSET = 16


class Unproven(NamedTuple):
    """What the header in memory is to say once the device has done what it was asked."""

    content: Header
    since: float  # time.monotonic()


class HeaderFile:
    """Nothing here is thread-safe; the recorder calls it under its own mutex."""

    def __init__(self, path: str, first: Header) -> None:
        """Put a new file in place of whatever is at ``path``.  Raises OSError.

        A reader that has the predecessor's file mapped keeps that one: it says who owned it.
        """
        self.path = path
        self.last = first
        temporary = os.path.join(
            os.path.dirname(path), f".{os.path.basename(path)}.tmp-{os.getpid()}"
        )
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(temporary, flags, 0o644)
        try:
            os.pwrite(self._descriptor, pack(first), 0)
            os.rename(temporary, path)
        except BaseException:
            self.abandon()
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    def is_in_place(self) -> bool:
        """Whether readers find this file: it was neither removed nor replaced."""
        try:
            ours, theirs = os.fstat(self._descriptor), os.lstat(self.path)
        except OSError:
            return False
        return (ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino)

    def write(self, header: Header) -> None:
        """Replace the content; ``header.sequence`` is not looked at.  Raises OSError."""
        if self._descriptor < 0:
            return
        sequence = self.last.sequence + 2
        self.last = header._replace(sequence=sequence)
        data = pack(self.last)
        # Everything with the odd number, then the even one.  In no more calls than that: after
        # each this thread may wait for the interpreter, and readers meanwhile for the number.
        # The magic each time: somebody may have truncated the file.
        odd = (sequence - 1).to_bytes(8, "little")
        os.pwrite(self._descriptor, data[:_SEQUENCE_OFFSET] + odd + data[_BODY_OFFSET:], 0)
        os.pwrite(self._descriptor, data[_SEQUENCE_OFFSET:_BODY_OFFSET], _SEQUENCE_OFFSET)

    def leave(self) -> None:
        """Say that the slot has no owner any more, and let go of the file."""
        with contextlib.suppress(OSError):
            self.write(self.last._replace(state=LEFT))
        self.abandon()

    def abandon(self) -> None:
        """Let go of the file and write nothing: a forked child's copy is its parent's."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(descriptor)


# Those of slots that are gone, too: what was registered once may be read as long as the process
# lives.
_pages: list[Any] = []


class MemoryHeader:
    """The header once more, in a page of this process's own, for transfer engines.

    Not a mapping of the file: if somebody truncated that one, an engine that reads it would end the
    server with SIGBUS.  Shared, not private: after a fork a private page that is written moves away
    from what was registered.
    """

    def __init__(self) -> None:
        """Nothing is in it until the first `write`: no magic, so no header.  Raises OSError."""
        import ctypes
        import mmap

        page = mmap.mmap(-1, mmap.PAGESIZE)
        self.ptr = ctypes.addressof(ctypes.c_char.from_buffer(page))
        self.size = SIZE
        self._page = page
        self._last: Optional[Header] = None
        self._pid = os.getpid()
        _pages.append(page)

    def write(self, header: Header) -> None:
        """Replace the content; ``header.sequence`` is not looked at."""
        if self._pid != os.getpid():
            return  # a forked child shares the page
        sequence = 2 if self._last is None else self._last.sequence + 2
        self._last = header._replace(sequence=sequence)
        data = pack(self._last)
        odd = (sequence - 1).to_bytes(8, "little")
        self._page[_SEQUENCE_OFFSET:_BODY_OFFSET] = odd
        self._page[_BODY_OFFSET:SIZE] = data[_BODY_OFFSET:]
        self._page[:_BODY_OFFSET] = data[:_BODY_OFFSET]

    def leave(self) -> None:
        """Say that the slot has no owner any more."""
        if self._last is not None:
            self.write(self._last._replace(state=LEFT))
