"""The slot that somebody has named, or the names that there are instead."""

from __future__ import annotations

from collections.abc import Sequence

from .directory import Directory
from .errors import HookError
from .slot import Slot

_SHOWN = 6  # of many slots


def some_of(names: Sequence[str]) -> str:
    """The first few names, and how many more there are.

    >>> some_of(["0", "1"]), some_of([str(n) for n in range(64)])
    ('0, 1', '0, 1, 2, 3, 4, 5 and 58 more')
    """
    if len(names) <= _SHOWN:
        return ", ".join(names)
    return f"{', '.join(names[:_SHOWN])} and {len(names) - _SHOWN} more"


def slot_named(found: Directory, slots: Sequence[Slot], name: str) -> Slot:
    """The one with this name of the slots of a directory.  Raises HookError where there is none."""
    by_name = {slot.name: slot for slot in slots}
    if name not in by_name:
        has = f"it has {some_of(list(by_name))}" if slots else "it has none"
        raise HookError(f"there is no slot {name} in {found.path}; {has}")
    return by_name[name]
