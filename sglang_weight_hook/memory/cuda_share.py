"""What a GPU server hands over its control socket: what its allocations are opened with.

Nothing in an answer is trusted: it has sizes, types and an order.  Descriptors are closed here,
whatever becomes of them.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Optional

from ..layout import process
from ..layout.sharing import LEGACY_IPC, NO_EXPORT, POSIX_FD, SHARED_ALLOCATIONS
from ..reader import Document, HookError, NotAllowed
from ..reader.conversation import Conversation, garbled
from ..reader.errors import OwnerGone
from .errors import Changed, NotReadable
from .owner import refusal
from .process import find_pid

_TIMEOUT = 10.0  # seconds, for an answer
# While the owner is busy: it is asked again after pauses that grow, and not for long.
_PAUSE, _LONGEST_PAUSE = 0.002, 0.05
_PATIENCE = 2.0
_HANDLE_BYTES = 64  # CU_IPC_HANDLE_SIZE
# Allocations are pages or multiples of them, so a run lies in no more than so many.
_SMALLEST = 4096


class Allocation(NamedTuple):
    """An allocation of the owner's, and what it is opened with."""

    ptr: int  # in the owner's address space
    size: int
    export: str
    handle: Optional[bytes] = None  # of cudaIpcGetMemHandle
    descriptor: Optional[int] = None  # of memory mapped with cuMemMap

    @property
    def end(self) -> int:
        return self.ptr + self.size


def allocations_under(
    document: Document, start: int, end: int
) -> Generator[list[Allocation], None, None]:
    """The owner's allocations from ``start`` to ``end``, in groups; by address, without gaps.

    The descriptors of a group are closed when the next is asked for, or it is closed itself.
    Asks once where ``start`` is ``end``.  Raises NotReadable, where the owner does not share;
    Changed; and ControlError where it could not be asked, which says nothing of its memory.
    """
    position, groups = start, 2 + (end - start) // _SMALLEST
    with _connected(document) as conversation:
        while True:
            answer = _asked(document, conversation, position, end - position)
            descriptors = conversation.take_descriptors()
            try:
                group = _allocations_in(document, answer, position, end, descriptors)
                yield group
            finally:
                for descriptor in descriptors:
                    with contextlib.suppress(OSError):
                        os.close(descriptor)
            if group:
                position = group[-1].end
            if position >= end:
                return
            groups -= 1
            if groups < 0:
                raise garbled(document.slot, "it names more allocations than there can be")


@contextlib.contextmanager
def _connected(document: Document) -> Iterator[Conversation]:
    try:
        conversation = Conversation(document.slot, document.state, _TIMEOUT)
    except OwnerGone as error:
        raise Changed(str(error)) from error
    except NotAllowed as error:
        raise NotReadable(str(error)) from error
    with conversation:
        yield conversation


def _asked(
    document: Document, conversation: Conversation, address: int, size: int
) -> Mapping[str, Any]:
    """The answer about a run, where it is one.  Raises NotReadable, Changed and ControlError."""
    request = {
        "op": "share",
        "slot": document.slot.name,
        "instance": document.instance,
        "ptr": address,
        "size": size,
    }
    deadline, pause = time.monotonic() + _PATIENCE, _PAUSE
    while True:
        try:
            answer = conversation.ask(request)
        except OwnerGone as error:
            raise Changed(str(error)) from error
        except NotAllowed as error:
            raise NotReadable(str(error)) from error
        if answer.get("ok") is True:
            return answer
        if answer.get("error") != "busy" or time.monotonic() + pause > deadline:
            break
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
    name, said = document.slot.name, str(answer.get("message"))[:200]
    if answer.get("error") == "busy":
        raise Changed(
            f"slot {name} is not as the document says ({said}, also after {_PATIENCE:g} s); wait "
            f"until it is ready and read the document again"
        )
    if answer.get("error") == "failed":
        raise NotReadable(
            f"the owner of slot {name} hands out nothing to open its memory with ({said}); have it "
            f"copy with open_memory(via='owner')"
        )
    raise refusal(document, answer)


def _allocations_in(
    document: Document,
    answer: Mapping[str, Any],
    start: int,
    end: int,
    descriptors: Sequence[int],
) -> list[Allocation]:
    """The allocations of an answer.  Raises HookError where they are none."""
    slot = document.slot
    uuid = document.identity.get("gpu_uuid")
    if uuid is not None and answer.get("device_uuid") not in (uuid, None):
        raise garbled(slot, "it is about another GPU")
    entries = answer.get("allocations")
    if not isinstance(entries, list) or len(entries) > SHARED_ALLOCATIONS:
        raise garbled(slot, f"it has no list of at most {SHARED_ALLOCATIONS} allocations")
    left = list(descriptors)
    found: list[Allocation] = []
    position = start
    for entry in entries:
        allocation = _allocation_from(entry, left)
        if allocation is None:
            raise garbled(
                slot, "an allocation has no valid ptr, size, export, handle or descriptor"
            )
        begins_right = allocation.ptr == position if found else allocation.ptr <= position
        if not begins_right or allocation.end <= position or position >= end:
            raise garbled(slot, "its allocations are not those under the memory asked for")
        found.append(allocation)
        position = allocation.end
    if left:
        raise garbled(slot, "more descriptors came with it than it has allocations for")
    if not found and start < end:
        raise garbled(slot, "it has no allocation")
    return found


def _allocation_from(entry: Any, descriptors: list[int]) -> Optional[Allocation]:
    """One entry; takes its descriptor from the front of ``descriptors``.  None: it is none."""
    if not isinstance(entry, dict):
        return None
    ptr, size, export = entry.get("ptr"), entry.get("size"), entry.get("export")
    for number in (ptr, size):
        if isinstance(number, bool) or not isinstance(number, int) or not 0 < number < 1 << 62:
            return None
    assert isinstance(ptr, int)
    assert isinstance(size, int)
    if export == NO_EXPORT:
        return Allocation(ptr, size, export)
    if export == POSIX_FD:
        return Allocation(ptr, size, export, None, descriptors.pop(0)) if descriptors else None
    if export != LEGACY_IPC:
        return None
    try:
        handle = bytes.fromhex(str(entry.get("handle")))
    except ValueError:
        return None
    return Allocation(ptr, size, export, handle) if len(handle) == _HANDLE_BYTES else None


# --- whether it is still there ------------------------------------------------------------

# What the state document has of the weights that a document describes.
_SAME = (
    "pid", "process_start_ticks", "instance", "state",
    "layout_generation", "content_generation", "physical_epoch",
)  # fmt: skip


def is_current(document: Document) -> bool:
    """Whether the slot's state is still the one that the document was read with."""
    try:
        state = document.slot.read_state()
    except HookError:
        return False
    return all(state.get(name) == document.state.get(name) for name in _SAME)


class Owner:
    """The process behind a document, and whether it still lives: asked after every copy."""

    def __init__(self, document: Document) -> None:
        """Raises NotReadable where it is on another machine, Changed where it has exited."""
        self._slot = document.slot
        self._pid = document.state.get("pid")
        self._descriptor: Optional[int] = None
        boot = document.state.get("boot_id")
        if boot is not None and boot != process.boot_id():
            raise NotReadable(
                f"the server runs on another machine ({document.state.get('hostname')}), and its "
                f"GPU with it; read on that machine, or through a transfer engine"
            )
        ticks = document.state.get("process_start_ticks")
        # In another pid namespace its lock has to do.
        with contextlib.suppress(NotReadable, OSError, AttributeError):
            pid = find_pid(document.state, document.identity)
            if pid == os.getpid() and process.start_ticks(pid) == ticks:
                self._is_here = True
                return
            self._descriptor = os.pidfd_open(pid)  # Linux 5.3
            if process.is_running(pid, ticks) is False:
                self.close()
        self._is_here = False
        try:
            self.require()
        except BaseException:
            self.close()
            raise

    @property
    def is_this_process(self) -> bool:
        return self._is_here

    def require(self) -> None:
        """Raises Changed where it has exited."""
        if self._descriptor is not None:
            poll = select.poll()
            poll.register(self._descriptor, select.POLLIN)
            lives = not poll.poll(0)
        else:
            lives = self._slot.owner_alive()
        if not lives:
            raise Changed(
                f"the owner of slot {self._slot.name} (pid {self._pid}) has exited, and its memory "
                f"with it; start the server again"
            )

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(descriptor)
