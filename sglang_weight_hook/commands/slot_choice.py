"""Names of slots, and what else a shell completes."""

from __future__ import annotations

import glob
import os

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


def _is_choice(path: str) -> bool:
    return path.endswith(".json") or os.path.isdir(path)
