"""The output directories named on the command line.

The standard library alone: `slots` has no time to import typer.
"""

from __future__ import annotations

import glob
import os
from typing import Optional

from ..reader import Directory, HookError, open_directory


def directories_of(given: Optional[list[str]]) -> list[Directory]:
    """Each directory once, patterns among them filled in.  Raises HookError."""
    if not given:
        return [open_directory()]
    found: list[Directory] = []
    for value in given:
        matches = [value]
        if not os.path.exists(value) and glob.has_magic(value):
            matches = [path for path in sorted(glob.glob(value)) if os.path.isdir(path)]
            if not matches:
                raise HookError(f"no directory matches {value}; check the pattern")
        found += [open_directory(match) for match in matches]
    by_place = {os.path.realpath(directory.path): directory for directory in found}
    return list(by_place.values())
