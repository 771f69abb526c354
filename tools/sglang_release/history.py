"""How the rules would have done on the releases that there have been.

For each release: with the rows of the table that the releases before it have, and with everything
that was reported of those taken for judged, what is reported?  A row of the table that this release
is the first to have is *found* if it is reported itself, *on the way* if it is named on the way to
a reported function, *inside* if it only runs inside of a method that is wrapped already, and
*missed* otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from sglang_weight_hook_patch_core import ENTRY_POINTS, REQUESTS, EntryPoint

from .findings import Finding, place_of, title, uncovered
from .paths import Paths
from .summaries import Summary

FOUND, ON_THE_WAY, INSIDE, MISSED = "found", "on the way", "inside", "missed"


class Row(NamedTuple):
    """A row of the table that a release is the first to have."""

    entry: EntryPoint
    release: str
    result: str
    by: str  # the finding that leads to it


class Step(NamedTuple):
    """One release, as somebody would have met it who had the table of the releases before."""

    release: str
    rows: tuple[Row, ...]
    went: tuple[str, ...]  # rows that the release before had, and this one has not
    new: tuple[Finding, ...]  # what there was to read, rows among it
    others: tuple[Finding, ...]  # of those, what led to no row
    here: frozenset[EntryPoint]  # rows of the table that the release has


class Range(NamedTuple):
    """Which of the releases really have a row's method, against what the table says."""

    entry: EntryPoint
    first: str
    last: str


def steps(summaries: Iterable[Summary]) -> Iterator[Step]:
    """One step a release; ``summaries`` in the order of releases, the first one from nothing."""
    known: list[EntryPoint] = []
    judged: set[str] = set()
    before: set[EntryPoint] = set()
    for summary in summaries:
        paths = Paths(summary)
        here = {each for each in _table() if place_of(each) in paths.functions}
        reported = _reported(paths, known, here)
        new = [each for each in reported if each.place not in judged]
        wrapped = {place_of(each) for each in known if each in ENTRY_POINTS}
        outside = paths.outside(wrapped)
        rows = [
            _row(each, summary.version, new, place_of(each) in outside)
            for each in _table()
            if each in here - set(known)
        ]
        led = {row.by for row in rows if row.by}
        others = [each for each in new if each.place not in led]
        went = [title(place_of(each)) for each in known if each in before - here]
        told = (tuple(rows), tuple(went), tuple(new), tuple(others))
        yield Step(summary.version, *told, frozenset(here))
        known += [row.entry for row in rows]
        # With the new rows in the table, what is still reported has been judged.
        settled = _reported(paths, known, here) if rows else reported
        judged |= {each.place for each in settled}
        before = here


def _reported(paths: Paths, known: list[EntryPoint], here: set[EntryPoint]) -> list[Finding]:
    entries = [each for each in known if each in ENTRY_POINTS and each in here]
    requests = [each for each in known if each in REQUESTS and each in here]
    return list(uncovered(paths, entries, requests))


def _row(entry: EntryPoint, release: str, new: list[Finding], is_outside: bool) -> Row:
    place = title(place_of(entry))
    for finding in new:
        if finding.place == place:
            return Row(entry, release, FOUND, finding.place)
    for finding in new:
        if place in finding.way:
            return Row(entry, release, ON_THE_WAY, finding.place)
    return Row(entry, release, MISSED if is_outside else INSIDE, "")


def _table() -> tuple[EntryPoint, ...]:
    return (*ENTRY_POINTS, *REQUESTS)


def ranges(steps_: Sequence[Step]) -> list[Range]:
    """The releases that have each row's method, first and last of those given."""
    seen: dict[EntryPoint, list[str]] = {}
    for step in steps_:
        for entry in step.here:
            seen.setdefault(entry, []).append(step.release)
    return [Range(each, seen[each][0], seen[each][-1]) for each in _table() if each in seen]
