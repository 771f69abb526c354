"""Which tensors of two sources differ, in how many elements, where first, and by how much."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import Any, NamedTuple, Optional

from .boxes import index_of
from .dtypes import ELEMENT_TYPES
from .safetensors_file import Entry, require
from .sources import Source

EQUAL, DIFFERENT, OTHER_TYPE, OTHER_SHAPE = "equal", "different", "other type", "other shape"
ONLY_ONE, ONLY_OTHER = "only in the first", "only in the second"

_DECODED = 1 << 20  # bytes of which values are looked at at once: as float64 they take a multiple


class Finding(NamedTuple):
    """One tensor of two sources."""

    name: str
    verdict: str  # one of the words above
    elements: int = 0  # that differ, bit by bit
    of: int = 0
    first: Optional[tuple[int, ...]] = None  # index of the first that differs
    largest: Optional[float] = None  # absolute difference of two numbers
    largest_relative: Optional[float] = None  # to the first source's number
    note: str = ""

    @property
    def is_equal(self) -> bool:
        return self.verdict == EQUAL


def compare_sources(
    one: Source, other: Source, wanted: Callable[[str], bool] = lambda name: True
) -> Iterator[Finding]:
    """Every tensor of either, in the first one's order.  Raises HookError.

    ``wanted`` is asked for each of a tensor's names.
    """
    require()
    met = set()
    names_of = _names_of(one, other)
    for name, entry in one.entries.items():
        theirs = name if name in other.entries else other.aliases.get(name)
        if theirs is None:
            # It may be known by another of its names there.
            names = [alias for alias, canonical in one.aliases.items() if canonical == name]
            theirs = next((alias for alias in names if alias in other.entries), None)
        if theirs is not None:
            met.add(theirs)
        if not any(map(wanted, names_of(name, theirs))):
            continue
        if theirs is not None:
            yield _compared(one, name, entry, other, theirs, other.entries[theirs])
        elif name not in other.left_out:
            yield Finding(name, ONLY_ONE)
    for name in other.entries:
        known = name in met or name in one.left_out or one.aliases.get(name) in one.entries
        if not known and any(map(wanted, names_of(None, name))):
            yield Finding(name, ONLY_OTHER)


def _names_of(one: Source, other: Source) -> Callable[[Optional[str], Optional[str]], list[str]]:
    """All names of a tensor, given what it is called on either side."""
    aliases: list[dict[str, list[str]]] = []
    for source in (one, other):
        known: dict[str, list[str]] = {}
        for alias, name in source.aliases.items():
            known.setdefault(name, []).append(alias)
        aliases.append(known)

    def names(mine: Optional[str], theirs: Optional[str]) -> list[str]:
        found = []
        for name, known in zip((mine, theirs), aliases):
            if name is not None:
                found += [name, *known.get(name, ())]
        return found

    return names


def _compared(
    one: Source, name: str, entry: Entry, other: Source, theirs: str, their_entry: Entry
) -> Finding:
    count = prod(entry.shape)
    if entry.shape != their_entry.shape:
        note = f"{list(entry.shape)} and {list(their_entry.shape)}"
        return Finding(name, OTHER_SHAPE, of=count, note=note)
    if entry.dtype != their_entry.dtype:
        return Finding(name, OTHER_TYPE, of=count, note=f"{entry.dtype} and {their_entry.dtype}")
    itemsize = entry.size // count if count else 1
    step = max(_DECODED // itemsize, 1) * itemsize
    total, first, position = 0, None, 0
    largest = relative = None
    for mine, yours in _paired(one.pieces(name), other.pieces(theirs)):
        if _same(mine, yours):
            position += len(mine) // itemsize
            continue
        for start in range(0, len(mine), step):
            a, b = mine[start : start + step], yours[start : start + step]
            if not _same(a, b):
                found = _differences(a, b, entry.dtype, itemsize)
                if first is None:
                    first = position + found.first
                total += found.number
                largest = _larger(largest, found.largest)
                relative = _larger(relative, found.relative)
            position += len(a) // itemsize
    if not total:
        return Finding(name, EQUAL, of=count)
    assert first is not None
    index = index_of(entry.shape, first)
    return Finding(name, DIFFERENT, total, count, index, largest, relative)


def _paired(one: Iterator[Any], other: Iterator[Any]) -> Iterator[tuple[Any, Any]]:
    """The same bytes of both, whatever pieces they come in."""
    mine = yours = memoryview(b"")
    while True:
        if not len(mine):
            mine = next(one, memoryview(b""))
        if not len(yours):
            yours = next(other, memoryview(b""))
        size = min(len(mine), len(yours))
        if not size:
            return
        yield mine[:size], yours[:size]
        mine, yours = mine[size:], yours[size:]


def _same(mine: Any, yours: Any) -> bool:
    """Compared as words where that is possible: memoryview's own comparison goes item by item."""
    import numpy

    kind = numpy.uint8 if len(mine) % 8 else numpy.uint64
    return bool(numpy.array_equal(numpy.frombuffer(mine, kind), numpy.frombuffer(yours, kind)))


class _Differences(NamedTuple):
    number: int
    first: int
    largest: Optional[float]
    relative: Optional[float]


def _differences(mine: Any, yours: Any, dtype: str, itemsize: int) -> _Differences:
    """In one piece.  Elements differ if their bits do: equal NaN are equal, 0.0 and -0.0 not."""
    import numpy

    one = numpy.frombuffer(mine, numpy.uint8).reshape(-1, itemsize)
    other = numpy.frombuffer(yours, numpy.uint8).reshape(-1, itemsize)
    where = numpy.flatnonzero((one != other).any(axis=1))
    largest = relative = None
    kind = _number_type(dtype)
    if kind is not None:
        with numpy.errstate(all="ignore"):  # NaN and infinities are values like others here
            a = one[where].reshape(-1).view(kind).astype(numpy.float64)
            b = other[where].reshape(-1).view(kind).astype(numpy.float64)
            apart = numpy.abs(a - b)
            share = apart / numpy.abs(a)
        largest = _largest(apart)
        relative = _largest(share[a != 0])
    return _Differences(len(where), int(where[0]), largest, relative)


def _largest(values: Any) -> Optional[float]:
    """Of those that are numbers."""
    import numpy

    values = values[~numpy.isnan(values)]
    return float(values.max()) if len(values) else None


def _number_type(dtype: str) -> Any:
    """numpy's type for one of safetensors', where it is a real number and can be had."""
    from .arrays import numpy_type
    from .errors import NotReadable

    for name, known in ELEMENT_TYPES.items():
        if known.safetensors == dtype and "complex" not in name and name != "torch.bool":
            try:
                return numpy_type(name)
            except NotReadable:
                return None
    return None


def _larger(one: Optional[float], other: Optional[float]) -> Optional[float]:
    return other if one is None else one if other is None else max(one, other)
