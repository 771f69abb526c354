"""The interpreter that runs this, and what its purelib holds of the hook now.

Nothing here changes anything.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.machinery
import importlib.metadata
import json
import os
import posixpath
import sys
import sysconfig
from dataclasses import dataclass, field

from . import Refusal, contents
from .disk import TEMPORARY, Disk

#: Written before an installation changes anything, removed after it is verified.
JOURNAL = ".sglang-weight-hook-journal.json"


def purelib() -> str:
    """Where this interpreter keeps pure Python packages.

    Asked of the interpreter itself, which knows about Debian's dist-packages, lib64 layouts
    and virtual environments.  It must not run under ``-S``: up to 3.13 it is ``site`` that
    tells a virtual environment from the Python it was made from.
    """
    place = sysconfig.get_path("purelib")
    if not os.path.isdir(place):
        # Made by us, it would have to be removed by us; and a Python that lacks it is most
        # often one that was found by mistake.
        raise Refusal(f"{place}, where {sys.executable} keeps its packages, does not exist.")
    return place


def externally_managed() -> bool:
    """PEP 668: the distribution owns this Python's packages, and it is no virtual environment."""
    if sys.prefix != sys.base_prefix:
        return False
    return os.path.exists(os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED"))


def sglang() -> str | None:
    """The version of SGLang here ("of unknown version" where it does not say), or nothing.

    Found without importing it, and without asking other finders, which may import.
    """
    with contextlib.suppress(Exception):
        return importlib.metadata.version("sglang")
    with contextlib.suppress(Exception):
        if importlib.machinery.PathFinder.find_spec("sglang") is not None:
            return "of unknown version"
    return None


@dataclass
class Present:
    """What is there of the hook.  All paths are relative to purelib."""

    #: The dist-info directories of the hook, and the versions in their names.
    dist_infos: list[str] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)
    #: If another installer is the owner: its name (pip, uv) and the version it put in.
    foreign: tuple[str, str] | None = None
    #: Files that are ours, of any version, with every .pyc that came from them.
    files: set[str] = field(default_factory=set)
    #: Directories that may be removed once they are empty, the deepest first.
    directories: list[str] = field(default_factory=list)
    #: Half-written files of interrupted runs.
    temporaries: list[str] = field(default_factory=list)
    #: An installation was interrupted.
    unfinished: bool = False
    #: Whether purelib had a __pycache__ before the hook came.
    pycache_existed: bool = True

    @property
    def anything(self) -> bool:
        return bool(self.files or self.dist_infos or self.temporaries or self.unfinished)


def survey(disk: Disk, root: str) -> Present:
    present = Present()
    remembered: list[bool] = []
    claimed = set(contents.ROOT_FILES)
    # Files of this very release are ours with or without a record: the record may be what an
    # interrupted run, or a manual rm, took first.
    claimed.update(contents.sources(root))

    if disk.exists(JOURNAL):
        present.unfinished = True
        journal = _json(disk.read(JOURNAL))
        claimed.update(path for path in _strings(journal.get("files")) if contents.is_ours(path))
        remembered += _memory(journal)

    for name in disk.names(""):
        found = contents.DIST_INFO.fullmatch(name)
        if found is None:
            continue
        present.dist_infos.append(name)
        present.versions.append(found.group(1))
        installer = (disk.read(f"{name}/INSTALLER") or b"").decode(errors="replace").strip()
        if installer and installer != contents.INSTALLER:
            present.foreign = (installer, found.group(1))
        remembered += _memory(_json(disk.read(f"{name}/{contents.STATE}")))
        claimed.update(path for path, _ in record(disk, name) if contents.is_ours(path))
        # Everything directly in it is ours too, listed or not: the directory bears our name.
        claimed.update(
            path
            for path in (f"{name}/{entry}" for entry in disk.names(name))
            if not os.path.isdir(disk.absolute(path))
        )

    compiled = {path for source in claimed for path in _compiled_from(disk, source)}
    claimed |= compiled
    present.files = {path for path in claimed if disk.exists(path)}
    present.pycache_existed = remembered[0] if remembered else _pycache_is_others(disk, compiled)

    # The one __pycache__ that may belong to others is left to `pycache_existed`.
    directories = contents.directories(claimed) - {"__pycache__"}
    present.directories = sorted(directories, key=lambda path: (-path.count("/"), path))
    present.temporaries = [
        posixpath.join(directory, name)
        for directory in ("", "__pycache__", *present.directories)
        for name in disk.names(directory)
        if TEMPORARY.fullmatch(name)
    ]
    return present


def record(disk: Disk, dist_info: str) -> list[tuple[str, str]]:
    """Paths and hashes (empty where there is none) of a RECORD; nothing where it is missing."""
    text = (disk.read(f"{dist_info}/RECORD") or b"").decode(errors="replace")
    return [(row[0], row[1]) for row in csv.reader(text.splitlines()) if len(row) >= 2]


def refuse_odd_places(disk: Disk, paths: set[str]) -> None:
    """Refuse to work through a symbolic link, or where a directory and a file changed roles.

    The package may have been linked to a checkout, or the link planted: in either case its
    target is not ours to write or to remove.
    """
    for directory in sorted(contents.directories(paths)):
        place = disk.absolute(directory)
        if os.path.islink(place):
            raise Refusal(f"{place} is a symbolic link; remove it first.")
        if os.path.lexists(place) and not os.path.isdir(place):
            raise Refusal(f"{place} is not a directory; remove it first.")
    for path in sorted(paths):
        place = disk.absolute(path)
        if os.path.lexists(place) and not (os.path.islink(place) or os.path.isfile(place)):
            raise Refusal(f"{place} is not a file; remove it first.")


def _compiled_from(disk: Disk, source: str) -> list[str]:
    if not source.endswith(".py"):
        return []
    directory = posixpath.join(posixpath.dirname(source), "__pycache__")
    name = contents.compiled_name(source)
    return [
        posixpath.join(directory, entry) for entry in disk.names(directory) if name.fullmatch(entry)
    ]


def _pycache_is_others(disk: Disk, ours: set[str]) -> bool:
    """Without a memory of the time before: is there a __pycache__ with a life of its own?

    One that holds our files alone was made when an interpreter compiled them.
    """
    if not disk.exists("__pycache__"):
        return False
    names = {f"__pycache__/{name}" for name in disk.names("__pycache__")}
    return not names or not names <= ours


def _json(data: bytes | None) -> dict[str, object]:
    with contextlib.suppress(ValueError):
        value = json.loads(data or b"{}")
        if isinstance(value, dict):
            return value
    return {}


def _memory(state: dict[str, object]) -> list[bool]:
    existed = state.get("pycache_existed")
    return [existed] if isinstance(existed, bool) else []


def _strings(value: object) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []
