"""Names of slots: a few of many, and those that a shell completes."""

from __future__ import annotations

import os

from ..reader import HookError, open_directory

_SHOWN = 6  # of many slots


def some_of(names: list[str]) -> str:
    """The first few names, and how many more there are.

    >>> some_of(["0", "1"]), some_of([str(n) for n in range(64)])
    ('0, 1', '0, 1, 2, 3, 4, 5 and 58 more')
    """
    if len(names) <= _SHOWN:
        return ", ".join(names)
    return f"{', '.join(names[:_SHOWN])} and {len(names) - _SHOWN} more"


def slots_named(incomplete: str) -> list[str]:
    """Names of slots that begin so, in the default directory: what a shell completes."""
    try:
        names = [each.name for each in open_directory().slots()]
    except (HookError, OSError):
        return []
    return [name for name in names if name.startswith(incomplete) and os.sep not in name]
