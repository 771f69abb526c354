"""The output directories named on the command line.

A directory is a path, or the URL of a node agent or of a registry of agents.
The standard library alone: `slots` has no time to import typer.
"""

from __future__ import annotations

import glob
import os
import warnings
from typing import Optional, Union

from ..layout.location import is_url
from ..reader import Directory, HookError, Slot, open_directory
from ..reader.gathering import gather
from .render.text import complain


def directories_of(given: Optional[list[str]]) -> list[Directory]:
    """Each directory once, patterns among them filled in.  Raises HookError."""
    if not given:
        return [directory_at(None)]
    found: list[Directory] = []
    for value in given:
        matches = [value]
        if not is_url(value) and not os.path.exists(value) and glob.has_magic(value):
            matches = [path for path in sorted(glob.glob(value)) if os.path.isdir(path)]
            if not matches:
                raise HookError(f"no directory matches {value}; check the pattern")
        found += [directory_at(match) for match in matches]
    by_place = {directory.place: directory for directory in found}
    return list(by_place.values())


def directory_at(value: Optional[str]) -> Directory:
    """The directory that is named, else the default; what is doubtful about it on stderr."""
    with warnings.catch_warnings(record=True) as doubts:
        warnings.simplefilter("always")
        found = open_directory(value)
    for doubt in doubts:
        complain(str(doubt.message))
    return found


# Seconds for the slots of several directories; an agent has 10 s of its own.
_LISTING_TIMEOUT = 13.0


def slots_of_each(asked: list[Directory]) -> dict[Directory, Union[list[Slot], HookError]]:
    """The slots of each directory, or why they are not known; all are asked at the same time."""
    return gather({directory: directory.slots for directory in asked}, _LISTING_TIMEOUT)
