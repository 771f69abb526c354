"""Is what is published whole, consistent and true as far as the files themselves can tell?

Each check is a small function from documents to findings.  An ``error`` means: do not trust
these addresses.  A ``warning`` means: they hold, and there is something you should know.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Optional

from . import publish
from .document import GIB
from .geometry import touched_bytes
from .reader import CacheBuffer, Document, HookError, Region, Slot, Tensor

ERROR, WARNING = "error", "warning"

STATE_LIMIT = 2048  # bytes

# Of a check that finds many of a kind, this many are told.
_SHOWN = 5


class Finding(NamedTuple):
    slot: str
    level: str  # `ERROR` or `WARNING`
    check: str  # which check has found it: one word
    message: str


class Verdict(NamedTuple):
    """Everything found about one slot.  ``document`` is None where none could be read."""

    slot: str
    document: Optional[Document]
    findings: list[Finding]

    @property
    def good(self) -> bool:
        return not any(finding.level == ERROR for finding in self.findings)


Remark = tuple[str, str, str]  # level, check, message


def verify_slot(slot: Slot, timeout: float = 10.0) -> Verdict:
    """Check a slot: its documents, the prototype's files beside them, and its owner.

    Waits up to ``timeout`` seconds for an update under way.  Raises nothing.
    """
    remarks: list[Remark] = []
    document = None
    try:
        document, files = _read_everything(slot, timeout)
        remarks += _schema(document.state, "state")
        if not _has_errors(remarks):
            remarks += _state(document.state)
        found = verify_document(document)
        if not _has_errors(found):
            found += _generations(document)
            if document.state["state"] != "updating":
                found += _seed_files(document, files)
        remarks += found
        size = os.path.getsize(slot.path(publish.STATE))
        if size > STATE_LIMIT:
            remarks.append((ERROR, "state", f"the state document has {size} bytes, 2048 at most"))
    except (HookError, OSError) as error:
        remarks.append((ERROR, "readable", str(error)))
    remarks += _owner(slot)
    return Verdict(slot.name, document, [Finding(slot.name, *remark) for remark in remarks])


def verify_file(document: Document) -> Verdict:
    """Check a saved layout by itself (`reader.open_file`)."""
    name = document.slot.name
    return Verdict(name, document, [Finding(name, *found) for found in verify_document(document)])


def verify_document(document: Document) -> list[Remark]:
    """Check what one layout document says of itself."""
    remarks = list(_schema(document.raw, "layout"))
    if _has_errors(remarks):
        return remarks  # what follows relies on every field being what it should be
    try:
        tensors = list(document.iter_tensors())
        regions = list(document.iter_regions())
        cache = list(document.iter_kv_cache())
    except HookError as error:
        return [*remarks, (ERROR, "schema", str(error))]
    remarks += _limited("tensors", _tensors(tensors))
    remarks += _limited("overlaps", _overlaps(tensors, cache))
    remarks += _limited("regions", _regions(tensors, regions))
    remarks += _totals(document, tensors, cache)
    remarks += _completeness(document)
    return remarks


def _has_errors(remarks: list[Remark]) -> bool:
    return any(level == ERROR for level, _, _ in remarks)


# --- reading ------------------------------------------------------------------------------


def _read_everything(slot: Slot, timeout: float) -> tuple[Document, dict[str, Any]]:
    """All documents of one publication; of an update under way if that outlasts ``timeout``."""
    deadline = time.monotonic() + timeout
    while True:
        document = slot.read(timeout)
        files = {name: _load(slot.path(name)) for name in publish.DOCUMENTS[:4]}
        late = time.monotonic() >= deadline
        if slot.read_state() == document.state and (document.state["state"] != "updating" or late):
            return document, files
        if late:
            raise HookError(
                f"slot {slot.name} is being published again and again; try once more, or with "
                f"more than {timeout:g} s"
            )
        time.sleep(0.02)


class _Unreadable(NamedTuple):
    reason: str


def _load(path: str) -> Any:
    """A JSON file; None where there is none."""
    try:
        with open(path, "rb") as file:
            return json.loads(file.read())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        return _Unreadable(str(error))


# --- owner, state, generations ------------------------------------------------------------


def _owner(slot: Slot) -> Iterator[Remark]:
    try:
        if slot.owner_alive():
            return
        pid = slot.read_state()["pid"]
    except HookError:
        return  # no state: said already
    yield (
        ERROR,
        "owner",
        f"the process that published it (pid {pid}) is gone: the addresses are nobody's; start "
        f"the server again",
    )


def _state(state: Mapping[str, Any]) -> Iterator[Remark]:
    name, event = state["state"], state.get("event")
    kind = event.get("kind") if isinstance(event, dict) else None
    message = event.get("message") if isinstance(event, dict) else None
    if state.get("problem"):
        yield ERROR, "problem", f"the hook could not publish: {state['problem']}"
    if name == "failed" and not state.get("problem"):
        yield (
            WARNING,
            "state",
            f"{kind} failed ({message}): the addresses hold, contents may be half written; "
            f"update again",
        )
    elif name == "loading":
        yield WARNING, "state", "the engine is still being built: addresses may move once more"
    elif name == "updating":
        yield WARNING, "state", f"{kind} is under way: these are the addresses from before it"
    elif name == "released":
        yield WARNING, "state", "the weights' memory is released: touching the addresses faults"
    for missing in state.get("missing") or ():
        yield WARNING, "missing", f"this SGLang lacks {missing}: such changes are not seen"
    lock = state.get("lock")
    if isinstance(lock, str) and lock not in ("held", "not held"):
        yield (
            WARNING,
            "lock",
            f"the last event went on without the lock ({lock}): a reader held it too long",
        )


def _generations(document: Document) -> Iterator[Remark]:
    layout, state = document.raw["content_generation"], document.state["content_generation"]
    if layout > state:
        yield (
            ERROR,
            "generations",
            f"the layout has content generation {layout}, the state, which is never behind, "
            f"{state}",
        )
    checksums = document.raw.get("checksums")
    if isinstance(checksums, dict) and checksums.get("content_generation") != state:
        yield (
            WARNING,
            "checksums",
            f"the checksums are those of content generation "
            f"{checksums.get('content_generation')}, the weights have {state}",
        )


# --- tensors and regions ------------------------------------------------------------------


def _tensors(tensors: Iterable[Tensor]) -> Iterator[Remark]:
    for tensor in tensors:
        elements = math.prod(tensor.shape)
        if elements and (not tensor.size or tensor.size % elements):
            yield ERROR, "tensors", f"{tensor.name}: {tensor.size} bytes are no {elements} elements"
            continue
        touched = touched_bytes(tensor.shape, tensor.stride, tensor.itemsize)
        if tensor.span != touched:
            yield (
                ERROR,
                "tensors",
                f"{tensor.name}: shape and stride touch {touched} bytes, the span is {tensor.span}",
            )
        if not elements or not tensor.ptr:
            continue
        expected = tensor.storage_ptr + tensor.storage_offset * tensor.itemsize
        if tensor.ptr != expected:
            yield (
                ERROR,
                "tensors",
                f"{tensor.name}: lies at {tensor.ptr:#x}, storage and offset say {expected:#x}",
            )
        if tensor.end > tensor.storage_ptr + tensor.storage_size:
            yield ERROR, "tensors", f"{tensor.name}: reaches beyond the end of its storage"


def _overlaps(tensors: Iterable[Tensor], cache: Iterable[CacheBuffer]) -> Iterator[Remark]:
    """Storages that share bytes.  Views of one storage may; two storages cannot."""
    found: dict[tuple[str, int, int], tuple[bool, str]] = {}
    for tensor in tensors:
        if tensor.storage_ptr and tensor.storage_size:
            key = (tensor.device, tensor.storage_ptr, tensor.storage_size)
            found.setdefault(key, (False, tensor.name))
    for buffer in cache:
        if buffer.storage_ptr and buffer.storage_size:
            key = (buffer.device, buffer.storage_ptr, buffer.storage_size)
            found.setdefault(key, (True, f"KV cache {buffer.name}"))
    furthest: Optional[tuple[str, int, int]] = None
    for key in sorted(found, key=lambda key: (key[0], key[1], -key[2])):
        device, start, size = key
        if furthest is None or furthest[0] != device or start >= furthest[1] + furthest[2]:
            furthest = key
            continue
        (is_cache, name), (outer_is_cache, outer) = found[key], found[furthest]
        inside = start + size <= furthest[1] + furthest[2]
        if inside and is_cache == outer_is_cache:
            # E.g. a tensor made from a pointer into a larger one: odd, and possible.
            yield WARNING, "overlaps", f"the storage of {name} lies inside that of {outer}"
        else:
            yield ERROR, "overlaps", f"the storages of {outer} and {name} overlap at {start:#x}"
        if not inside:
            furthest = key


def _regions(tensors: list[Tensor], regions: list[Region]) -> Iterator[Remark]:
    names = {tensor.name for tensor in tensors}
    for region in regions:
        what = f"the region at {region.ptr:#x}"
        allocation_end = region.allocation_ptr + region.allocation_size
        if not region.size:
            yield ERROR, "regions", f"{what} is empty"
        if region.ptr < region.allocation_ptr or region.end > allocation_end:
            yield ERROR, "regions", f"{what} reaches beyond its allocation"
        for name in region.tensors:
            if name not in names:
                yield ERROR, "regions", f"{what} names {name!r}, which is no tensor here"
    for one, other in zip(regions, regions[1:]):
        if other.ptr < one.end:
            yield ERROR, "regions", f"the regions at {one.ptr:#x} and {other.ptr:#x} overlap"
    resident = [tensor for tensor in tensors if tensor.resident and tensor.ptr]
    wanted = _union((tensor.ptr, tensor.end) for tensor in resident)
    covered = _union((region.ptr, region.end) for region in regions)
    if wanted != covered:
        both = sorted(set(wanted) ^ set(covered))
        yield (
            ERROR,
            "regions",
            f"regions and tensors do not cover the same bytes, first at {both[0][0]:#x}",
        )


def _union(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans merged where they touch or overlap."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if start >= end:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


# --- sums ---------------------------------------------------------------------------------


def _totals(
    document: Document, tensors: list[Tensor], cache: list[CacheBuffer]
) -> Iterator[Remark]:
    devices: dict[str, dict[str, int]] = {}
    storages: dict[str, dict[int, int]] = {}
    weights: dict[int, int] = {}
    lora: dict[int, int] = {}
    for tensor in tensors:
        sums = devices.setdefault(
            tensor.device, {"tensors": 0, "tensor_bytes": 0, "storage_bytes": 0}
        )
        sums["tensors"] += 1
        sums["tensor_bytes"] += tensor.size
        if tensor.resident and tensor.storage_ptr:
            storages.setdefault(tensor.device, {})[tensor.storage_ptr] = tensor.storage_size
            (lora if tensor.kind == "lora" else weights)[tensor.storage_ptr] = tensor.storage_size
    for device, found in storages.items():
        devices[device]["storage_bytes"] = sum(found.values())
    if document.raw.get("totals") != devices:
        yield ERROR, "totals", "totals are not the sums over the tensors"

    memory = document.memory
    if not memory:
        return
    if "lora_bytes" not in memory:
        weights.update(lora)
    lora = {start: size for start, size in lora.items() if start not in weights}
    kv_cache = {
        buffer.storage_ptr: buffer.storage_size
        for buffer in cache
        if buffer.storage_ptr not in weights and buffer.storage_ptr not in lora
    }
    for field, found in (
        ("weights_bytes", weights),
        ("lora_bytes", lora),
        ("kv_cache_bytes", kv_cache),
    ):
        said, counted = memory.get(field), sum(found.values())
        if said is not None and said != counted:
            yield ERROR, "totals", f"memory.{field} is {said}, the storages add up to {counted}"
    parts = [memory.get(field) for field in _MEMORY_PARTS]
    total = memory.get("device_total_bytes")
    if total is not None and None not in parts:
        parts_sum = sum(part for part in parts if part) - (memory.get("unbacked_bytes") or 0)
        if parts_sum != total:
            yield (
                ERROR,
                "totals",
                f"the parts of memory add up to {parts_sum}, the device has {total}",
            )


_MEMORY_PARTS = (
    "weights_bytes",
    "lora_bytes",
    "kv_cache_bytes",
    "siblings_bytes",
    "other_live_bytes",
    "reserved_free_bytes",
    "other_bytes",
    "device_free_bytes",
)


def _completeness(document: Document) -> Iterator[Remark]:
    validation = document.raw.get("validation")
    if not isinstance(validation, dict):
        return
    if validation.get("problem"):
        yield ERROR, "problem", f"the map was withdrawn: {validation['problem']}"
    left_out = validation.get("left_out")
    if isinstance(left_out, dict):
        for name, reason in list(left_out.items())[:_SHOWN]:
            yield WARNING, "left_out", f"{name} is not in the map: {reason}"
        if len(left_out) > _SHOWN:
            yield WARNING, "left_out", f"and {len(left_out) - _SHOWN} more are not in the map"


# --- the prototype's files ----------------------------------------------------------------


def _seed_files(document: Document, files: Mapping[str, Any]) -> Iterator[Remark]:
    name_of = document.slot.name
    for name, content in files.items():
        if isinstance(content, _Unreadable):
            yield ERROR, "files", f"{name.format(name_of)} cannot be read: {content.reason}"
            return
        # The summary is of the last update, and there may have been none.
        if content is None and name != publish.SUMMARY:
            yield ERROR, "files", f"{name.format(name_of)} is missing"
            return
    meta = files[publish.WEIGHTS_META]
    try:
        yield from _limited("files", _weights_meta(document, meta))
        sums: dict[str, int] = {}
        for entry in meta.values():
            sums[entry["device"]] = sums.get(entry["device"], 0) + entry["size"]
        totals = {device: size / GIB for device, size in sums.items()}
        if files[publish.TOTAL_META] != totals:
            yield ERROR, "files", "total_weight_meta is not the sum of weights_meta"
        summary = files[publish.SUMMARY]
        if summary is not None and (
            summary["total_weights"] != len(meta) or summary["device_weight_summary"] != totals
        ):
            yield ERROR, "files", "weight_update_summary does not agree with weights_meta"
        merged = [
            (entry["ptr"], entry["size"], entry["device"], tuple(entry["weights"]))
            for entry in files[publish.MERGED]
        ]
    except (AttributeError, KeyError, TypeError) as error:
        yield ERROR, "files", f"a file has not its format: {type(error).__name__}: {error}"
        return
    if merged != [(r.ptr, r.size, r.device, r.tensors) for r in document.iter_regions()]:
        yield ERROR, "files", "merged_weights_meta does not agree with the layout's regions"


def _weights_meta(document: Document, meta: Mapping[str, Any]) -> Iterator[Remark]:
    by_name: dict[str, Tensor] = {}
    for tensor in document.iter_tensors():
        by_name.update(dict.fromkeys(tensor.aliases, tensor))
    for tensor in document.iter_tensors():
        by_name[tensor.name] = tensor
        if tensor.kind == "parameter" and tensor.resident and tensor.name not in meta:
            yield ERROR, "files", f"weights_meta lacks {tensor.name}"
    for name, entry in meta.items():
        found = by_name.get(name)
        if found is None:
            yield ERROR, "files", f"weights_meta has {name}, which is no tensor of the layout"
            continue
        for field in ("ptr", "size", "device", "dtype", "shape"):
            if entry[field] != found.raw.get(field):
                yield (
                    ERROR,
                    "files",
                    f"{name}: {field} is {entry[field]} in weights_meta and "
                    f"{found.raw.get(field)} in the layout",
                )


# --- the published schema -----------------------------------------------------------------


def _schema(document: Any, name: str) -> Iterator[Remark]:
    """Hold a document against ``schema/weight_{name}.schema.json``."""
    path = os.path.join(os.path.dirname(__file__), "schema", f"weight_{name}.schema.json")
    schema = _load(path)
    if not isinstance(schema, dict):
        yield WARNING, "schema", f"{path} is not there, so the {name} was not held against it"
        return
    yield from _limited(
        "schema",
        (
            (ERROR, "schema", f"{name}{'.' if where else ''}{where} {problem}")
            for where, problem in violations(document, schema)
        ),
    )


# What of JSON Schema (draft 2020-12) the two schemas use.
KEYWORDS = (
    *("$schema", "$id", "title", "description", "$ref", "$defs"),
    *("type", "enum", "const", "anyOf", "if", "then", "else"),
    *("minimum", "maximum", "pattern", "minLength", "maxLength"),
    *("items", "minItems", "maxItems"),
    *("properties", "required", "additionalProperties", "propertyNames", "maxProperties"),
)

_TYPES: Mapping[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}


def violations(
    value: Any, schema: Any, root: Optional[Mapping[str, Any]] = None, where: str = ""
) -> Iterator[tuple[str, str]]:
    """Where ``value`` departs from ``schema``, and how; only the keywords in `KEYWORDS`.

    >>> list(violations({"size": -1}, {"properties": {"size": {"minimum": 0}}}))
    [('size', 'is -1, less than 0')]
    """
    if isinstance(schema, bool):
        if not schema:
            yield where, "should not be there"
        return
    root = schema if root is None else root
    if "$ref" in schema:
        target: Any = root
        for part in schema["$ref"].lstrip("#/").split("/"):
            target = target[part]
        yield from violations(value, target, root, where)
    if "type" in schema:
        kinds = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
        if not any(_is_of(value, kind) for kind in kinds):
            yield where, f"is no {' or '.join(kinds)}"
            return
    if "enum" in schema and not any(_same(value, choice) for choice in schema["enum"]):
        yield where, f"is {_short(value)}, none of {_short(schema['enum'])}"
    if "const" in schema and not _same(value, schema["const"]):
        yield where, f"is {_short(value)}, not {_short(schema['const'])}"
    if "anyOf" in schema and all(
        any(True for _ in violations(value, choice, root)) for choice in schema["anyOf"]
    ):
        yield where, "is nothing of what it may be"
    if "if" in schema:
        holds = not any(True for _ in violations(value, schema["if"], root))
        yield from violations(value, schema.get("then" if holds else "else", True), root, where)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if value < schema.get("minimum", -math.inf):
            yield where, f"is {_short(value)}, less than {schema['minimum']}"
        if value > schema.get("maximum", math.inf):
            yield where, f"is {_short(value)}, more than {schema['maximum']}"
    elif isinstance(value, str):
        if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", math.inf):
            yield where, f"has {len(value)} characters"
        if "pattern" in schema and not re.search(schema["pattern"], value):
            yield where, f"is {_short(value)}, which {schema['pattern']} does not match"
    elif isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", math.inf):
            yield where, f"has {len(value)} items"
        for position, item in enumerate(value if "items" in schema else ()):
            yield from violations(item, schema["items"], root, f"{where}[{position}]")
    elif isinstance(value, dict):
        yield from _object_violations(value, schema, root, where)


def _object_violations(
    value: Mapping[str, Any], schema: Mapping[str, Any], root: Mapping[str, Any], where: str
) -> Iterator[tuple[str, str]]:
    for name in schema.get("required", ()):
        if name not in value:
            yield where, f"lacks {name!r}"
    if len(value) > schema.get("maxProperties", math.inf):
        yield where, f"has {len(value)} members"
    properties = schema.get("properties", {})
    for name, item in value.items():
        inner = f"{where}.{name}" if where else name
        if "propertyNames" in schema:
            yield from violations(name, schema["propertyNames"], root, inner)
        if name in properties:
            yield from violations(item, properties[name], root, inner)
        elif "additionalProperties" in schema:
            yield from violations(item, schema["additionalProperties"], root, inner)


def _is_of(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()  # 1.0 is an integer in JSON Schema
    return isinstance(value, _TYPES[kind])


def _same(one: Any, other: Any) -> bool:
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _limited(check: str, remarks: Iterable[Remark]) -> Iterator[Remark]:
    """The first few of each level, and how many more there are."""
    counts: dict[str, int] = {}
    for remark in remarks:
        counts[remark[0]] = counts.get(remark[0], 0) + 1
        if counts[remark[0]] <= _SHOWN:
            yield remark
    for level, count in counts.items():
        if count > _SHOWN:
            yield level, check, f"and {count - _SHOWN} more of this kind"
