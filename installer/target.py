"""The interpreter that runs this, and what its purelib holds of the hook now.

Nothing here changes anything.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.metadata
import json
import os
import posixpath
import sys
import sysconfig
from dataclasses import dataclass, field

from . import Refusal, contents, ownership
from .disk import LOCK, TEMPORARY, Disk

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
    #: An installation or removal runs, or was killed before it changed anything.
    locked: bool = False
    #: Whether purelib had a __pycache__ before the hook came.
    pycache_existed: bool = True
    #: Directories at our names that were there before the hook came.
    directories_existed: list[str] = field(default_factory=list)
    #: Files at our names that another distribution's RECORD lists, with its name and version;
    #: of these, the ones that a record of ours lists too.
    owned: dict[str, str] = field(default_factory=dict)
    contested: set[str] = field(default_factory=set)
    #: Files at our names that no record of ours lists and that are not this release's.
    unknown: set[str] = field(default_factory=set)

    @property
    def anything(self) -> bool:
        return bool(
            self.files or self.contested or self.dist_infos or self.temporaries or self.unfinished
        )

    @property
    def state(self) -> dict[str, object]:
        """What has to be remembered of the time before the hook came."""
        return {
            "pycache_existed": self.pycache_existed,
            "directories_existed": self.directories_existed,
        }

    def take_over(self) -> None:
        """Count what belongs to others, or to nobody known, as ours (``--force``)."""
        self.files |= {*self.owned, *self.unknown}
        self.owned, self.unknown = {}, set()


def survey(disk: Disk, root: str) -> Present:
    present = Present(locked=disk.exists(LOCK))
    memories: list[dict[str, object]] = []
    recorded: set[str] = set()

    if disk.exists(JOURNAL):
        present.unfinished = True
        journal = _json(disk.read(JOURNAL))
        recorded.update(path for path in _strings(journal.get("files")) if contents.is_ours(path))
        memories.append(journal)

    for name in disk.names(""):
        found = contents.DIST_INFO.fullmatch(name)
        if found is None or not disk.is_directory(name):
            continue
        present.dist_infos.append(name)
        present.versions.append(found.group(1))
        installer = _one_line(disk.read(f"{name}/INSTALLER"))
        if installer and installer != contents.INSTALLER:
            present.foreign = (installer, found.group(1))
        memories.append(_json(disk.read(f"{name}/{contents.STATE}")))
        recorded.update(path for path, _ in record(disk, name) if contents.is_ours(path))
        recorded.update(f"{name}/{entry}" for entry in contents.METADATA_FILES)

    owned = ownership.owned(disk)
    present.contested = recorded & owned.keys()
    sources = set(contents.sources(root))
    claimed = (recorded | _unrecorded(disk, sources, root, recorded)) - owned.keys()
    unknown = {path for path in sources - claimed if disk.exists(path)}
    present.owned, present.unknown = owned, unknown - owned.keys()
    # Compiled files go with their source.  Those that have none any more are what a removal by
    # another tool leaves, and no interpreter looks at them.
    compiled = _all_compiled_from(disk, claimed | sources)
    compiled -= _all_compiled_from(disk, unknown | owned.keys()) | owned.keys()
    claimed |= compiled
    present.files = {path for path in claimed if disk.exists(path)}

    remembered = _memory(memories)
    if remembered is None:
        present.pycache_existed = _pycache_is_others(disk, compiled)
        places = contents.directories(sources) - contents.directories(present.files)
        present.directories_existed = sorted(place for place in places if disk.exists(place))
    else:
        present.pycache_existed, present.directories_existed = remembered

    # The one __pycache__ that may belong to others is left to `pycache_existed`.
    directories = contents.directories(claimed) - {"__pycache__"}
    directories -= set(present.directories_existed)
    present.directories = sorted(directories, key=lambda path: (-path.count("/"), path))
    present.temporaries = [
        posixpath.join(directory, name)
        for directory in sorted({"", "__pycache__", *contents.directories(claimed | sources)})
        for name in disk.names(directory)
        if TEMPORARY.fullmatch(name) and disk.is_plain(posixpath.join(directory, name))
    ]
    return present


def _unrecorded(disk: Disk, sources: set[str], root: str, recorded: set[str]) -> set[str]:
    """Files at our names that are ours without a record: an interrupted run, or a manual rm,
    may have taken it first, and the prototype never had one.

    They are known by what they hold, or by the start-up line in front of them, which names
    the loader: no other program has a use for that line under that name.
    """
    if (disk.read(contents.PTH) or b"").startswith(b"import sglang_patch_loader"):
        return {path for path in sources if disk.exists(path)}
    return {
        path
        for path in sources - recorded
        if disk.read(path) == contents.source(root, path) and disk.exists(path)
    }


def record(disk: Disk, dist_info: str) -> list[tuple[str, str]]:
    """Paths and hashes (empty where there is none) of a RECORD; nothing where it is missing."""
    return ownership.rows(disk.read(f"{dist_info}/RECORD") or b"")


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
    for path in sorted({*paths, JOURNAL}):
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


def _all_compiled_from(disk: Disk, sources: set[str]) -> set[str]:
    return {path for source in sources for path in _compiled_from(disk, source)}


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


def _memory(states: list[dict[str, object]]) -> tuple[bool, list[str]] | None:
    """What the first of these states that knows it tells of the time before the hook."""
    for state in states:
        existed = state.get("pycache_existed")
        if isinstance(existed, bool):
            return existed, _strings(state.get("directories_existed"))
    return None


def _one_line(data: bytes | None) -> str:
    """What another tool wrote about itself, fit for a sentence."""
    lines = (data or b"")[:200].decode(errors="replace").split("\n")
    return "".join(letter for letter in lines[0] if letter.isprintable()).strip()


def _strings(value: object) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []
