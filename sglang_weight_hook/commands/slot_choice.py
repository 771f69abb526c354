"""Names of slots, and what else a shell completes."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable

from ..reader import HookError, open_directory


def slots_named(incomplete: str) -> list[str]:
    """Names of slots that begin so, in the default directory: what a shell completes."""
    try:
        names = [each.name for each in open_directory().slots()]
    except (HookError, OSError):
        return []
    return [name for name in names if name.startswith(incomplete) and os.sep not in name]


def slots_and_files_named(incomplete: str) -> list[str]:
    """The same, and saved layouts and folders, for arguments that may be either."""
    files = [path for path in sorted(glob.glob(glob.escape(incomplete) + "*")) if _is_choice(path)]
    return slots_named(incomplete) + files


def a_slot_or_file_named(incomplete: str) -> list[str]:
    """The same, for an argument that is nearly always a slot: files once one is begun."""
    return slots_and_files_named(incomplete) if incomplete else slots_named(incomplete)


def one_of(words: Iterable[str]) -> Callable[[str], list[str]]:
    """What completes one of a few words."""
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


def _is_choice(path: str) -> bool:
    return path.endswith(".json") or os.path.isdir(path)
