"""Which slot is meant where none is named."""

from __future__ import annotations

import os
from typing import Optional

from ..reader import HookError, open_directory
from .app import Misused

_SHOWN = 6  # of many slots


def require_one_slot(directory: Optional[str], slot: Optional[str]) -> None:
    """Raises Misused where no slot is named and there are several."""
    if slot is not None:
        return
    found = open_directory(directory)
    try:
        names = [each.name for each in found.slots()]
    except HookError:
        return
    if len(names) > 1:
        raise Misused(
            f"there are slots {some_of(names)} in {found.path}; name one of them "
            f"(`sglang-weight-hook slots` lists all)"
        )


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
