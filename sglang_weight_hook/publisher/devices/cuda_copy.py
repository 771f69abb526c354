"""Copies of this process's GPU memory to the host, on a stream of our own.

For memory that the driver exports to no other process.  A copy waits for none of SGLang's streams
and none of them for it: the stream is a non-blocking one, and it alone is waited for, without the
interpreter's lock.  Nothing is allocated on the device; one small pinned buffer stays.

To make the buffer and the stream may take the driver as long as the device has work, so that is
done apart (`prepare`), where no event waits for it.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence
from typing import Any, Optional

from ...layout.sharing import COPY_BYTES
from . import cuda_driver

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_PORTABLE = 1  # CU_MEMHOSTALLOC_PORTABLE: pinned in every context


def prepare() -> None:
    """Make what copies in the current context take, where it is not there yet.  Raises OSError.

    Inside of `cuda_driver.outside_captures`, by the one thread that copies.
    """
    _copier().prepare()


def copied(runs: Sequence[tuple[int, int]]) -> bytes:
    """The bytes of runs in the current context's device memory.  Raises OSError.

    Inside of `cuda_driver.outside_captures`, after `prepare` in the same context.  At most
    `layout.sharing.COPY_BYTES` of them, by one thread at a time.
    """
    size = sum(length for _, length in runs)
    if not size:
        return b""
    if size > COPY_BYTES:
        raise OSError(errno.E2BIG, "more than is copied at a time")
    for address, length in runs:
        # An address without memory would fail every later call in the server's context.
        if length and not cuda_driver.is_device_memory(address, length):
            raise OSError(errno.EFAULT, f"the CUDA driver knows no memory at {address:#x}")
    if _made is None or _made.pid != os.getpid():
        raise OSError(errno.EINVAL, "no copy was prepared in this process")
    return _made.copied(runs)


class _Copier:
    """The pinned buffer, and a stream for each context."""

    def __init__(self, library: Any) -> None:
        self.pid = os.getpid()
        self._library = library
        buffer = ctypes.c_void_p()
        self._call(
            "cuMemHostAlloc",
            ctypes.byref(buffer),
            ctypes.c_size_t(COPY_BYTES),
            ctypes.c_uint(_PORTABLE),
        )
        self._buffer = buffer.value or 0
        self._streams: dict[int, ctypes.c_void_p] = {}

    def copied(self, runs: Sequence[tuple[int, int]]) -> bytes:
        stream = self._streams.get(self._context())
        if stream is None:
            raise OSError(errno.EINVAL, "no copy was prepared in this CUDA context")
        start = 0
        try:
            for address, length in runs:
                if length:
                    self._call(
                        "cuMemcpyDtoHAsync_v2",
                        ctypes.c_void_p(self._buffer + start),
                        ctypes.c_uint64(address),
                        ctypes.c_size_t(length),
                        stream,
                    )
                start += length
        except BaseException:
            # What was begun must not write into the buffer of the next copy.
            self._library.cuStreamSynchronize(stream)
            raise
        self._call("cuStreamSynchronize", stream)
        return ctypes.string_at(self._buffer, start)

    def prepare(self) -> None:
        context = self._context()
        if context not in self._streams:
            stream = ctypes.c_void_p()
            self._call("cuStreamCreate", ctypes.byref(stream), ctypes.c_uint(_NON_BLOCKING))
            self._streams[context] = stream

    def _context(self) -> int:
        context = ctypes.c_void_p()
        self._call("cuCtxGetCurrent", ctypes.byref(context))
        if context.value is None:
            raise OSError(errno.EINVAL, "no CUDA context is known yet")
        return context.value

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status != 0:
            raise OSError(errno.EIO, f"the CUDA driver answers {name} with error {status}")


_made: Optional[_Copier] = None


def _copier() -> _Copier:
    global _made
    # A forked child has neither its parent's context nor its pinned memory.
    if _made is None or _made.pid != os.getpid():
        library = cuda_driver._library()
        if library is None:
            raise OSError(errno.ENOSYS, "there is no CUDA driver")
        _made = _Copier(library)
    return _made
