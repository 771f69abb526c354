"""What an owner hands out of its weights over the control socket, when it is told to share them.

``copy``: the bytes of some runs, at most `layout.sharing.COPY_BYTES` at a time, copied by the
background thread while no event changes them.  ``share`` (GPUs): what another process on this
machine opens allocations with.  Only memory of the slot's published regions is handed out.

An event that begins waits for the one copy under way (`wait_for_copies`), and for no reader.
"""

from __future__ import annotations

import bisect
import threading
from typing import TYPE_CHECKING, Any, NamedTuple, Optional, Union

from ..layout.sharing import COPY_BYTES, COPY_RUNS
from . import document
from .control import Answered, refused

if TYPE_CHECKING:
    from .tracked import Tracked

OPERATIONS = ("copy", "share")

Run = tuple[int, int]  # address, bytes

_LONGEST_WAIT = 5.0  # seconds; a copy takes milliseconds
# Held by a copy under way.  Never held while anything else is waited for.
_copying = threading.Lock()


def wait_for_copies() -> None:
    """The copy under way, if any, is done: called between the lock and what SGLang then changes.

    No further one begins, for the runner is busy from before this call on.  SGLang goes on after
    `_LONGEST_WAIT` whatever a copy does.
    """
    if _copying.acquire(timeout=_LONGEST_WAIT):
        _copying.release()


def after_fork_in_child() -> None:
    """The thread that held it is not in the child."""
    global _copying
    _copying = threading.Lock()


def answer(tracked: Tracked, request: dict[str, Any]) -> Union[dict[str, Any], Answered]:
    """The answer to one of `OPERATIONS`."""
    if request.get("instance") != tracked.instance:
        return refused("changed", "it is another runner's now")
    if request["op"] == "copy":
        return _copy(tracked, request.get("runs"))
    return _share(tracked, [request.get("ptr"), request.get("size")])


# --- allocations of a GPU -----------------------------------------------------------------


def _share(tracked: Tracked, asked: Any) -> Union[dict[str, Any], Answered]:
    """What the allocations under a run are opened with, from the first one on."""
    runs = _runs_from([asked])
    if runs is None:
        return refused("malformed", "ptr and size are numbers of bytes")
    ((address, size),) = runs
    device = tracked.device
    with _copying:
        if not tracked.is_whole:
            return refused("busy", f"the slot is {tracked.state}, its weights are changing")
        if device.unshared is not None:
            return refused("failed", device.unshared)
        if size and not _spans_of(tracked).hold(address, size):
            return refused("changed", "an address is outside of the published regions")
        with device.handing_out(tracked.context):
            uuid = device.current_uuid()
            try:
                unwritten = device.why_not_done()
                if unwritten is not None:
                    return refused("busy", unwritten)
                allocations, descriptors, end = device.handed_over(address, size)
            except OSError as error:
                return refused("failed", f"the memory cannot be shared: {error.strerror}")
    answer = {"ok": True, "device_uuid": uuid, "end": end, "allocations": allocations}
    return Answered(answer, descriptors=descriptors)


# --- copies -------------------------------------------------------------------------------


def _copy(tracked: Tracked, asked: Any) -> Union[dict[str, Any], Answered]:
    runs = _runs_from(asked)
    if runs is None:
        return refused("malformed", f"runs is a list of at most {COPY_RUNS} [address, bytes]")
    if sum(length for _, length in runs) > COPY_BYTES:
        return refused("malformed", f"at most {COPY_BYTES} bytes are copied at a time")
    # Read once: what is prepared in one context does not copy in another.
    device, context = tracked.device, tracked.context
    if any(length for _, length in runs) and tracked.is_whole:
        # The driver may wait for the device in this, and no event may wait for that.
        try:
            with device.handing_out(context):
                device.prepare_copy()
        except OSError as error:
            return refused("failed", f"the weights cannot be copied: {error.strerror}")
    with _copying:
        # An event that began before this look waits in `wait_for_copies`, or the look sees it.
        if not tracked.is_whole:
            return refused("busy", f"the slot is {tracked.state}, its weights are changing")
        spans = _spans_of(tracked)
        if not all(spans.hold(*run) for run in runs):
            return refused("changed", "an address is outside of the published regions")
        try:
            # The background thread has no context of its own.
            with device.handing_out(context):
                unwritten = device.why_not_done()
                if unwritten is not None:
                    return refused("busy", unwritten)
                payload = device.copied(runs)
        except OSError as error:
            return refused("failed", f"the weights cannot be copied: {error.strerror}")
    return Answered({"ok": True, "bytes": len(payload)}, payload)


def _runs_from(asked: Any) -> Optional[list[Run]]:
    """The runs of a request; None where they are none."""
    if not isinstance(asked, list) or len(asked) > COPY_RUNS:
        return None
    runs = []
    for each in asked:
        if not isinstance(each, list) or len(each) != 2:
            return None
        for number in each:
            if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 1 << 63:
                return None
        runs.append((each[0], each[1]))
    return runs


class _Spans(NamedTuple):
    """The published regions, made once for a capture."""

    captured: Any
    starts: list[int]
    ends: list[int]

    def hold(self, address: int, length: int) -> bool:
        """Whether the whole run lies in regions, which may touch each other."""
        end = address + length
        index = bisect.bisect_right(self.starts, address) - 1
        while index >= 0 and index < len(self.starts) and self.starts[index] <= address:
            if end <= self.ends[index]:
                return True
            if address >= self.ends[index]:
                return False
            address = self.ends[index]
            index += 1
        return False


_spans: dict[str, _Spans] = {}  # by instance


def _spans_of(tracked: Tracked) -> _Spans:
    captured = tracked.captured
    found = _spans.get(tracked.instance)
    if found is None or found.captured is not captured:
        assert captured is not None
        regions = document.regions_of(captured)
        found = _Spans(captured, [each.start for each in regions], [each.end for each in regions])
        _spans.clear()  # of one slot at a time, which is enough for a reader that reads it whole
        _spans[tracked.instance] = found
    return found
