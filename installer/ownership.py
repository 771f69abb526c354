"""Which files at the hook's names belong to another distribution, by that one's own record.

A fork under another name puts its files where ours go; so may anybody.
"""

from __future__ import annotations

import csv
import os
import posixpath

from . import contents
from .disk import Disk

#: Where installers write down what they put in: wheels, and ``setup.py install`` of old.
RECORDS = ((".dist-info", "RECORD"), (".egg-info", "installed-files.txt"))

#: A record without one of these in it needs no parsing; torch's alone has 15,000 lines.
_OUR_NAMES = (b"sglang_injector", b"sglang_patch_loader", b"sglang_weight_hook")


def owned(disk: Disk) -> dict[str, str]:
    """Files at our names, there and listed by another distribution; with its name."""
    found: dict[str, str] = {}
    for directory in disk.names(""):
        if contents.DIST_INFO.fullmatch(directory):
            continue
        for end, name in RECORDS:
            if not directory.endswith(end):
                continue
            data = disk.read(f"{directory}/{name}") or b""
            if not any(ours in data for ours in _OUR_NAMES):
                continue
            # Wheels count from purelib, the others from the directory of the record.
            start = disk.purelib if end == ".dist-info" else disk.absolute(directory)
            for listed, _ in rows(data):
                path = os.path.relpath(os.path.join(start, listed), disk.purelib)
                path = posixpath.normpath(path)
                if contents.is_ours(path) and disk.exists(path):
                    found[path] = directory[: -len(end)]
    return found


def rows(data: bytes) -> list[tuple[str, str]]:
    """Paths and hashes (empty where there is none) of a RECORD, as far as it can be read."""
    found: list[tuple[str, str]] = []
    # No path has a NUL, and it stops the csv module of Python 3.9 and 3.10.
    lines = [line for line in data.decode(errors="replace").splitlines() if "\0" not in line]
    try:
        for row in csv.reader(lines):
            if row and row[0]:
                found.append((row[0], row[1] if len(row) > 1 else ""))
    except csv.Error:
        # A field beyond any length; whatever follows was not written by an installer.
        pass
    return found
