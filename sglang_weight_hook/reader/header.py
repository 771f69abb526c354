"""Reading a slot's header: its state in 128 bytes, which cost next to nothing to poll.

Everything goes through pread(2), nothing through a mapping: a load from a mapped file that
somebody has truncated ends the reader with SIGBUS, and a call that reads 8 bytes takes 1.5 µs,
which is little more than what Python needs to make an integer of them (`docs/benchmarks.md`).
"""

from __future__ import annotations

import contextlib
import os
import time
from types import TracebackType
from typing import Optional

from ..layout.header import SEQUENCE, SIZE, Header, unpack
from .errors import FOREIGN, HookError
from .files import open_regular

_SEQUENCE_OFFSET = 8 * SEQUENCE
# The owner takes some microseconds to rewrite the header, so that most readings succeed at once;
# one that loses the processor, or Python's interpreter lock, in between takes milliseconds.
_TRIES = 100
_PATIENT_TRIES = 1000
_PAUSE = 0.001  # seconds, after each of the patient ones


class HeaderReader:
    """A slot's header, opened once and polled; made by `Slot.open_header`.

    Stays with the file that it has opened: when another process takes the slot over, or the file
    is removed, `is_current` says so, and there is another one to open.

        with slot.open_header() as header:
            known = header.sequence
            ...
            if header.sequence != known:
                what = header.read()
    """

    def __init__(self, path: str) -> None:
        """Open the header at ``path``.  Raises HookError."""
        self.path = path
        self._descriptor = -1
        descriptor = open_regular(path, follow=False)
        if descriptor is None:
            raise HookError(
                f"{path} does not exist: its owner has exited, could not write it or is of release "
                f"0.1; read the slot's state file"
            )
        self._descriptor = descriptor
        try:
            status = os.fstat(self._descriptor)
            if status.st_size != SIZE:
                raise HookError(f"{path} is not a file of {SIZE} bytes; {FOREIGN}")
        except BaseException:
            self.close()
            raise
        self._file = (status.st_dev, status.st_ino)

    @property
    def sequence(self) -> int:
        """Another number as soon as the header has changed; one read of 8 bytes.

        Odd while the owner writes; 0 where the file was cut short.  Raises HookError when closed.
        """
        try:
            return int.from_bytes(os.pread(self._descriptor, 8, _SEQUENCE_OFFSET), "little")
        except OSError as error:
            raise self._unreadable(error) from error

    def read(self) -> Header:
        """One consistent reading, tried again while the owner writes.  Raises HookError."""
        for attempt in range(_TRIES + _PATIENT_TRIES):
            try:
                data = os.pread(self._descriptor, SIZE, 0)
            except OSError as error:
                raise self._unreadable(error) from error
            try:
                header = unpack(data)
            except ValueError as error:
                raise HookError(f"{self.path}: {error}; {FOREIGN}") from error
            if header is not None:
                return header
            if attempt >= _TRIES:
                time.sleep(_PAUSE)
        raise HookError(
            f"{self.path} is not consistent: its owner was stopped or killed while it wrote it, or "
            f"{FOREIGN}; read the slot's state file"
        )

    def is_current(self) -> bool:
        """Whether the file at the path is still this one: not replaced and not removed."""
        try:
            status = os.stat(self.path, follow_symlinks=False)
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self._file

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> HeaderReader:
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # half made, or at the interpreter's end
            self.close()

    def _unreadable(self, error: OSError) -> HookError:
        if self._descriptor < 0:
            return HookError(f"{self.path} was closed; open it again with slot.open_header()")
        return HookError(f"{self.path} cannot be read ({error.strerror}); open it again")
