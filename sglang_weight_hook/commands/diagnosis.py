"""Diagnoses the hook and SGLang in this interpreter, without importing SGLang.

SGLang's files are parsed, never run: importing it takes seconds, may need a GPU, and would
activate the very hook that is being looked for.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from itertools import takewhile
from typing import Any, NamedTuple, Optional

from .. import __version__
from ..layout import location, variables
from . import memory_access, subscribed, torch_devices
from .sglang_gaps import gaps
from .sglang_sources import Sources

GOOD, NOTE, BAD = "good", "note", "bad"

DISTRIBUTION = "sglang-weight-hook"
SCRIPT = "install_sglang_hook_patch.sh"
LOADER = "sglang_patch_loader"
CORE = "sglang_weight_hook_patch_core"
PTH, START = "sglang_injector.pth", "sglang_injector.start"
PLUGINS = "sglang.srt.plugins"

OFF_SWITCH, DEBUG_SWITCH = variables.SWITCH, variables.DEBUG
PLUGINS_VARIABLE = "SGLANG_PLUGINS"  # SGLang's own: which plugins it loads


class Fact(NamedTuple):
    topic: str
    level: str  # `GOOD`, `NOTE` or `BAD`
    text: str


class Found(NamedTuple):
    """One entry point of the patch core's table, compared with the installed SGLang."""

    event: str
    name: str  # ``Class.method``
    module: str
    expected: bool  # whether this release should have it
    found: bool


class Diagnosis(NamedTuple):
    facts: list[Fact]
    entry_points: list[Found]
    data: dict[str, Any]

    @property
    def good(self) -> bool:
        return not any(fact.level == BAD for fact in self.facts)

    def as_dict(self) -> dict[str, Any]:
        return {
            "good": self.good,
            **self.data,
            "entry_points": [found._asdict() for found in self.entry_points],
            "facts": [fact._asdict() for fact in self.facts],
        }


def diagnose(directory: Optional[str] = None) -> Diagnosis:
    """Look at this interpreter.  ``directory``: where it would publish; default as a server's.

    Imports neither SGLang nor torch, and changes nothing.
    """
    facts: list[Fact] = []
    data: dict[str, Any] = {}
    facts += _interpreter(data)
    facts += _installed(data)
    facts += _active(data)
    entries: list[Found] = []
    facts += _sglang(data, entries)
    facts += _devices(data)
    facts += _environment(data)
    facts += [Fact("Subscribers", *found) for found in subscribed.installed(data)]
    facts += _directory(directory, data)
    facts += [Fact("Subscribers", *f) for f in subscribed.published(data["directory"]["path"])]
    facts += [Fact("Memory", *found) for found in memory_access.found_in(data["directory"]["path"])]
    return Diagnosis(facts, entries, data)


def say_plainly(as_json: bool) -> int:
    """The command ``doctor`` without the ``cli`` extra; its exit status."""
    found = diagnose()
    if as_json:
        lines = [json.dumps(found.as_dict(), indent=2)]
    else:
        words = {GOOD: "ok", NOTE: "note", BAD: "BAD"}
        lines = [f"{words[fact.level]:6}{fact.topic:12}  {fact.text}" for fact in found.facts]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0 if found.good else 3


# --- the interpreter and the hook -----------------------------------------------------------


def _interpreter(data: dict[str, Any]) -> Iterator[Fact]:
    data["interpreter"] = {
        "executable": sys.executable,
        "version": platform.python_version(),
        "prefix": sys.prefix,
        "no_site": bool(sys.flags.no_site),
    }
    yield Fact("Python", GOOD, f"{sys.executable} ({platform.python_version()})")
    if sys.flags.no_site:
        yield Fact("Python", BAD, "started with -S: no .pth file is run; leave -S away")


def _installed(data: dict[str, Any]) -> Iterator[Fact]:
    installations = [_installation(distribution) for distribution in _distributions()]
    place = sysconfig.get_path("purelib")
    loose = not installations and _has_file(place, PTH)
    # The directory that holds the package, as `place` of an installation is.
    here = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    data["hook"] = {"version": __version__, "library": here, "installed": installations}
    for found in installations:
        yield Fact(
            "Installed",
            GOOD,
            f"{DISTRIBUTION} {found['version']} by {found['door']}, {found['place']}",
        )
        # Editable installations are where their checkout is.
        if found["editable"]:
            continue
        if os.path.realpath(found["place"]) != os.path.realpath(here):
            yield Fact("Installed", NOTE, f"this command itself runs from {here} ({__version__})")
        pth = START if sys.version_info >= (3, 15) else PTH
        if not _has_file(found["place"], pth):
            yield Fact("Installed", BAD, f"{pth} is missing there; run {SCRIPT} again")
    if len(installations) > 1:
        yield Fact("Installed", NOTE, "more than once; Python uses the first on sys.path")
    if loose:
        yield Fact("Installed", BAD, f"in part, without a record, in {place}; run {SCRIPT} again")
    elif not installations and _is_active():
        yield Fact("Installed", NOTE, "no; active in this process alone (launch_wrapper.py)")
    elif not installations:
        yield Fact(
            "Installed", BAD, f"no; run ./{SCRIPT} --python {sys.executable} in the hook's checkout"
        )
    plugin = any(found["plugin"] for found in installations)
    allowed = os.environ.get(PLUGINS_VARIABLE)
    if plugin and allowed and "sglang_weight_hook" not in allowed.split(","):
        yield Fact(
            "Installed",
            NOTE,
            f"{PLUGINS_VARIABLE} excludes the hook as SGLang's plugin; only its .pth activates it",
        )


def _distributions() -> list[importlib.metadata.Distribution]:
    found: dict[str, importlib.metadata.Distribution] = {}
    with contextlib.suppress(Exception):
        for distribution in importlib.metadata.distributions(name=DISTRIBUTION):
            found.setdefault(str(distribution.locate_file("")), distribution)
    return list(found.values())


def _installation(distribution: importlib.metadata.Distribution) -> dict[str, Any]:
    installer = (distribution.read_text("INSTALLER") or "").strip() or "an unknown installer"
    editable = False
    with contextlib.suppress(ValueError, AttributeError):
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        editable = bool(origin.get("dir_info", {}).get("editable"))
    entry_points = distribution.read_text("entry_points.txt") or ""
    return {
        "version": distribution.version,
        "door": f"{installer} (editable)" if editable else installer,
        "place": os.path.normpath(str(distribution.locate_file(""))),
        "editable": editable,
        "plugin": PLUGINS in entry_points,
    }


def _is_active() -> bool:
    return any(map(_is_ours, sys.meta_path))


def _is_ours(finder: object) -> bool:
    return type(finder).__module__ == LOADER


def _in_front() -> list[str]:
    """The finders that precede ours on ``sys.meta_path``."""
    classes = [
        finder if isinstance(finder, type) else type(finder)
        for finder in takewhile(lambda finder: not _is_ours(finder), sys.meta_path)
    ]
    return [f"{found.__module__}.{found.__qualname__}" for found in classes]


def _has_file(folder: str, name: str) -> bool:
    return os.path.isfile(os.path.join(folder, name))


def _active(data: dict[str, Any]) -> Iterator[Fact]:
    module = sys.modules.get(LOADER)
    active = _is_active()
    data["hook"]["active"] = active
    data["hook"]["finders_in_front"] = _in_front() if active else []
    data["hook"]["loader"] = getattr(module, "__file__", None)
    if active:
        yield Fact("Active", GOOD, f"yes, it waits for SGLang ({data['hook']['loader']})")
        for name in data["hook"]["finders_in_front"]:
            text = f"{name} precedes the hook; SGLang modules that it finds itself are not hooked"
            yield Fact("Active", NOTE, f"{text} (SGLang 0.5.11 and later hooks them as a plugin)")
        yield from _other_copies(data)
    elif os.environ.get(OFF_SWITCH) == "0":
        yield Fact("Active", BAD, f"no: {OFF_SWITCH}=0 switches it off; unset that")
    elif module is not None:
        yield Fact("Active", BAD, "no: the loader was imported, but its finder was removed again")
    elif data["hook"]["installed"] and not sys.flags.no_site:
        yield Fact(
            "Active", BAD, f"no: the .pth file was not run, or failed; {DEBUG_SWITCH}=1 says why"
        )
    else:
        yield Fact("Active", BAD, "no: not installed, or Python runs with -S")


def _other_copies(data: dict[str, Any]) -> Iterator[Fact]:
    """Another loader than the one that belongs to this library, here or in a usual start."""
    loader, library = data["hook"]["loader"], data["hook"]["library"]
    editable = any(found["editable"] for found in data["hook"]["installed"])
    # An editable installation has its library in the checkout and its loader beside the .pth.
    if loader and not editable and not _same(os.path.dirname(loader), library):
        yield Fact(
            "Active",
            BAD,
            f"another copy is active, {loader}, while this library is in {library}; "
            "remove the one of the two that is not wanted",
        )
    flags = sys.flags
    if not (flags.isolated or flags.no_user_site or flags.ignore_environment):
        return
    usual = _loader_of_a_usual_start()
    data["hook"]["usual_loader"] = usual
    if usual and loader and not _same(usual, loader):
        yield Fact(
            "Active",
            BAD,
            f"Python started without -I, -E and -s loads another copy, {usual}; remove that copy",
        )


def _same(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _loader_of_a_usual_start() -> Optional[str]:
    """The loader that this user's programs start with: this process may pass over the user site.

    Without the variables of this shell, but for those that say where the user site is.
    """
    kept = ("PYTHONUSERBASE", "PYTHONNOUSERSITE")
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("PYTHON") or key in kept
    }
    look = f"import sys; print(ascii(sys.modules[{LOADER!r}].__file__))"
    try:
        done = subprocess.run(
            [sys.executable, "-B", "-c", look],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=environment,
            timeout=120,
            check=True,
        )
        # Other .pth files may have printed before.
        return str(ast.literal_eval(done.stdout.decode().splitlines()[-1]))
    except (OSError, ValueError, IndexError, SyntaxError, subprocess.SubprocessError):
        return None


# --- SGLang ---------------------------------------------------------------------------------


def _sglang(data: dict[str, Any], entries: list[Found]) -> Iterator[Fact]:
    version = None
    with contextlib.suppress(Exception):
        version = importlib.metadata.version("sglang")
    folders = _package_folders()
    data["sglang"] = {"version": version, "place": folders[0] if folders else None, "gaps": []}
    if not folders:
        yield Fact("SGLang", NOTE, "not in this environment; the hook waits for it")
        return
    yield Fact("SGLang", GOOD, f"{version or 'of unknown version'}, {folders[0]}")
    core = _core()
    if core is None:
        yield Fact(
            "SGLang", BAD, f"{CORE} cannot be imported, so nothing is patched; install again"
        )
        return
    release = version or "unknown"
    if _newer(core, release):
        yield Fact("SGLang", NOTE, f"newer than {core.NEWEST}, the newest tested release")
    source = Sources(folders)
    for entry in core.ENTRY_POINTS:
        entries.append(
            Found(
                event=entry.event,
                name=entry.name,
                module=entry.module,
                # Diffusion is a package of its own, which an environment may lack.
                expected=core._expected(entry, release)
                and source.exists(entry.module.split(".")[1]),
                found=source.defines(entry.module, entry.site[1], entry.method),
            )
        )
    lost = [found for found in entries if found.expected and not found.found]
    count = sum(found.found for found in entries)
    events = {found.event for found in entries if found.found}
    if not lost:
        yield Fact("Entry points", GOOD, f"{count} found, for {len(events)} kinds of event")
    else:
        yield Fact("Entry points", NOTE, f"{count} found, {len(lost)} missing")
    for found in lost:
        yield Fact(
            "Entry points",
            BAD,
            f"{found.name} is not in {found.module}: {found.event} will not be seen",
        )
    for gap, path in gaps(source, events):
        data["sglang"]["gaps"].append({"name": gap.name, "path": path, "text": gap.text})
        yield Fact("Known gap", NOTE, f"{gap.name} ({path}): {gap.text}")


def _devices(data: dict[str, Any]) -> Iterator[Fact]:
    found = torch_devices.found()
    data["torch"] = found._asdict()
    if found.torch is not None:
        yield Fact("Devices", NOTE if found.unasked else GOOD, found.text)


def _core() -> Optional[Any]:
    """The patch core, for its table; importing it patches nothing."""
    try:
        return importlib.import_module(CORE)
    except Exception:
        return None


def _newer(core: Any, version: str) -> bool:
    key = core.release_key(version)
    return bool(any(key[:3]) and key > core.release_key(core.NEWEST))


def _package_folders() -> list[str]:
    """Where SGLang's package lies.  A top-level name is found without importing anything."""
    for find in (importlib.machinery.PathFinder.find_spec, importlib.util.find_spec):
        with contextlib.suppress(Exception):
            spec = find("sglang")
            if spec is not None and spec.submodule_search_locations:
                return [path for path in spec.submodule_search_locations if os.path.isdir(path)]
    return []


# --- variables and the output directory -----------------------------------------------------


def _environment(data: dict[str, Any]) -> Iterator[Fact]:
    known = {variable.name: variable.default for variable in variables.VARIABLES}
    data["environment"] = {name: os.environ.get(name) for name in known}
    for name, default in known.items():
        value = os.environ.get(name)
        text = f"{name}={value}" if value is not None else f"{name} is not set ({default})"
        yield Fact("Variable", GOOD, text)
        if name in variables.DURATIONS and value and not _is_duration(value):
            unit = "milliseconds" if name == variables.QUIET_MS else "seconds"
            yield Fact("Variable", NOTE, f"{value!r} is no number of {unit}; {default} is used")
    for name in sorted(os.environ):
        if name.startswith(OFF_SWITCH) and name not in known:
            data["environment"][name] = os.environ[name]
            yield Fact("Variable", NOTE, f"{name} is set, but this release has no such variable")


def _is_duration(value: str) -> bool:
    return variables.duration_from(value, -1.0) >= 0.0


def _directory(directory: Optional[str], data: dict[str, Any]) -> Iterator[Fact]:
    value = directory if directory is not None else os.environ.get(location.DIRECTORY)
    path = location.directory_from(value, os.getcwd())
    there = path
    while not os.path.lexists(there) and there != os.path.dirname(there):
        there = os.path.dirname(there)
    writable = os.path.isdir(there) and os.access(there, os.W_OK | os.X_OK)
    data["directory"] = {"path": path, "exists": there == path, "writable": writable}
    if value and "{pid}" in value:
        yield Fact("Directory", NOTE, "{pid} is replaced in each server; to read, give --dir")
    if not writable:
        what = "cannot be written" if os.path.isdir(there) else "is not a directory"
        yield Fact(
            "Directory", BAD, f"{path}: {there} {what}; set {location.DIRECTORY} to a writable one"
        )
    elif there != path:
        yield Fact("Directory", GOOD, f"{path} (the server creates it)")
    else:
        yield Fact("Directory", GOOD, path)
