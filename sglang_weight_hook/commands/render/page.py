"""Draws layout documents as one HTML page.

`write_html` packs what the page needs into the page itself: ``page.html`` and the library that
lays the modules out (d3-hierarchy, ISC licence), both beside this file.  Nothing is fetched from
anywhere, and the page's own policy forbids it; the standard library is all that is needed here.

Documents come from files, so nothing in them is trusted to be there or to be harmless: an
absent field is shown as unknown, and every text travels as JSON data, never as markup.

Longer than 500 lines because what is packed here is unpacked in one place, too.
"""

from __future__ import annotations

import contextlib
import errno
import html
import json
import os
import re
import stat
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, Union

from ...reader.diff import diff

_PAGE = "page.html"
# As npm's d3-hierarchy 3.1.2 has them; ``tools/fetch_page_library.py`` checks that.
_LIBRARY = "page_d3_hierarchy.js"
_LICENCE = "page_d3_hierarchy.license.txt"

# Of each slot; a log may hold tens of thousands.
_EVENTS = 200

# Of a tensor with a before; the page colours by it.  0 is unchanged.
MOVED, RESIZED, ADDED = 1, 2, 3

_MEMORY = (
    "weights_bytes",
    "kv_cache_bytes",
    "lora_bytes",
    "siblings_bytes",
    "other_live_bytes",
    "reserved_free_bytes",
    "other_bytes",
    "unbacked_bytes",
    "device_free_bytes",
    "device_total_bytes",
    "shared_bytes",
)
_IDENTITY = (
    "model_path",
    "model_class",
    "quantization",
    "hostname",
    "pid",
    "gpu_id",
    "gpu_uuid",
    "pci_bus_id",
    "cuda_visible_devices",
    "device",
    "role",
    "draft_index",
    "tp_rank",
    "tp_size",
    "pp_rank",
    "pp_size",
    "dp_rank",
    "dp_size",
    "ep_rank",
    "ep_size",
    "node_rank",
    "sglang_version",
    "torch_version",
    "hook_version",
)


def write_html(
    documents: Sequence[Mapping[str, Any]],
    output: Union[str, os.PathLike[str]],
    before: Optional[Sequence[Mapping[str, Any]]] = None,
    alive: Optional[Sequence[Optional[bool]]] = None,
    events: Optional[Sequence[Sequence[Mapping[str, Any]]]] = None,
) -> None:
    """Write layout documents (the ``raw`` of a `Document`) as one self-contained HTML file.

    ``documents``: one a slot, shown side by side.  ``before``: earlier documents of the same
    slots; the page then shows which tensors were moved, added and removed.  ``alive``: of each
    document, whether its owner lives; None for a saved copy, which has none.  ``events``: of each
    document, the lines of its slot's event log, the oldest first.
    Through a temporary name: ``output`` is replaced whole or not at all.  A link, a device or a
    folder in its place is refused.  Raises OSError when it can't be written.
    """
    text = page(documents, before, alive, events)
    folder, name = os.path.split(os.path.abspath(output))
    if os.path.lexists(output) and not stat.S_ISREG(os.lstat(output).st_mode):
        raise OSError(errno.EEXIST, "a link, a device or a folder is there", os.fspath(output))
    # Under another name each time, by O_EXCL and O_NOFOLLOW (tempfile), so nothing can be planted.
    try:
        descriptor, partial = tempfile.mkstemp(prefix=f".{name}.", dir=folder)
    except OSError as error:  # of a name that nobody has given
        raise OSError(error.errno, error.strerror, os.fspath(output)) from error
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            umask = os.umask(0)
            os.umask(umask)
            os.fchmod(file.fileno(), 0o666 & ~umask)
            file.write(text)
        os.replace(partial, output)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


def page(
    documents: Sequence[Mapping[str, Any]],
    before: Optional[Sequence[Mapping[str, Any]]] = None,
    alive: Optional[Sequence[Optional[bool]]] = None,
    events: Optional[Sequence[Sequence[Mapping[str, Any]]]] = None,
) -> str:
    """The whole page; see `write_html`."""
    earlier = {} if before is None else _by_slot(before)
    now = _by_slot(documents)
    slots = [_slot(label, document, earlier.get(label)) for label, document in now.items()]
    for index, slot in enumerate(slots):
        slot["alive"] = None if alive is None else alive[index]
        slot["events"] = [] if events is None else _events(events[index])
    slots.sort(key=lambda slot: _order(str(slot["label"]), slot["identity"]["role"]))
    _share_names(slots)
    removed = [label for label in earlier if label not in now]
    title = "Weights of " + (_model_of(documents) or "SGLang")
    folder = Path(__file__).parent
    template = (folder / _PAGE).read_text(encoding="utf-8")
    # Its first line is a comment with an address; the page names author and licence elsewhere.
    library = (folder / _LIBRARY).read_text(encoding="utf-8").partition("\n")[2]
    data = {"title": title, "comparing": before is not None, "removed": removed, "slots": slots}
    parts = {
        "TITLE": _text(title),
        "SUMMARY": _summary(slots),
        "DATA": script_json(data),
        "LIBRARY": library,
        "LICENCE": _text((folder / _LICENCE).read_text(encoding="utf-8")),
    }
    # In one go, so that nothing in a document is taken for a place to fill in.
    return re.sub("@(TITLE|SUMMARY|DATA|LIBRARY|LICENCE)@", lambda at: parts[at.group(1)], template)


def script_json(value: Any) -> str:
    """JSON that can stand inside a ``<script>`` element, whatever its texts are.

    >>> script_json("</script><!--")
    '"\\\\u003c/script\\\\u003e\\\\u003c!--"'
    """
    data = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    return data


def _text(value: Any) -> str:
    # Lone surrogates (undecodable bytes in a name) have no place in an HTML file.
    return html.escape(str(value).encode("utf-8", "replace").decode("utf-8"))


# --- which is which -----------------------------------------------------------------------


def _by_slot(documents: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Documents by the name under which they were published, as far as they tell.

    A layout does not name its slot: it follows from the GPU and the role, and where two have
    the same (nodes of one cluster, servers in one directory) the host or the process tells them
    apart.
    """
    hosts = {_of(document, "identity").get("hostname") for document in documents}
    found: dict[str, Mapping[str, Any]] = {}
    for document in documents:
        identity = _of(document, "identity")
        name = str(identity.get("gpu_id", "?"))
        if identity.get("role") == "draft":
            name += f"_draft{identity.get('draft_index') or ''}"
        if len(hosts) > 1:
            name = f"{identity.get('hostname')}:{name}"
        name = str(document.get("slot", name))
        if name in found:
            name = f"{name} (pid {identity.get('pid')})"
        while name in found:
            name += "'"
        found[name] = document
    return found


def _of(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = document.get(name)
    return part if isinstance(part, Mapping) else {}


def _model_of(documents: Iterable[Mapping[str, Any]]) -> str:
    names = []
    for document in documents:
        identity = _of(document, "identity")
        path = identity.get("model_path") or identity.get("model_class")
        name = str(path).rstrip("/").rpartition("/")[2] if path else ""
        if name and name not in names:
            names.append(name)
    return ", ".join(names[:3])


def _order(label: str, role: Any) -> tuple[Any, ...]:
    """Slots by number, not by spelling; drafts after all targets.

    >>> labels = ["10", "2", "node10:1", "node9:1"]
    >>> sorted(labels, key=lambda label: _order(label, "target"))
    ['2', '10', 'node9:1', 'node10:1']
    """
    parts = re.split("([0-9]+)", label)
    # Odd places are digits.  Very long ones are no number of ours, and int() refuses them.
    numbers = [(int(part[:18]), len(part)) if at % 2 else part for at, part in enumerate(parts)]
    return (role == "draft", *numbers)


def _share_names(slots: Sequence[dict[str, Any]]) -> None:
    """The ranks of one model have the same names: kept once, and a number elsewhere."""
    known: dict[tuple[Any, ...], int] = {}
    for index, slot in enumerate(slots):
        first = known.setdefault(tuple(slot["names"]), index)
        if first != index:
            slot["names"] = first


def _events(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The last ones, and of each what the timeline shows."""
    found = []
    for line in lines[-_EVENTS:]:
        event = {name: line.get(name) for name in _EVENT if line.get(name) is not None}
        message = event.get("message")
        if isinstance(message, str):
            event["message"] = message[:500]
        if isinstance(line.get("tensors"), list):
            event["tensors"] = [str(name)[:300] for name in line["tensors"][:5]]
        found.append(event)
    return found


_EVENT = (
    "kind",
    "success",
    "message",
    "started_at",
    "finished_at",
    "updated_at",
    "moved",
    "added",
    "removed",
    "calls",
    "state",
    "instance",
    "layout_generation",
    "content_generation",
)


# --- one slot, packed ---------------------------------------------------------------------


class _Places:
    """Addresses as offsets from the first one of each device.

    JavaScript's numbers hold integers up to 2**53; addresses may be larger, offsets within one
    device's address range are not.
    """

    def __init__(self, spots: Iterable[tuple[Any, Any]]) -> None:
        self.bases: dict[str, int] = {}
        for device, ptr in spots:
            if ptr:
                self.bases[device] = min(self.bases.get(device, ptr), ptr)
        self.devices = list(self.bases)
        self._index = {device: index for index, device in enumerate(self.devices)}

    def place(self, device: Any, ptr: Any) -> tuple[int, Optional[int]]:
        if not ptr or device not in self._index:
            return self._index.get(device, -1), None
        return self._index[device], ptr - self.bases[device]

    def packed(self) -> list[list[str]]:
        return [[device, hex(self.bases[device])] for device in self.devices]


class _Forms:
    """What many tensors have in common: device, dtype, shape, kind, size; each kept once."""

    def __init__(self, places: _Places) -> None:
        self.rows: list[list[Any]] = []
        self._index: dict[str, int] = {}
        self._places = places

    def index(self, tensor: Mapping[str, Any]) -> int:
        shape = tensor.get("shape")
        stride = tensor.get("stride")
        device = tensor.get("device")
        row = [
            self._places.place(device, None)[0],
            device,
            str(tensor.get("dtype", "?")).replace("torch.", "", 1),
            shape,
            tensor.get("kind"),
            tensor.get("size") or 0,
            tensor.get("span"),
            bool(tensor.get("resident", True)),
            None if stride == _contiguous(shape) else stride,
        ]
        key = json.dumps(row)
        if key not in self._index:
            self._index[key] = len(self.rows)
            self.rows.append(row)
        return self._index[key]


def _contiguous(shape: Any) -> Optional[list[int]]:
    if not isinstance(shape, list):
        return None
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step)
        step *= max(length, 1)
    return strides[::-1]


def _slot(
    label: str, document: Mapping[str, Any], earlier: Optional[Mapping[str, Any]]
) -> dict[str, Any]:
    sources = [document] if earlier is None else [document, earlier]
    places = _Places(
        (item.get("device"), item.get(field))
        for source in sources
        for item, field in _everything_with_an_address(source)
    )
    forms = _Forms(places)
    tensors = _of(document, "tensors")
    names = list(tensors)
    memory = _of(document, "memory")
    slot: dict[str, Any] = {
        "label": label,
        "identity": {name: _of(document, "identity").get(name) for name in _IDENTITY},
        "state": document.get("state"),
        "generations": [
            document.get(name)
            for name in ("layout_generation", "content_generation", "physical_epoch")
        ],
        "residency": dict(_of(document, "residency")),
        "updatedAt": document.get("updated_at"),
        "event": dict(_of(document, "event")),
        "validation": _validation(document),
        "memory": {name: memory.get(name) for name in _MEMORY},
        "sharedWith": memory.get("shared_with"),
        "places": places.packed(),
        "names": _front_coded(names),
        "forms": [forms.index(tensors[name]) for name in names],
        "gaps": _gaps(tensors.values(), places),
        "aliases": {
            index: tensors[name]["aliases"]
            for index, name in enumerate(names)
            if tensors[name].get("aliases")
        },
        "regions": _regions(document, places),
        "kv": _kv(document, places),
    }
    if earlier is not None:
        _compare(slot, document, earlier, places, forms)
    slot["formTable"] = forms.rows
    return slot


def _everything_with_an_address(
    document: Mapping[str, Any],
) -> Iterable[tuple[Mapping[str, Any], str]]:
    for tensor in _of(document, "tensors").values():
        yield tensor, "ptr"
    for region in document.get("regions") or ():
        yield region, "ptr"
        yield region, "allocation_ptr"
    for buffer in _of(document, "memory").get("kv_cache") or ():
        yield buffer, "ptr"


def _front_coded(names: Sequence[str]) -> list[Union[int, str]]:
    """``[length shared with the name before, remainder, ...]``: adjacent names differ little."""
    coded: list[Union[int, str]] = []
    last = ""
    for name in names:
        shared = _shared(last, name)
        coded += (shared, name[shared:])
        last = name
    return coded


def _shared(one: str, other: str) -> int:
    """Length of the common beginning."""
    for index, (left, right) in enumerate(zip(one, other)):
        if left != right:
            return index
    return min(len(one), len(other))


def _gaps(tensors: Iterable[Mapping[str, Any]], places: _Places) -> list[Optional[int]]:
    """Distance of each tensor from the end of the one before: zero, as a rule."""
    gaps: list[Optional[int]] = []
    ends: dict[int, int] = {}
    for tensor in tensors:
        device, offset = places.place(tensor.get("device"), tensor.get("ptr"))
        if offset is None:
            gaps.append(None)
            continue
        gaps.append(offset - ends.get(device, 0))
        ends[device] = offset + (tensor.get("size") or 0)
    return gaps


def _regions(document: Mapping[str, Any], places: _Places) -> dict[str, list[Any]]:
    """Like the tensors: distance from the end of the region before, and what many share.

    ``table``: ``[device, size, how far the allocation begins before it, the allocation's size,
    how it was allocated]``.
    """
    table: dict[tuple[Any, ...], int] = {}
    gaps, rows = [], []
    ends: dict[int, int] = {}
    for region in document.get("regions") or ():
        device, offset = places.place(region.get("device"), region.get("ptr"))
        if offset is None:
            continue
        _, allocation = places.place(region.get("device"), region.get("allocation_ptr"))
        size = region.get("size") or 0
        how = region.get("allocation_kind") or region.get("allocation_source")
        before = None if allocation is None else offset - allocation
        row = (device, size, before, region.get("allocation_size"), how)
        rows.append(table.setdefault(row, len(table)))
        gaps.append(offset - ends.get(device, 0))
        ends[device] = offset + size
    return {"gaps": gaps, "rows": rows, "table": [list(row) for row in table]}


def _kv(document: Mapping[str, Any], places: _Places) -> list[list[Any]]:
    rows = []
    for buffer in _of(document, "memory").get("kv_cache") or ():
        device, offset = places.place(buffer.get("device"), buffer.get("ptr"))
        if offset is not None:
            dtype = str(buffer.get("dtype", "?")).replace("torch.", "", 1)
            size = buffer.get("size") or 0
            rows.append([device, offset, size, buffer.get("name"), dtype, buffer.get("shape")])
    return rows


def _validation(document: Mapping[str, Any]) -> dict[str, Any]:
    found = _of(document, "validation")
    return {
        "problem": found.get("problem"),
        "aliases": found.get("aliases"),
        "notResident": len(found.get("not_resident") or ()),
        "leftOut": dict(list(_of(found, "left_out").items())[:50]),
        "leftOutCount": len(_of(found, "left_out")),
        "allocator": found.get("allocator"),
    }


def _compare(
    slot: dict[str, Any],
    document: Mapping[str, Any],
    earlier: Mapping[str, Any],
    places: _Places,
    forms: _Forms,
) -> None:
    found = diff(earlier, document)
    old = _of(earlier, "tensors")
    index = {name: position for position, name in enumerate(_of(document, "tensors"))}

    def was(name: str) -> list[Any]:
        return [forms.index(old[name]), places.place(old[name].get("device"), old[name]["ptr"])[1]]

    slot["changes"] = {
        index[name]: code
        for names, code in ((found.moved, MOVED), (found.resized, RESIZED), (found.added, ADDED))
        for name in names
    }
    slot["was"] = {index[name]: was(name) for name in (*found.moved, *found.resized)}
    slot["removed"] = [[name, *was(name)] for name in found.removed]
    slot["regionsBefore"] = _regions(earlier, places)
    slot["kvBefore"] = _kv(earlier, places)
    slot["memoryBefore"] = {name: _of(earlier, "memory").get(name) for name in _MEMORY}
    slot["generationsBefore"] = [
        earlier.get(name) for name in ("layout_generation", "content_generation", "physical_epoch")
    ]
    slot["diff"] = {
        "moved": len(found.moved),
        "resized": len(found.resized),
        "added": len(found.added),
        "removed": len(found.removed),
        "contentChanged": found.content_changed,
        "registerAgain": found.must_register_again,
        "otherPages": found.repaged,
        "otherProcess": found.other_process,
    }


def _summary(slots: Sequence[Mapping[str, Any]]) -> str:
    """What a browser without scripts shows."""
    rows = [
        f"<tr><td>{_text(slot['label'])}</td><td>{_text(slot['state'])}</td>"
        f"<td>{len(slot['forms'])}</td><td>{_text(slot['memory']['weights_bytes'])}</td></tr>"
        for slot in slots
    ]
    return (
        "<table><tr><th>slot</th><th>state</th><th>tensors</th><th>weights, bytes</th></tr>"
        + "".join(rows)
        + "</table>"
    )
