"""Names of slots, and what else a shell completes."""

from __future__ import annotations

import os

from ..reader import HookError, open_directory


def slots_named(incomplete: str) -> list[str]:
    """Names of slots that begin so, in the default directory: what a shell completes."""
    try:
        names = [each.name for each in open_directory().slots()]
    except (HookError, OSError):
        return []
    return [name for name in names if name.startswith(incomplete) and os.sep not in name]
