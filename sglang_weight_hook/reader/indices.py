"""Which element of a strided tensor lies at an offset; exact, or said to be undecided.

Nearly all tensors are answered by one division for each dimension.  Where dimensions overlap
(``as_strided``, ``unfold``, ``expand``) this is a bounded subset sum, which no algorithm decides
fast in general: dimensions that together fill a run are made one, what greatest common divisors
forbid is not tried, what has failed is remembered, and where all offsets are few they are listed.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd
from typing import NamedTuple, Optional, Union

# How many numbers are tried for a dimension, all together: some 0.1 s.
_TRIES = 100_000
# Up to so many bits are the offsets of all elements listed, dimension by dimension.
_BITS = 1 << 23


class Undecided(Exception):
    """Whether an element lies there was not found out within the bounds."""


class _Run(NamedTuple):
    """The offsets 0, step, 2 * step, … most * step, made by one dimension or several together."""

    step: int
    most: int
    # The dimension's number; or two runs, of which the second fills the gaps of the first.
    of: Union[int, tuple[_Run, _Run]]


def index_at(
    shape: tuple[int, ...], stride: tuple[int, ...], element: int
) -> Optional[tuple[int, ...]]:
    """An index with ``sum(index * stride) == element``; None: there is none.  Raises Undecided.

    >>> index_at((2, 3), (8, 1), 10), index_at((2, 3), (8, 1), 5)
    ((1, 2), None)
    >>> index_at((4, 3), (1, 1), 4)   # unfold(0, 3, 1) of six elements
    (3, 1)
    """
    index = []  # dimensions from the widest to the narrowest, as nearly all tensors have them
    left = element
    for length, step in zip(shape, stride):
        number, left = divmod(left, step) if step else (0, left)
        if number >= length:
            break
        index.append(number)
    else:
        if not left:
            return tuple(index)
    runs = _runs(shape, stride)
    numbers = _Search(runs).numbers(element)
    if numbers is None:
        return None
    index = [0] * len(shape)
    for run, number in zip(runs, numbers):
        _spread(run, number, index)
    return tuple(index)


def _runs(shape: tuple[int, ...], stride: tuple[int, ...]) -> list[_Run]:
    """The dimensions as few runs, the widest step first.

    From the narrowest dimension on: one that is a multiple of a run, and no further away than one
    step behind its end, makes that run longer and leaves no gap.
    """
    dimensions = [k for k in range(len(shape)) if stride[k] and shape[k] > 1]
    runs: list[_Run] = []
    for k in sorted(dimensions, key=lambda k: stride[k]):
        upper = _Run(stride[k], shape[k] - 1, k)
        for place, lower in enumerate(runs):
            if upper.step % lower.step == 0 and (lower.most + 1) * lower.step >= upper.step:
                steps = upper.step // lower.step
                most = upper.most * steps + lower.most
                runs[place] = _Run(lower.step, most, (upper, lower))
                break
        else:
            runs.append(upper)
    return sorted(runs, key=lambda run: -run.step)


def _spread(run: _Run, number: int, index: list[int]) -> None:
    """Write the index of the ``number``-th offset of a run."""
    while not isinstance(run.of, int):
        upper, lower = run.of
        steps = upper.step // lower.step
        index[_dimension(upper)] = taken = min(upper.most, number // steps)
        run, number = lower, number - taken * steps
    index[run.of] = number


def _dimension(run: _Run) -> int:
    assert isinstance(run.of, int)  # a run is made longer by one dimension at a time
    return run.of


class _Search:
    """Numbers for the runs whose offsets add up to a given one."""

    def __init__(self, runs: list[_Run]) -> None:
        self.runs = runs
        # Of the runs from the n-th on: how far they get, and what divides every offset.
        self.reach, self.divisor = [0], [0]
        for run in reversed(runs):
            self.reach.append(self.reach[-1] + run.most * run.step)
            self.divisor.append(gcd(self.divisor[-1], run.step))
        self.reach.reverse()
        self.divisor.reverse()

    def numbers(self, element: int) -> Optional[list[int]]:
        """None: there are none.  Raises Undecided."""
        try:
            return self._tried(element)
        except Undecided:
            size = self.reach[0] // self.divisor[0] + 1
            if size * len(self.runs) > _BITS:
                raise
            return self._listed(element)

    def _candidates(self, depth: int, left: int) -> Iterator[int]:
        """What the run at ``depth`` may take of ``left``; with two runs left, each is an answer."""
        step, divisor = self.runs[depth].step, self.divisor[depth]
        if left % divisor or left > self.reach[depth]:
            return iter(())
        least = max(0, -((self.reach[depth + 1] - left) // step))
        most = min(self.runs[depth].most, left // step)
        # What it leaves must be a multiple of what divides the other runs, so only each
        # `modulus`-th number will do.
        if depth + 1 == len(self.runs):
            number = left // step
            return iter((number,) if least <= number <= most and left % step == 0 else ())
        modulus = self.divisor[depth + 1] // divisor
        if modulus > 1:
            residue = left // divisor * pow(step // divisor, -1, modulus) % modulus
            most -= (most - residue) % modulus
        return iter(range(most, least - 1, -modulus))

    def _tried(self, element: int) -> Optional[list[int]]:
        """Depth first, the largest numbers first.  Raises Undecided."""
        if not self.runs:
            return None if element else []
        numbers: list[int] = []
        open_: list[tuple[Iterator[int], int]] = [(self._candidates(0, element), element)]
        failed: set[tuple[int, int]] = set()
        for _ in range(_TRIES):
            depth = len(open_) - 1
            candidates, before = open_[-1]
            number = next(candidates, None)
            if number is None:
                failed.add((depth, before))
                open_.pop()
                if not open_:
                    return None
                numbers.pop()
                continue
            left = before - number * self.runs[depth].step
            if depth + 1 == len(self.runs):
                return [*numbers, number]
            if (depth + 1, left) not in failed:
                numbers.append(number)
                open_.append((self._candidates(depth + 1, left), left))
        raise Undecided

    def _listed(self, element: int) -> Optional[list[int]]:
        """By sets of all offsets, one bit each: of no runs, of the last one, the last two, …"""
        divisor = self.divisor[0]
        if element % divisor or element > self.reach[0]:
            return None
        offsets, every = 1, [b"\1"]
        for run in reversed(self.runs):
            done = 0  # how many steps further each offset was copied
            while done < run.most:
                more = min(done + 1, run.most - done)
                offsets |= offsets << more * run.step // divisor
                done += more
            every.append(offsets.to_bytes(offsets.bit_length() // 8 + 1, "little"))
        every.reverse()
        if not _has(every[0], element // divisor):
            return None
        left, numbers = element, []
        for depth, run in enumerate(self.runs):
            number = next(
                number
                for number in self._candidates(depth, left)
                if _has(every[depth + 1], (left - number * run.step) // divisor)
            )
            numbers.append(number)
            left -= number * run.step
        return numbers


def _has(bits: bytes, place: int) -> bool:
    return place // 8 < len(bits) and bool(bits[place // 8] >> place % 8 & 1)
