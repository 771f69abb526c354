"""Sums over weights: the published checksum, and sums that say which word of a block has changed.

Both treat the values, row-major, as 32-bit little-endian words ``w[0..n)``, the last one padded
with zeros, and add them up modulo 2**64: ``A`` is the sum of ``w[i]``, ``B`` that of
``w[i] * (i + 1)``.  A tensor's ``A`` and ``B`` are its checksum ``wsum64`` (`docs/format.md`).

Where one word of a block has changed by ``d``, ``A`` has changed by ``d`` and ``B`` by
``d * (i + 1)``: so two sums of 8 bytes, kept for each block, tell which word it was and what it was
before, without a copy of the weights.  ``C``, the sum of ``w[i] * r[i]`` with numbers ``r`` that
follow no rule, tells whether it was one word only: several that look like one in ``A`` and ``B``
do so in ``C``, too, once in 2**64 times.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

from .needed import need_numpy

if TYPE_CHECKING:
    import numpy

ALGORITHM = "wsum64"
BLOCK = 64 << 10  # bytes that have sums of their own
WORD = 4  # bytes

_MASK = (1 << 64) - 1


class Change(NamedTuple):
    """One 32-bit word of a block that is not what it was."""

    word: int  # within the block
    before: int
    after: int


def checksum(pieces: Iterable[Any]) -> str:
    """``wsum64`` of values that come in pieces of any length, as 32 hexadecimal digits.

    Raises NotReadable without numpy.
    """
    need_numpy("a checksum")
    import numpy

    a = b = position = 0
    rest = b""
    for piece in pieces:
        data = rest + bytes(piece) if rest else piece
        whole = len(data) // WORD * WORD
        rest = bytes(data[whole:])
        words = numpy.frombuffer(data[:whole], "<u4")
        a, b, position = _add(a, b, position, words)
    if rest:
        words = numpy.frombuffer(rest.ljust(WORD, b"\0"), "<u4")
        a, b, position = _add(a, b, position, words)
    return f"{a:016x}{b:016x}"


def _add(a: int, b: int, position: int, words: Any) -> tuple[int, int, int]:
    rows = sums(words)
    for row in rows:
        # The word's number counts from the beginning of the tensor, not of the block.
        more, weighted = int(row[0]), int(row[1])
        b = (b + weighted + more * position) & _MASK
        a = (a + more) & _MASK
        position += BLOCK // WORD
    return a, b, position - (-len(words)) % (BLOCK // WORD)


def sums(words: Any) -> numpy.ndarray[Any, Any]:
    """``[A, B, C]`` of each block of ``words`` (uint32), the last one perhaps shorter."""
    import numpy

    per = BLOCK // WORD
    count = -(-len(words) // per)
    result = numpy.zeros((count, 3), numpy.uint64)
    numbers, irregular = _weights()
    for k in range(count):
        block = words[k * per : (k + 1) * per].astype(numpy.uint64)
        result[k, 0] = block.sum(dtype=numpy.uint64)
        result[k, 1] = (block * numbers[: len(block)]).sum(dtype=numpy.uint64)
        result[k, 2] = (block * irregular[: len(block)]).sum(dtype=numpy.uint64)
    return result


@functools.lru_cache(maxsize=1)
def _weights() -> tuple[Any, Any]:
    """What the words of a block are multiplied with: their numbers from 1, and ``r``.

    ``r``: the first outputs of SplitMix64 (Steele, Lea and Flood, 2014), made odd.
    """
    import numpy

    numbers = numpy.arange(1, BLOCK // WORD + 1, dtype=numpy.uint64)
    with numpy.errstate(over="ignore"):
        z = numbers * numpy.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
        z = (z ^ (z >> numpy.uint64(31))) | numpy.uint64(1)
    return numbers, z


def words_of(data: Any) -> numpy.ndarray[Any, Any]:
    """Bytes as words, the last one padded with zeros."""
    import numpy

    whole = len(data) // WORD * WORD
    if whole == len(data):
        return numpy.frombuffer(data, "<u4")
    return numpy.frombuffer(bytes(data).ljust(whole + WORD, b"\0"), "<u4")


def differing(before: Any, after: Any) -> Iterator[int]:
    """Which blocks' sums differ."""
    import numpy

    yield from (int(k) for k in numpy.flatnonzero((before != after).any(axis=1)))


def located(before: Any, after: Any, words: Any) -> Optional[Change]:
    """The one word of a block that has changed; None where it was more than one.

    ``before`` and ``after``: the block's sums; ``words``: what it holds now.
    """
    moved = _signed(int(after[0]) - int(before[0]))
    weighted = _signed(int(after[1]) - int(before[1]))
    if not moved or weighted % moved:
        return None
    word = weighted // moved - 1
    if not 0 <= word < len(words):
        return None
    now = int(words[word])
    then = now - moved
    irregular = int(_weights()[1][word])
    if not 0 <= then < 1 << 32 or (int(after[2]) - int(before[2]) - moved * irregular) & _MASK:
        return None
    return Change(word, then, now)


def _signed(value: int) -> int:
    """A difference modulo 2**64 as the number nearest to 0."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value
