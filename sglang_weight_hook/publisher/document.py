"""From a capture to the JSON documents.  No files, no torch: plain data in, plain data out.

The formats are described for their readers in ``docs/format.md``.  Sizes and addresses are
in bytes, times in seconds since the epoch, ``shape``, ``stride`` and ``storage_offset`` in
elements.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Optional

from ..layout.documents import LORA, SCHEMA, SCHEMA_VERSION, STATE_SCHEMA
from ..layout.geometry import Region, merge
from .capture import Capture

# State files stay under 2 KB, so a message of SGLang's is cut, and so is a list of names.
MESSAGE_LIMIT = 200
NAME_LIMIT = 72
NAMES_LIMIT, NAMES_LENGTH = 5, 42
SUBSCRIBERS_LIMIT, SUBSCRIBER_LIMIT = 3, 62
STATE_LIMIT = 2048  # bytes

# --- the layout document ------------------------------------------------------------------


def regions_of(captured: Capture) -> list[Region]:
    """Weight memory as maximal spans.  Without CUDA a tensor's storage is its allocation."""
    spans = []
    known = captured.allocations
    for name, row in captured.tensors.items():
        _, ptr, _, span, _, _, _, _, _, storage, size, resident = row
        if not resident or not ptr:
            continue
        # The allocations under a tensor's storage; a tensor over several has a span in each.
        key = (storage, size)
        for allocation in known.get(key) or (key,):
            base, length = allocation
            start = ptr if ptr > base else base
            end = ptr + span
            spans.append((start, end if end < base + length else base + length, allocation, name))
    return merge(spans)


def tensors(captured: Capture, checksums: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The ``tensors`` object: every tensor under its canonical name."""
    result: dict[str, dict[str, Any]] = {}
    aliases = captured.aliases
    none: list[str] = []
    for name, row in captured.tensors.items():
        # Unpacked at once: a field at a time costs more than all the rest here.
        kind, ptr, size, span, device, dtype, shape, stride, offset, storage, length, here = row
        result[name] = {
            "ptr": ptr,
            "size": size,
            "span": span,
            "device": device,
            "dtype": dtype,
            "shape": shape,
            "stride": stride,
            "storage_offset": offset,
            "storage_ptr": storage,
            "storage_size": length,
            "kind": kind,
            "resident": here,
            "aliases": aliases.get(name, none),
        }
    for name in checksums.keys() & result.keys():
        result[name]["checksum"] = checksums[name]
    for name in captured.volatile:
        result[name]["volatile"] = True
    return result


class Standing(NamedTuple):
    """What the recorder knows of a slot beyond the capture, for both documents."""

    instance: str  # new for each runner that is published
    state: str
    layout_generation: int
    content_generation: int
    physical_epoch: int
    kv_physical_epoch: int
    residency: Mapping[str, str]  # memory saver tag -> "resident" or "released"
    checked_at: Optional[float]  # when map and memory were last found equal

    def fields(self) -> dict[str, Any]:
        return {**self._asdict(), "residency": dict(self.residency)}


def layout(
    captured: Capture,
    regions: list[Region],
    standing: Standing,
    identity: Mapping[str, Any],
    event: Mapping[str, Any],
    memory: Mapping[str, Any],
    validation: Mapping[str, Any],
    checksums: Optional[Mapping[str, Any]],
    now: float,
) -> dict[str, Any]:
    """``weight_layout_{slot}.json``.

    ``checksums``: ``algorithm``, ``content_generation``, ``seconds`` and ``by_name``, or None
    where they were not asked for.
    """
    by_name = checksums["by_name"] if checksums else {}
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        **standing.fields(),
        "updated_at": now,
        "identity": dict(identity),
        "event": dict(event),
        "totals": totals(captured),
        "memory": {**memory, "kv_cache": captured.kv_cache},
        "validation": dict(validation),
        "checksums": {key: checksums[key] for key in checksums if key != "by_name"}
        if checksums
        else None,
        "regions": [_region(captured, region) for region in regions],
        "tensors": tensors(captured, by_name),
    }


def _region(captured: Capture, region: Region) -> dict[str, Any]:
    first = captured.tensors[region.names[0]]
    base, size = region.allocation
    known = (first.storage_ptr, first.storage_size) in captured.allocations
    export, rdma_capable = captured.exports.get(base, captured.export_otherwise)
    return {
        "ptr": region.start,
        "size": region.end - region.start,
        "device": first.device,
        "allocation_ptr": base,
        "allocation_size": size,
        "allocation_source": "driver" if known else "storage",
        "allocation_kind": captured.allocation_kinds.get(base) if known else None,
        "export": export,
        "rdma_capable": rdma_capable,
        "tensors": region.names,
    }


def invalidated(
    standing: Standing,
    identity: Mapping[str, Any],
    problem: str,
    event: Mapping[str, Any],
    now: float,
) -> dict[str, Any]:
    """A layout document without a single address: where the weights are is not known."""
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        **standing.fields(),
        "updated_at": now,
        "identity": dict(identity),
        "event": dict(event),
        "totals": {},
        "memory": {},
        "validation": {"problem": problem},
        "checksums": None,
        "regions": [],
        "tensors": {},
    }


def totals(captured: Capture) -> dict[str, dict[str, int]]:
    """Bytes per device; ``storage_bytes`` counts a storage once however many tensors share it."""
    result: dict[str, dict[str, int]] = {}
    storages: dict[str, dict[int, int]] = {}
    for row in captured.tensors.values():
        device = result.get(row.device)
        if device is None:
            device = {"tensors": 0, "tensor_bytes": 0, "storage_bytes": 0}
            result[row.device] = device
        device["tensors"] += 1
        device["tensor_bytes"] += row.size
        if row.resident and row.storage_ptr:
            sizes = storages.setdefault(row.device, {})
            # Storages may begin at one address: a slice of a storage is a storage.
            sizes[row.storage_ptr] = max(sizes.get(row.storage_ptr, 0), row.storage_size)
    for name, sizes in storages.items():
        result[name]["storage_bytes"] = sum(sizes.values())
    return result


class Storages(NamedTuple):
    """The storages behind a slot: address -> bytes."""

    weights: dict[int, int]
    lora: dict[int, int]
    kv_cache: dict[int, int]

    def all(self) -> dict[int, int]:
        return {**self.kv_cache, **self.lora, **self.weights}


def storages_of(captured: Capture) -> Storages:
    """Every storage once, under the first of weights, LoRA and KV cache that uses it."""
    found = Storages({}, {}, {})
    for row in captured.tensors.values():
        if row.resident and row.storage_ptr:
            kind = found.lora if row.kind == LORA else found.weights
            kind[row.storage_ptr] = max(kind.get(row.storage_ptr, 0), row.storage_size)
    for start in found.weights:
        found.lora.pop(start, None)
    for entry in captured.kv_cache:
        start = entry["storage_ptr"]
        if start not in found.weights and start not in found.lora:
            found.kv_cache[start] = entry["storage_size"]
    return found


def validation(
    captured: Capture,
    named_parameters: Optional[int],
    allocator: Optional[Mapping[str, int]],
) -> dict[str, Any]:
    """Names the model holds against tensors published; what has no row, and why.

    ``named_parameters``: torch's own count, where it was asked for.  ``allocator``: what the
    caching allocator has live against what is explained (`memory.reconcile`).
    """
    kinds: dict[str, int] = {}
    not_resident = []
    for name, row in captured.tensors.items():
        kinds[row.kind] = kinds.get(row.kind, 0) + 1
        if not row.resident:
            not_resident.append(name)
    return {
        "expected": dict(captured.expected),
        "captured": kinds,
        "aliases": sum(len(names) for names in captured.aliases.values()),
        "named_parameters": named_parameters,
        "not_resident": not_resident,
        "left_out": dict(captured.left_out),
        "allocator": None if allocator is None else dict(allocator),
    }


# --- what changed -------------------------------------------------------------------------


class Changes(NamedTuple):
    moved: int  # any address, size, shape or stride changed
    added: int
    removed: int
    names: tuple[str, ...]  # the first few of them, in that order


def changes(before: Optional[Capture], after: Capture) -> Changes:
    """How many names moved, came and went."""
    if before is None:
        return Changes(0, len(after.tensors), 0, ())
    old, new = before.tensors, after.tensors
    moved = [name for name, row in new.items() if name in old and old[name] != row]
    added = [name for name in new if name not in old]
    removed = [name for name in old if name not in new]
    return Changes(
        len(moved), len(added), len(removed), tuple([*moved, *added, *removed][:NAMES_LIMIT])
    )


def same_layout(before: Optional[Capture], after: Capture) -> bool:
    """Whether no address, size or name changed, aliases included."""
    return before is not None and (
        before.tensors == after.tensors
        and before.aliases == after.aliases
        and before.allocations == after.allocations
    )


# --- the state document -------------------------------------------------------------------


def state(
    standing: Standing,
    event: Mapping[str, Any],
    process: Mapping[str, Any],
    slot: str,
    lock: str,
    missing: list[str],
    problem: Optional[str],
    control: Optional[str],
    now: float,
    subscribers: Optional[Mapping[str, Optional[str]]] = None,
) -> dict[str, Any]:
    """``weight_state_{slot}.json``, under 2 KB whatever SGLang's message or names are."""
    made = {
        "schema": STATE_SCHEMA,
        "schema_version": SCHEMA_VERSION,
        **standing.fields(),
        "event": dict(event),
        "pid": process["pid"],
        "process_start_ticks": process["process_start_ticks"],
        "boot_id": process["boot_id"],
        "hostname": _short(process["hostname"], NAME_LIMIT),
        "slot": _short(slot, 2 * NAME_LIMIT),
        "lock": _short(lock, NAME_LIMIT),
        "missing": [_short(text, NAME_LIMIT) for text in missing[:5]],
        "missing_count": len(missing),
        "problem": _short(problem),
        "control": control,
        "updated_at": now,
    }
    if subscribers is not None:
        shown = list(subscribers.items())[:SUBSCRIBERS_LIMIT]
        told = {_tail(name, NAMES_LENGTH): _short(text, SUBSCRIBER_LIMIT) for name, text in shown}
        made["subscribers"] = told
        while made["missing"] and len(json.dumps(made, indent=2)) >= STATE_LIMIT:
            made["missing"].pop()  # how many there are is said beside them
    return made


def event(
    kind: str,
    success: Optional[bool],
    message: Optional[str],
    started_at: float,
    finished_at: Optional[float],
    counts: Optional[Changes],
    calls: int,
    nested: Optional[Mapping[str, int]] = None,
    capture_seconds: Optional[float] = None,
    answered: Optional[bool] = None,
    names: Iterable[str] = (),
) -> dict[str, Any]:
    """One event, for both documents.  ``success`` is null while it lasts.

    ``calls`` counts SGLang's calls inside it; ``nested`` those of other kinds, by kind.
    ``names``: tensors that an unannounced change has moved.
    """
    shown = list((nested or {}).items())[:3]
    described: dict[str, Any] = {
        "kind": _short(kind, NAME_LIMIT),
        "success": success,
        "message": _short(message),
        "started_at": started_at,
        "finished_at": finished_at,
        "calls": calls,
        "nested": {_short(name, NAME_LIMIT) or "": count for name, count in shown},
        "capture_seconds": capture_seconds,
        "answered": answered,
    }
    if counts is not None:
        described.update(moved=counts.moved, added=counts.added, removed=counts.removed)
    if names:
        described["tensors"] = [_tail(name, NAMES_LENGTH) for name in names]
    return described


def event_line(
    standing: Standing, event: Mapping[str, Any], process: Mapping[str, Any], now: float
) -> dict[str, Any]:
    """A line of ``weight_events_{slot}.jsonl``: the event, and how it left the slot."""
    return {
        **event,
        "state": standing.state,
        "instance": standing.instance,
        "layout_generation": standing.layout_generation,
        "content_generation": standing.content_generation,
        "physical_epoch": standing.physical_epoch,
        "pid": process["pid"],
        "process_start_ticks": process["process_start_ticks"],
        "updated_at": now,
    }


def _tail(name: str, limit: int) -> str:
    """The end of a name, which says more than its beginning, within ``limit`` bytes of JSON."""
    kept = name[-limit:]
    while len(json.dumps(kept)) > limit:
        kept = kept[len(kept) // 8 + 1 :]
    return kept if kept == name else "..." + kept


def _short(text: Optional[str], limit: int = MESSAGE_LIMIT) -> Optional[str]:
    """Cut to ``limit`` bytes of JSON, whatever escapes the text needs."""
    # Plain text, of which at most every character is one that JSON puts a backslash before.
    if text is None or (2 * len(text) + 2 <= limit and text.isascii() and text.isprintable()):
        return text
    cut = text[:limit]
    while len(json.dumps(cut)) > limit:
        cut = cut[: len(cut) * 3 // 4]
    return cut if cut == text else cut + "..."
