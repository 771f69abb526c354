"""What checks find: errors, warnings, and how many of a kind are listed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

ERROR, WARNING = "error", "warning"

# At most this many findings of each check are listed.
SHOWN = 5


class Finding(NamedTuple):
    slot: str
    level: str  # `ERROR` or `WARNING`
    check: str  # which check has found it: one word
    message: str


Remark = tuple[str, str, str]  # level, check, message


class Unreadable(NamedTuple):
    reason: str


def limited(check: str, remarks: Iterable[Remark]) -> Iterator[Remark]:
    """The first few of each level, and how many more there are."""
    counts: dict[str, int] = {}
    for remark in remarks:
        counts[remark[0]] = counts.get(remark[0], 0) + 1
        if counts[remark[0]] <= SHOWN:
            yield remark
    for level, count in counts.items():
        if count > SHOWN:
            yield level, check, f"and {count - SHOWN} more of this kind"
