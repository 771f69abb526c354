"""What ``doctor`` says of transfer engines and other subscribers: what is here, what failed there.

No engine is imported: a package is looked for by its metadata, a library by the dynamic loader.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

from ..layout import files, variables
from ..layout.engines import BY_NAME, ENGINES, Engine, for_gpus
from ..reader import HookError, Slot, open_directory
from ..reader.files import read_json

# More slots than these are as these are.
_SLOTS = 8


def installed(data: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """A level (`good`, `note`, `bad`) and a sentence for each engine and each named subscriber."""
    named = [word.strip() for word in (os.environ.get(variables.SUBSCRIBERS) or "").split(",")]
    data["engines"] = {}
    for engine in ENGINES:
        found = _found(engine)
        data["engines"][engine.name] = found
        yield from _of_engine(engine, found, engine.name in named)
    for name in dict.fromkeys(filter(None, named)):
        if name not in BY_NAME:
            yield from _of_other(name)


def _found(engine: Engine) -> dict[str, Any]:
    modules = [name for name in engine.modules if _has_module(name.split(".")[0])]
    missing = {
        library: package for library, package in engine.libraries if modules and not _loads(library)
    }
    return {
        "modules": modules,
        "version": _version(engine) if modules else None,
        "missing_libraries": missing,
    }


def _of_engine(engine: Engine, found: dict[str, Any], named: bool) -> Iterator[tuple[str, str]]:
    if not found["modules"]:
        how = f"pip install {engine.package} (with a GPU: {for_gpus(engine)})"
        if named:
            yield "bad", f"{engine.name} is a subscriber and is not installed here: {how}"
        else:
            yield "good", f"{engine.name} is not installed; to let other machines read: {how}"
    elif found["missing_libraries"]:
        wanted = ", ".join(f"{lib} ({deb})" for lib, deb in found["missing_libraries"].items())
        text = f"{engine.name} cannot be imported without libraries of Debian packages: {wanted}"
        yield "bad" if named else "note", text
    else:
        yield "good", f"{engine.name}: {found['version']}, module {found['modules'][0]}"


def _of_other(name: str) -> Iterator[tuple[str, str]]:
    module, colon, _ = name.partition(":")
    if not colon:
        known = ", ".join(BY_NAME)
        yield "bad", f"there is no subscriber {name!r}: known are {known}, module:factory"
    elif not _has_module(module.split(".")[0]):
        yield "bad", f"subscriber {name}: this interpreter has no module {module.split('.')[0]}"
    else:
        yield "good", f"subscriber {name}: its package is here"


def published(path: str) -> Iterator[tuple[str, str]]:
    """What the servers of an output directory say of their subscribers, where they say anything."""
    if not os.path.isdir(path):
        return
    try:
        slots = open_directory(path).slots()
    except HookError:
        return
    for slot in slots[:_SLOTS]:
        try:
            if slot.owner_alive():
                yield from _of_slot(slot)
        except HookError as error:
            yield (
                "note",
                f"slot {slot.name}: what it says of its subscribers is unreadable: {error}",
            )


def _of_slot(slot: Slot) -> Iterator[tuple[str, str]]:
    document = read_json(slot.path(files.TRANSPORT)) or {}
    engines = document.get("engines")
    engines = engines if isinstance(engines, dict) else {}
    for name, entry in engines.items():
        if not isinstance(entry, dict):
            continue
        state, problem = entry.get("state"), entry.get("problem")
        text = f"slot {slot.name}, {name}: {state}"
        if problem:
            yield "bad", f"{text}: {problem}"
        else:
            yield "good", f"{text}, {entry.get('regions')} regions ({entry.get('bytes')} bytes)"
        for warning in entry.get("warnings") or ():
            yield "note", f"slot {slot.name}, {name}: {warning}"
    told = slot.read_state().get("subscribers")
    for name, problem in (told if isinstance(told, dict) else {}).items():
        if problem is not None and not (engines.get(name) or {}).get("problem"):
            yield "bad", f"slot {slot.name}, subscriber {name}: {problem}"


def _has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _version(engine: Engine) -> str:
    for package in (engine.package, *engine.packages_for_gpus):
        try:
            return f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "a version that no package tells"
