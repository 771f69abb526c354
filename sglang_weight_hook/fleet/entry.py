"""What the agent says of one slot: the object that `/slots` lists and `/events` sends."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple, Optional

from ..layout import files
from ..reader import HookError, Slot
from ..reader.files import MAX_DOCUMENT_BYTES, open_regular
from ..reader.layout_start import start_of_layout
from ..reader.ownership import process_of, same_instance

_PIECE = 1024 * 1024  # bytes read at a time, so that a layout is never in memory as a whole

FileId = tuple[int, int, int, int]  # device, inode, size, time of the last change


class Layout(NamedTuple):
    """A layout file as it is now: which one, its digest, and what it says ahead of its tensors."""

    file: FileId
    etag: str
    start: Mapping[str, Any]

    @property
    def size(self) -> int:
        return self.file[2]


class Entry(NamedTuple):
    """A slot as it was seen last."""

    slot: Slot
    layout: Optional[Layout]
    content: Mapping[str, Any]  # as `/slots` lists it
    encoded: bytes  # the same as JSON

    @property
    def id(self) -> str:
        return str(self.content["id"])


def entry_of(
    slot: Slot,
    id: str,
    state: Optional[Mapping[str, Any]],
    problem: Optional[str],
    before: Optional[Entry],
) -> Entry:
    """The entry of ``slot``, whose last known state is ``state``.

    ``before``: the entry before this one, of which an unchanged layout is taken over.
    """
    alive, certain, why = False, False, "its owner could not be asked about"
    layout = None
    try:
        alive, certain, why = slot.liveness()
        layout = layout_of(slot, before.layout if before else None)
    except HookError as error:
        problem = problem or str(error)
    if layout is not None and state is not None and not _is_of_one_owner(state, layout.start):
        layout = None  # a successor's state with its predecessor's layout
    content = {
        "id": id,
        "slot": slot.name,
        "directory": slot.directory,
        "owner_alive": alive,
        "certain": certain,
        "why": why,
        "problem": problem,
        "state": None if state is None else dict(state),
        "summary": {} if layout is None else summary_of(layout.start),
        "layout": None if layout is None else {"etag": layout.etag, "size": layout.size},
    }
    return Entry(slot, layout, content, encoded(content))


def encoded(content: Any) -> bytes:
    """As JSON, in which there is no NaN, whatever Python's reads: null instead.

    >>> encoded({"a": [float("nan"), 1]})
    b'{"a":[null,1]}'
    """
    try:
        text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    except ValueError:
        content = json.loads(json.dumps(content), parse_constant=lambda _: None)
        text = json.dumps(content, separators=(",", ":"))
    return text.encode()


def summary_of(start: Mapping[str, Any]) -> dict[str, Any]:
    """Identity of the runner and sums of its memory, from the start of its layout.

    >>> summary_of({"identity": {"role": "target"}, "memory": {"weights_bytes": 8, "kv_cache": []}})
    {'role': 'target', 'weights_bytes': 8}
    """
    found: dict[str, Any] = {}
    for part in ("identity", "memory"):
        fields = start.get(part)
        if isinstance(fields, dict):
            found.update(
                (name, value)
                for name, value in fields.items()
                if value is None or isinstance(value, (str, int, float, bool))
            )
    return found


def layout_of(slot: Slot, known: Optional[Layout]) -> Optional[Layout]:
    """The slot's layout; None where there is none.  Raises HookError.

    ``known`` if it is still that file, for a layout of a large model takes a while to sum up.
    """
    descriptor = open_regular(slot.path(files.LAYOUT), limit=MAX_DOCUMENT_BYTES)
    if descriptor is None:
        return None
    with os.fdopen(descriptor, "rb") as file:
        found = file_id(descriptor)
        if known is not None and known.file == found:
            return known
        etag = etag_of_file(file)
    return Layout(found, etag, start_of_layout(slot))


def file_id(descriptor: int) -> FileId:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def etag_of_file(file: Any) -> str:
    digest = hashlib.sha256()
    while piece := file.read(_PIECE):
        digest.update(piece)
    return "sha256-" + digest.hexdigest()


def etag_of(data: bytes) -> str:
    return "sha256-" + hashlib.sha256(data).hexdigest()


def checked_at(entry: Entry) -> Optional[float]:
    """When map and memory were last found equal; the header has it, no event tells it."""
    state = entry.content["state"] or {}
    with contextlib.suppress(HookError):
        header = entry.slot.header()
        if (header.pid, header.instance) == (state.get("pid"), state.get("instance")):
            return header.checked_at
    value = state.get("checked_at")
    return float(value) if isinstance(value, (int, float)) else None


def _is_of_one_owner(state: Mapping[str, Any], layout: Mapping[str, Any]) -> bool:
    identity = layout.get("identity")
    return (
        isinstance(identity, dict)
        and process_of(dict(state)) == process_of(identity)
        and same_instance(state, layout)
    )
