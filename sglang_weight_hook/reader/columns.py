"""Whether all is well with a document's tensors and regions, asked of whole columns.

A document has thousands of tensors, and nearly always nothing is wrong with any.  This answers
several times as fast as `checks` and has no words: it says yes only where those checks find
nothing, and whatever it does not say yes to is theirs.  Nothing is relied on that it has not looked
at, for the schema may not be there to be checked against.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from math import prod
from operator import mul
from typing import Any

from . import checks
from .fields import ADDRESSES, DIMENSIONS
from .tensors import CacheBuffer, Tensor

_INT = frozenset((int,))
_TEXT = frozenset((str,))
_LIST = frozenset((list,))
_BOOL = frozenset((bool,))
_TEXT_OR_NONE = frozenset((str, type(None)))

_SIZES = ("ptr", "size", "span", "storage_offset", "storage_ptr", "storage_size")
_REGION_SIZES = ("ptr", "size", "allocation_ptr", "allocation_size")


def are_sound(
    tensors: Mapping[str, Any], regions: Sequence[Any], cache: Iterable[CacheBuffer]
) -> bool:
    """Whether `Tensor.from_raw`, `Region.from_raw` and the checks of both have nothing to say."""
    try:
        return (
            _tensors(tensors)
            and _no_overlaps(tensors, cache)
            and _regions(regions, tensors.keys())
            and _same_bytes(tensors, regions)
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        return False


def _tensors(tensors: Mapping[str, Any]) -> bool:
    rows = list(tensors.values())
    ptr, size, span, offset, storage_ptr, storage_size = (_column(rows, name) for name in _SIZES)
    shape, stride = _column(rows, "shape"), _column(rows, "stride")
    if not (
        all(map(_are_sizes, (ptr, size, span, offset, storage_ptr, storage_size)))
        and _are_dimensions(shape)
        and _are_dimensions(stride)
        and list(map(len, shape)) == list(map(len, stride))
        and all(_are(_TEXT, _column(rows, name)) for name in ("device", "dtype", "kind"))
        and _are(_BOOL, _column(rows, "resident"))
        and _are_lists_of_texts(_column(rows, "aliases"))
        and _are(_TEXT_OR_NONE, [row.get("checksum") for row in rows])
    ):
        return False
    elements = list(map(prod, shape))
    odd = [name for name, count, place in zip(tensors, elements, ptr) if not count or not place]
    if odd:  # without values or memory: a few, each of its own kind
        few = [Tensor.from_raw(name, tensors[name]) for name in odd]
        if next(checks.tensors(few), None) is not None:
            return False
        return _tensors({name: row for name, row in tensors.items() if name not in set(odd)})
    if any(map(int.__mod__, size, elements)) or not all(size):
        return False
    itemsize = list(map(int.__floordiv__, size, elements))
    # As `touched_bytes`, where there is no dimension of length 0.
    touched = [
        (sum(map(mul, lengths, steps)) - sum(steps) + 1) * each
        for lengths, steps, each in zip(shape, stride, itemsize)
    ]
    return (
        touched == span
        and ptr == list(map(int.__add__, storage_ptr, map(mul, offset, itemsize)))
        and all(
            place + length <= start + whole
            for place, length, start, whole in zip(ptr, span, storage_ptr, storage_size)
        )
    )


def _no_overlaps(tensors: Mapping[str, Any], cache: Iterable[CacheBuffer]) -> bool:
    storages = {
        (row["device"], row["storage_ptr"], row["storage_size"]) for row in tensors.values()
    }
    storages.update((buffer.device, buffer.storage_ptr, buffer.storage_size) for buffer in cache)
    ordered = sorted(storage for storage in storages if storage[1] and storage[2])
    return all(
        start + size <= next_start or device != next_device
        for (device, start, size), (next_device, next_start, _) in zip(ordered, ordered[1:])
    )


def _regions(regions: Sequence[Any], names: Iterable[str]) -> bool:
    ptr, size, start, whole = (_column(regions, name) for name in _REGION_SIZES)
    tensors = _column(regions, "tensors")
    end = list(map(int.__add__, ptr, size))
    return (
        all(map(_are_sizes, (ptr, size, start, whole)))
        and all(_are(_TEXT, _column(regions, name)) for name in ("device", "allocation_source"))
        and _are(_TEXT_OR_NONE, [row.get("allocation_kind") for row in regions])
        and _are(_TEXT_OR_NONE, [row.get("export") for row in regions])
        and _are_lists_of_texts(tensors)
        and all(size)
        and all(map(int.__le__, start, ptr))
        and all(map(int.__le__, end, map(int.__add__, start, whole)))
        and all(map(int.__le__, end, ptr[1:]))
        and set(names).issuperset(chain.from_iterable(tensors))
    )


def _same_bytes(tensors: Mapping[str, Any], regions: Sequence[Any]) -> bool:
    wanted = [
        (row["ptr"], row["ptr"] + row["span"])
        for row in tensors.values()
        if row["resident"] and row["ptr"]
    ]
    covered = [(row["ptr"], row["ptr"] + row["size"]) for row in regions]
    return checks.union(wanted) == checks.union(covered)


def _column(rows: Iterable[Any], name: str) -> list[Any]:
    return [row[name] for row in rows]


def _are(types: frozenset[object], values: Iterable[Any]) -> bool:
    return types.issuperset(map(type, values))


def _are_sizes(values: Sequence[Any]) -> bool:
    return _are(_INT, values) and (not values or (min(values) >= 0 and max(values) < ADDRESSES))


def _are_dimensions(values: Sequence[Any]) -> bool:
    return (
        _are(_LIST, values)
        and max(map(len, values), default=0) <= DIMENSIONS
        and _are_sizes(list(chain.from_iterable(values)))
    )


def _are_lists_of_texts(values: Sequence[Any]) -> bool:
    return _are(_LIST, values) and _are(_TEXT, chain.from_iterable(values))
