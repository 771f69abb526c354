"""Measuring on a machine that others use: interleaved rounds, CPU time, medians.

Everything that is compared runs in the same process, interleaved, so that what disturbs one
disturbs the other.  The clock is the process's CPU time (``time.process_time``), which does
not run while another process has the core.  A ratio is the median of the rounds' own ratios,
not the ratio of two medians.
"""

from __future__ import annotations

import gc
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Optional


class Sample(NamedTuple):
    """One thing measured ``n`` times, in seconds (or whatever the values are)."""

    values: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def n(self) -> int:
        return len(self.values)

    def quantile(self, share: float) -> float:
        """The value that ``share`` of all do not exceed."""
        ordered = sorted(self.values)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)]

    @property
    def spread(self) -> float:
        """Half of the interquartile range, as a share of the median."""
        if not self.median:
            return 0.0
        return (self.quantile(0.75) - self.quantile(0.25)) / 2 / self.median


def ratios(over: Sample, under: Sample) -> Sample:
    """Round by round."""
    return Sample([a / b for a, b in zip(over.values, under.values)])


def rotated(names: Iterable[str], turn: int) -> list[str]:
    """Every name once, each time another one first.

    >>> rotated("abc", 4)
    ['b', 'c', 'a']
    """
    ordered = list(names)
    first = turn % len(ordered)
    return ordered[first:] + ordered[:first]


def side_by_side(
    subjects: Mapping[str, Callable[[], object]],
    rounds: int,
    each: int = 1,
    between: Optional[Callable[[], object]] = None,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, Sample]:
    """CPU seconds of one call of every subject, in ``rounds`` rounds of ``each`` calls.

    ``clock``: ``time.thread_time`` leaves out what other threads of the process do meanwhile.

    The order rotates from round to round.  The collector starts every measurement with
    nothing to do and stays switched on; ``between`` runs before each, and is not measured.
    """
    values: dict[str, list[float]] = {name: [] for name in subjects}
    names = list(subjects)
    for subject in subjects.values():  # caches, lazy imports
        if between is not None:
            between()
        subject()
    for number in range(rounds):
        for name in rotated(names, number):
            subject = subjects[name]
            if between is not None:
                between()
            gc.collect()
            started = clock()
            for _ in range(each):
                subject()
            values[name].append((clock() - started) / each)
    return {name: Sample(seconds) for name, seconds in values.items()}


class Child(NamedTuple):
    """What one child process used."""

    cpu: float  # seconds, of all of its threads, in user and kernel mode
    wall: float  # seconds
    peak: int  # bytes of resident memory


def child(arguments: Sequence[str], environment: Mapping[str, str]) -> Child:
    """Run a program to its end, silently.  Raises RuntimeError if it fails."""
    started = time.perf_counter()
    pid = os.posix_spawn(
        arguments[0],
        list(arguments),
        dict(environment),
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
        ],
    )
    _, status, used = os.wait4(pid, 0)
    wall = time.perf_counter() - started
    if status:
        raise RuntimeError(
            f"{' '.join(arguments)}: exit status {os.waitstatus_to_exitcode(status)}"
        )
    return Child(used.ru_utime + used.ru_stime, wall, used.ru_maxrss * 1024)


class Line(NamedTuple):
    """A straight line through measured points, least squares."""

    fixed: float
    slope: float
    residual: float  # the largest deviation of a point, as a share of the fit there


def fit(points: Sequence[tuple[float, float]]) -> Line:
    """Weighted by 1/y², so that a small point's relative error counts as much as a large one's.

    >>> fit([(1, 3), (2, 5), (4, 9)])
    Line(fixed=1.0, slope=2.0, residual=0.0)
    """
    weights = [1 / (y * y) for _, y in points]
    total = sum(weights)
    mean_x = sum(w * x for w, (x, _) in zip(weights, points)) / total
    mean_y = sum(w * y for w, (_, y) in zip(weights, points)) / total
    over = sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, points))
    under = sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, points))
    slope = over / under
    fixed = mean_y - slope * mean_x
    worst = max(abs(y / (fixed + slope * x) - 1) for x, y in points)
    return Line(round(fixed, 12), round(slope, 12), round(worst, 12))


def resident() -> int:
    """This process's resident memory now, in bytes."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
