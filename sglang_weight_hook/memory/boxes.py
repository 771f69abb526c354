"""Which bytes of the owner's memory hold a tensor's values, in which order, piece by piece.

A tensor is cut into *boxes* of bounded size whose values follow each other in row-major order.
For each box `runs` names the stretches of memory to fetch, the longest that its strides allow:
those of a transposed matrix run along its columns.  `gather` then puts what was fetched into
row-major order.  Offsets, strides and lengths are in bytes, shapes in elements.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from typing import Any, NamedTuple

from ..reader import Tensor

# Short stretches are fetched together with what lies between them: up to so many bytes for one
# that is wanted, where the stretches are shorter than so many bytes.
_GAP = 4
_SHORT = 256
# Runs of a box at most: elements that are scattered one by one make small boxes.
_MOST_RUNS = 16384


class Box(NamedTuple):
    """Values that follow each other in row-major order."""

    offset: int  # of the first one, from the tensor's first byte
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # bytes
    itemsize: int

    @property
    def size(self) -> int:
        """Bytes of the values."""
        return prod(self.shape) * self.itemsize


def index_of(shape: tuple[int, ...], element: int) -> tuple[int, ...]:
    """The index of the ``element``-th value, row-major.

    >>> index_of((3, 4), 7)
    (1, 3)
    """
    index = []
    for length in reversed(shape):
        element, number = divmod(element, length)
        index.append(number)
    return tuple(reversed(index))


class Fetch(NamedTuple):
    """How a box is fetched: stretches of memory, and where its values then lie."""

    runs: list[tuple[int, int]]  # (offset from the tensor's first byte, length), in this order
    strides: tuple[int, ...]  # of the box's dimensions in what was fetched
    size: int  # bytes fetched

    @property
    def is_in_order(self) -> bool:
        """Whether what was fetched is the values, row-major and without gaps: see `plan`."""
        return not self.strides


def box_of(tensor: Tensor) -> Box:
    """The whole tensor."""
    itemsize = tensor.itemsize
    return Box(0, tensor.shape, tuple(step * itemsize for step in tensor.stride), itemsize)


def boxes(tensor: Tensor, limit: int) -> Iterator[Box]:
    """The tensor's values, cut into boxes of at most ``limit`` bytes (at least one element)."""
    if tensor.size and tensor.itemsize:
        box = box_of(tensor)
        yield from _cut(box, min(limit, _MOST_RUNS * _run(box).elements * box.itemsize))


def _cut(box: Box, limit: int) -> Iterator[Box]:
    if box.size <= limit or not box.shape:
        yield box
        return
    length, step = box.shape[0], box.strides[0]
    inner = box.size // length
    if inner > limit:
        rest = Box(box.offset, box.shape[1:], box.strides[1:], box.itemsize)
        for number in range(length):
            yield from _cut(rest._replace(offset=box.offset + number * step), limit)
        return
    count = limit // inner
    for start in range(0, length, count):
        yield Box(
            box.offset + start * step,
            (min(count, length - start), *box.shape[1:]),
            box.strides,
            box.itemsize,
        )


class _Run(NamedTuple):
    """The longest stretch that one run can cover."""

    size: int  # bytes, gaps included
    elements: int  # that it holds
    outer: list[int]  # dimensions that repeat it, from the narrowest step to the widest
    strides: list[int]  # of the dimensions inside it, in bytes; 0 for the others


def _run(box: Box) -> _Run:
    real = [k for k, (n, step) in enumerate(zip(box.shape, box.strides)) if n > 1 and step]
    real.sort(key=lambda k: box.strides[k])
    # The block that one run covers, growing from the dimension with the narrowest steps.
    block = box.itemsize
    elements = 1
    local = [0] * len(box.shape)
    while real:
        k = real[0]
        length, step = box.shape[k], box.strides[k]
        if step != block and not (block < step <= _GAP * block and block < _SHORT):
            break
        local[k] = step
        block += (length - 1) * step
        elements *= length
        real.pop(0)
        if step * length != block:
            break
    return _Run(block, elements, real, local)


def plan(box: Box) -> Fetch:
    """How to fetch the box.

    >>> plan(Box(0, (2, 3), (6, 2), 2))          # contiguous
    Fetch(runs=[(0, 12)], strides=(), size=12)
    >>> plan(Box(0, (2, 300), (640, 2), 2)).runs  # padded rows
    [(0, 600), (640, 600)]
    >>> plan(Box(0, (2, 3), (8, 2), 2)).runs     # short ones are fetched with their padding
    [(0, 14)]
    >>> plan(Box(0, (2, 3), (2, 100), 2))        # transposed: along the columns
    Fetch(runs=[(0, 4), (100, 4), (200, 4)], strides=(2, 4), size=12)
    >>> plan(Box(0, (2, 3), (0, 2), 2)).runs     # expanded: each row is the same memory
    [(0, 6)]
    """
    block, _, real, local = _run(box)
    if any(box.strides[k] < block for k in real):  # elements overlap: everything in one run
        return _whole(box)
    size = block
    runs = [(box.offset, block)]
    for k in real:  # each further dimension repeats what there is
        step, length = box.strides[k], box.shape[k]
        local[k] = size
        runs = [(start + n * step, block) for n in range(length) for start, _ in runs]
        size *= length
    strides = tuple(local)
    return Fetch(runs, () if _is_row_major(box, strides) else strides, size)


def _whole(box: Box) -> Fetch:
    size = box.itemsize + sum((n - 1) * step for n, step in zip(box.shape, box.strides))
    return Fetch([(box.offset, size)], box.strides, size)


def _is_row_major(box: Box, strides: Sequence[int]) -> bool:
    expected = box.itemsize
    for length, step in zip(reversed(box.shape), reversed(strides)):
        if length > 1 and step != expected:
            return False
        expected *= length
    return True


def gather(box: Box, fetch: Fetch, fetched: memoryview, target: memoryview) -> None:
    """Put what was fetched into ``target``, row-major; both are bytes of the right size."""
    try:
        import numpy
    except ImportError:
        _gather_slowly(box, fetch, fetched, target)
        return
    element = numpy.dtype(f"V{box.itemsize}")
    source: Any = numpy.lib.stride_tricks.as_strided(
        numpy.frombuffer(fetched[: fetch.size // box.itemsize * box.itemsize], element),
        shape=box.shape,
        strides=fetch.strides,
        writeable=False,
    )
    # Copied as integers where there are any: numpy copies void elements one by one.
    whole = numpy.frombuffer(target, element).reshape(box.shape)
    if box.itemsize in (1, 2, 4, 8):
        number = f"u{box.itemsize}"
        numpy.copyto(whole.view(number), source.view(number))
    else:
        numpy.copyto(whole, source)


def _gather_slowly(box: Box, fetch: Fetch, fetched: memoryview, target: memoryview) -> None:
    position, itemsize = 0, box.itemsize
    for index in product(*map(range, box.shape)):
        start = sum(n * step for n, step in zip(index, fetch.strides))
        target[position : position + itemsize] = fetched[start : start + itemsize]
        position += itemsize
