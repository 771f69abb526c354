"""Whether the device has done what the calls that write weights have asked of it.

Such a call returns when its kernels and copies are queued.  A reader that is handed memory, or a
copy made on another stream, could come before them.  So the end of each call is marked on the
stream that it worked on, which waits for nothing, and who asks for memory is told to ask again
until the device has passed the marks.  Only where weights are shared (SGLANG_WEIGHT_HOOK_SHARE).
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from typing import Any

from . import cuda_driver, once, settings

_DISABLE_TIMING = 2  # CU_EVENT_DISABLE_TIMING
_NOT_READY = 600  # CUDA_ERROR_NOT_READY

# By context and stream; made once, marked again by each call.  Streams that write are few.
_marks: dict[tuple[int, int, int], ctypes.c_void_p] = {}
_MOST = 64


def mark() -> None:
    """A call that may have written weights ends, on this thread.  Never raises, never waits."""
    if settings.load().share is None or not cuda_driver.is_initialised():
        return
    try:
        _mark()
    except Exception as error:
        once.warn("order", "readers may see weights that are still being written: %r", error)


def is_done() -> bool:
    """Whether all that was marked is done.  In a context, any thread.  Raises OSError."""
    library: Any = cuda_driver._library()
    for (pid, _, _), event in list(_marks.items()):
        if pid != os.getpid():
            continue  # of a parent's, whose device this process cannot use
        status = library.cuEventQuery(event)
        if status == _NOT_READY:
            return False
        if status != 0:
            raise OSError(errno.EIO, f"the CUDA driver answers cuEventQuery with error {status}")
    return True


def _mark() -> None:
    library: Any = cuda_driver._library()
    context = cuda_driver.current_context()
    if library is None or context is None:
        return  # a thread that has asked nothing of the device
    stream = current_stream()
    capturing = ctypes.c_int()
    status = library.cuStreamIsCapturing(ctypes.c_void_p(stream), ctypes.byref(capturing))
    if status != 0 or capturing.value != 0:
        return  # a mark would become a part of the graph; nothing of it runs now
    key = (os.getpid(), context, stream)
    event = _marks.get(key)
    if event is None:
        if len(_marks) >= _MOST:
            raise RuntimeError(f"weights were written on more than {_MOST} streams")
        event = ctypes.c_void_p()
        status = library.cuEventCreate(ctypes.byref(event), ctypes.c_uint(_DISABLE_TIMING))
        if status != 0:
            raise RuntimeError(f"cuEventCreate answers {status}")
        _marks[key] = event
    status = library.cuEventRecord(event, ctypes.c_void_p(stream))
    if status != 0:
        raise RuntimeError(f"cuEventRecord answers {status}")


def current_stream() -> int:
    """The handle of the stream that torch uses in this thread; 0 is the default stream."""
    torch: Any = sys.modules["torch"]
    return int(torch.cuda.current_stream().cuda_stream)
