"""What the engines in this process need of its slots, and the transport documents that they fill.

Called from the subscribers' threads, which may be late, and from the recorder: a lock of its own
guards what is here, and is held only while a document is written.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping
from typing import Any

from ..layout import files
from ..layout.transport_document import TRANSPORT_SCHEMA, TRANSPORT_SCHEMA_VERSION
from . import capture, publish
from .header import MemoryHeader
from .tracked import Tracked

_lock = threading.Lock()
_places: dict[str, Tracked] = {}  # by slot
_entries: dict[str, dict[str, Mapping[str, Any]]] = {}  # slot -> engine -> its part


def enter(tracked: Tracked) -> None:
    """The slot is published: it can be registered.  Under the recorder's mutex."""
    slot = tracked.slot.name
    with _lock:
        if _places.get(slot) is tracked:
            return
        _places[slot] = tracked
        _entries.pop(slot, None)
    if tracked.memory_header is None:
        tracked.memory_header = MemoryHeader()


def leave(slot: str) -> None:
    """The slot is not published any more, and neither is how it is reached."""
    with _lock:
        tracked = _places.pop(slot, None)
        _entries.pop(slot, None)
        if tracked is not None:
            with contextlib.suppress(OSError):
                tracked.slot.remove(files.TRANSPORT)


def abandon() -> None:
    """In a forked child: everything here is its parent's."""
    global _lock
    _lock = threading.Lock()
    _places.clear()
    _entries.clear()


def header_of(slot: str) -> tuple[int, int]:
    """Address and size of the slot's header in this process's memory.  Raises KeyError."""
    header = _places[slot].memory_header
    if header is None:
        raise KeyError(slot)
    return header.ptr, header.size


def storages_of(slot: str) -> list[Any]:
    """The storages behind the slot's map, alive as long as the caller keeps them."""
    tracked = _places[slot]
    runner, captured = tracked.runner(), tracked.captured
    if runner is None or captured is None:
        return []
    found = [tensor.untyped_storage() for _, tensor in capture.live_tensors(runner, captured)]
    here = {storage.data_ptr() for storage in found}
    lost = [
        name
        for name, row in captured.tensors.items()
        if row.resident and row.storage_ptr and row.storage_ptr not in here
    ]
    if lost:
        raise LookupError(f"tensor {lost[0]} is not where the map says")
    return found


def publish_entry(slot: str, engine: str, entry: Mapping[str, Any]) -> None:
    """Publish the engine's part of the slot's transport document.  Raises OSError.

    Not where the slot was left meanwhile: who comes too late writes nothing.
    """
    with _lock:
        tracked = _places.get(slot)
        if tracked is None or not tracked.slot.is_ours():
            return
        entries = _entries.setdefault(slot, {})
        entries[engine] = entry
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
            "engines": entries,
        }
        path = tracked.slot.path(files.TRANSPORT)
        publish.write_whole(path, publish.encode(document), mode=0o600)
