"""Whether one layout document is consistent in itself: overlaps, regions, sums, completeness."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Optional

from ..layout.geometry import touched_bytes
from .document import Document
from .findings import ERROR, SHOWN, WARNING, Remark
from .tensors import CacheBuffer, Region, Tensor

# --- tensors and regions ------------------------------------------------------------------


def tensors(tensors: Iterable[Tensor]) -> Iterator[Remark]:
    for tensor in tensors:
        elements = math.prod(tensor.shape)
        if elements and (not tensor.size or tensor.size % elements):
            yield (
                ERROR,
                "tensors",
                f"{tensor.name}: {tensor.size} bytes cannot hold {elements} elements",
            )
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
            yield ERROR, "tensors", f"{tensor.name}: extends beyond the end of its storage"


def overlaps(tensors: Iterable[Tensor], cache: Iterable[CacheBuffer]) -> Iterator[Remark]:
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


def regions(tensors: list[Tensor], regions: list[Region]) -> Iterator[Remark]:
    names = {tensor.name for tensor in tensors}
    for region in regions:
        what = f"the region at {region.ptr:#x}"
        allocation_end = region.allocation_ptr + region.allocation_size
        if not region.size:
            yield ERROR, "regions", f"{what} is empty"
        if region.ptr < region.allocation_ptr or region.end > allocation_end:
            yield ERROR, "regions", f"{what} extends beyond its allocation"
        for name in region.tensors:
            if name not in names:
                yield ERROR, "regions", f"{what} names {name!r}, which is no tensor here"
    for one, other in zip(regions, regions[1:]):
        if other.ptr < one.end:
            yield ERROR, "regions", f"the regions at {one.ptr:#x} and {other.ptr:#x} overlap"
    resident = [tensor for tensor in tensors if tensor.resident and tensor.ptr]
    wanted = union((tensor.ptr, tensor.end) for tensor in resident)
    covered = union((region.ptr, region.end) for region in regions)
    if wanted != covered:
        both = sorted(set(wanted) ^ set(covered))
        yield (
            ERROR,
            "regions",
            f"regions and tensors do not cover the same bytes, first at {both[0][0]:#x}",
        )


def union(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
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


# Of a tensor: device, size, resident, storage_ptr, storage_size, kind.
Accounted = tuple[str, int, bool, int, int, str]


def totals(
    document: Document, tensors: Iterable[Accounted], cache: list[CacheBuffer]
) -> Iterator[Remark]:
    devices: dict[str, dict[str, int]] = {}
    storages: dict[str, dict[int, int]] = {}
    weights: dict[int, int] = {}
    lora: dict[int, int] = {}
    for device, size, resident, storage_ptr, storage_size, kind in tensors:
        sums = devices.setdefault(device, {"tensors": 0, "tensor_bytes": 0, "storage_bytes": 0})
        sums["tensors"] += 1
        sums["tensor_bytes"] += size
        if resident and storage_ptr:
            storages.setdefault(device, {})[storage_ptr] = storage_size
            (lora if kind == "lora" else weights)[storage_ptr] = storage_size
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


def completeness(document: Document) -> Iterator[Remark]:
    validation = document.raw.get("validation")
    if not isinstance(validation, dict):
        return
    if validation.get("problem"):
        yield ERROR, "problem", f"the map is invalidated: {validation['problem']}"
    left_out = validation.get("left_out")
    if isinstance(left_out, dict):
        for name, reason in list(left_out.items())[:SHOWN]:
            yield WARNING, "left_out", f"{name} is not in the map: {reason}"
        if len(left_out) > SHOWN:
            yield WARNING, "left_out", f"and {len(left_out) - SHOWN} more are not in the map"
