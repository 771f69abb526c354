"""Whether the device has done what the calls that write weights have asked of it.

Such a call returns when its kernels and copies are queued.  A reader that is handed memory, or a
copy made on another stream, could come before them.  So the end of each call is marked on the
stream that it worked on, which waits for nothing, and who asks for memory is told to ask again
until the device has passed the marks.  Only where weights are shared (SGLANG_WEIGHT_HOOK_SHARE) or
a subscriber may serve them to other machines (SGLANG_WEIGHT_HOOK_SUBSCRIBERS).

Where the end of a call could not be marked nothing is known of it, and nobody is handed anything
until a later mark on the same stream: a stream works in order, so that mark proves the earlier
calls done, too.  A mark on another stream proves nothing.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from typing import Any, NamedTuple, Optional

from .. import once, settings
from . import cuda_driver

_DISABLE_TIMING = 2  # CU_EVENT_DISABLE_TIMING
_NOT_READY = 600  # CUDA_ERROR_NOT_READY
_CAPTURES_NOTHING, _CAPTURES = 0, 1  # CU_STREAM_CAPTURE_STATUS_NONE, _ACTIVE


class _Place(NamedTuple):
    """Where a call has worked; None: not known."""

    pid: int
    context: Optional[int] = None
    stream: Optional[int] = None


# The event by place; made once, marked again by each call.  Streams that write are few.
_marks: dict[_Place, ctypes.c_void_p] = {}
_MOST = 64
# Why the end of the last call at a place could not be marked.  Where the stream itself is not
# known no later mark can prove anything, so that stays.
_missing: dict[_Place, str] = {}


def mark() -> None:
    """A call that may have written weights ends, on this thread.  Never raises, never waits."""
    configured = settings.load()
    if configured.share is None and not configured.subscribers:
        return
    if not cuda_driver.is_initialised():
        return
    place = _Place(os.getpid())
    try:
        library: Any = cuda_driver._library()
        if library is None:
            return
        context = ctypes.c_void_p()
        _call(library, "cuCtxGetCurrent", ctypes.byref(context))
        if context.value is None:
            return  # a thread that has asked nothing of the device
        place = place._replace(context=context.value)
        place = place._replace(stream=current_stream())
        _mark(library, place)
    except Exception as error:
        _missing[place] = getattr(error, "strerror", None) or str(error) or repr(error)
        once.warn(
            "order", "no weights are handed out, for their end could not be marked: %r", error
        )


def is_done() -> bool:
    """Whether all that was asked of the device is done.  In a context, any thread.

    Raises OSError.
    """
    return why_not_done() is None


def why_not_done() -> Optional[str]:
    """Why memory cannot be handed out yet; None where it can.

    In a context, any thread.  Raises OSError.
    """
    pid = os.getpid()  # of a parent's marks this process cannot ask the device
    for place, why in list(_missing.items()):
        if place.pid == pid:
            return (
                "it is not known whether the device has written the weights that an update has "
                f"given it: {why}"
            )
    library: Any = cuda_driver._library()
    for place, event in list(_marks.items()):
        if place.pid == pid and not _has_passed(library, event):
            return "the device is still writing the weights that an update has given it"
    return None


def _mark(library: Any, place: _Place) -> None:
    """Mark the stream at ``place``, where work of this thread runs.  Raises Exception."""
    stream = ctypes.c_void_p(place.stream)
    capturing = ctypes.c_int()
    _call(library, "cuStreamIsCapturing", stream, ctypes.byref(capturing))
    if capturing.value == _CAPTURES:
        return  # a mark would become a part of the graph; nothing of it runs now
    if capturing.value != _CAPTURES_NOTHING:
        raise RuntimeError("a CUDA graph capture has failed on the stream that writes them")
    event = _marks.get(place)
    if event is None:
        event = _marks[place] = _new_event(library, place)
    _call(library, "cuEventRecord", event, stream)
    _missing.pop(place, None)


def _new_event(library: Any, place: _Place) -> ctypes.c_void_p:
    """An event for a stream that has none: where there are many, one that the device has passed.

    Raises Exception.
    """
    for other in list(_marks):
        if other.pid != place.pid:
            del _marks[other]  # a parent's
    if len(_marks) >= _MOST:
        # An event belongs to its context.
        for other, event in list(_marks.items()):
            if other.context == place.context and _has_passed(library, event):
                del _marks[other]
                return event
        raise RuntimeError(f"weights are being written on more than {_MOST} streams")
    made = ctypes.c_void_p()
    _call(library, "cuEventCreate", ctypes.byref(made), ctypes.c_uint(_DISABLE_TIMING))
    return made


def _has_passed(library: Any, event: ctypes.c_void_p) -> bool:
    """Whether the device has passed a mark.  Raises OSError."""
    status = library.cuEventQuery(event)
    if status not in (0, _NOT_READY):
        raise OSError(errno.EIO, f"the CUDA driver answers cuEventQuery with error {status}")
    return bool(status == 0)


def _call(library: Any, name: str, *arguments: Any) -> None:
    status = getattr(library, name)(*arguments)
    if status != 0:
        raise RuntimeError(f"the CUDA driver answers {name} with error {status}")


def current_stream() -> int:
    """The handle of the stream that torch uses in this thread; 0 is the default stream."""
    torch: Any = sys.modules["torch"]
    return int(torch.cuda.current_stream().cuda_stream)
