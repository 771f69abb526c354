"""What the engines in this process need of its slots, and the transport documents that they fill.

Called from the subscribers' threads, which may be late, and from the recorder, which waits for
nothing here: it may be the garbage collector that calls it, in a thread that is writing a document.
So the lock is the subscribers' alone, and who writes looks afterwards whether the slot was left.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any

from ..layout import files
from ..layout.transport_document import TRANSPORT_SCHEMA, TRANSPORT_SCHEMA_VERSION
from . import capture, publish
from .footprint import tensors_of
from .header import MemoryHeader
from .tracked import Tracked
from .walk import Wrappers


class _Place:
    """A slot that can be registered."""

    def __init__(self, tracked: Tracked) -> None:
        self.tracked = tracked
        self.entries: dict[str, Mapping[str, Any]] = {}  # by engine: its part of the document


_writing = threading.Lock()  # among the subscribers' threads; the recorder never takes it
_places: dict[str, _Place] = {}  # by slot; each access is one operation of the dict


def enter(tracked: Tracked) -> None:
    """The slot is published: it can be registered.  Under the recorder's mutex."""
    place = _places.get(tracked.slot.name)
    if place is not None and place.tracked is tracked:
        return
    if tracked.memory_header is None:
        tracked.memory_header = MemoryHeader()
    _places[tracked.slot.name] = _Place(tracked)


def leave(slot: str) -> None:
    """The slot is not published any more, and neither is how it is reached.  Waits for nothing."""
    place = _places.pop(slot, None)
    if place is not None:
        with contextlib.suppress(OSError):
            place.tracked.slot.remove(files.TRANSPORT)


def abandon() -> None:
    """In a forked child: everything here is its parent's."""
    global _writing
    _writing = threading.Lock()
    _places.clear()


def header_of(slot: str) -> tuple[int, int]:
    """Address and size of the slot's header in this process's memory.  Raises KeyError."""
    header = _places[slot].tracked.memory_header
    if header is None:
        raise KeyError(slot)
    return header.ptr, header.size


def storages_of(slot: str) -> list[Any]:
    """The storages behind the slot's map, alive as long as the caller keeps them."""
    tracked = _places[slot].tracked
    runner, captured = tracked.runner(), tracked.captured
    if runner is None or captured is None:
        return []
    wanted = {
        row.storage_ptr: name
        for name, row in captured.tensors.items()
        if row.resident and row.storage_ptr
    }
    found, lost = _storages_among(_quickly_held(runner, captured), wanted)
    if lost:
        live = (tensor for _, tensor in capture.live_tensors(runner, captured))
        found, lost = _storages_among(live, wanted)
    if lost:
        raise LookupError(f"tensor {wanted[lost.pop()]} is not where the map says")
    return found


def _quickly_held(runner: Any, captured: capture.Capture) -> list[Any]:
    """The tensors that are held where they were at the capture, without a walk of the model."""
    footprint = captured.footprint
    held = None if footprint is None else tensors_of(footprint, runner.model)
    return [] if held is None else held[1]


def _storages_among(
    tensors: Iterable[Any], wanted: Mapping[int, str]
) -> tuple[list[Any], set[int]]:
    """The storages that begin at an address of ``wanted``, and the addresses without one."""
    is_wrapper = Wrappers()
    storages = [tensor.untyped_storage() for tensor in tensors if not is_wrapper[type(tensor)]]
    addresses = [storage.data_ptr() for storage in storages]
    found = [storage for storage, ptr in zip(storages, addresses) if ptr in wanted]
    return found, wanted.keys() - set(addresses)


def publish_entry(slot: str, engine: str, entry: Mapping[str, Any]) -> None:
    """Publish the engine's part of the slot's transport document.  Raises OSError.

    Not where the slot was left meanwhile: who comes too late writes nothing.
    """
    with _writing:
        place = _places.get(slot)
        if place is None or not place.tracked.slot.is_ours():
            return
        tracked = place.tracked
        place.entries[engine] = entry
        process = tracked.process
        document = {
            "schema": TRANSPORT_SCHEMA,
            "schema_version": TRANSPORT_SCHEMA_VERSION,
            "hostname": process["hostname"],
            "boot_id": process["boot_id"],
            "pid": process["pid"],
            "process_start_ticks": process["process_start_ticks"],
            "slot": slot,
            "instance": tracked.instance,
            "updated_at": time.time(),
            "engines": place.entries,
        }
        path = tracked.slot.path(files.TRANSPORT)
        data = publish.encode(document)
        if _places.get(slot) is not place:
            return
        publish.write_whole(path, data, mode=0o600)
        if _places.get(slot) is not place:  # left between the two
            _take_back(path, data)


def _take_back(path: str, data: bytes) -> None:
    """Take away what was written, where it is still there: the slot may be another's by now."""
    with contextlib.suppress(OSError):
        with open(path, "rb") as file:
            ours = file.read() == data
        if ours:
            os.unlink(path)
