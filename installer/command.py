"""The two scripts: what they check, do, say, and return.

Longer than 500 lines because the order of checks, writes and words of both scripts is one story.

Exit status: 0 done (or all good), 1 refused or failed (or not all good), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import json
import os
import signal
import sys
from collections.abc import Iterable

from . import Refusal, compiled, contents, liveness, target
from .disk import LOCK, Disk, Kept

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
UNINSTALLER = "uninstall_sglang_hook_patch.sh"


_HINT = "; launch_wrapper.py runs SGLang with the hook and installs nothing"


class _Stopped(BaseException):
    """A signal asks us to end; work that was begun is taken back on the way out."""


def main(arguments: list[str]) -> int:
    options = _parse(arguments)
    script = UNINSTALLER if options.action == "uninstall" else contents.INSTALLER
    # A path that the terminal's encoding lacks is shown with escapes, not with a traceback.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    try:
        if options.check:
            return check()
        if options.action == "uninstall":
            return uninstall(options.dry_run, options.force)
        return install(options.dry_run, options.force)
    except Refusal as refusal:
        _complain(f"{script}: {refusal}")
        return 1
    except OSError as error:
        hint = "" if options.action == "uninstall" else _HINT
        _complain(f"{script}: {_why(error, hint)}")
        return 1
    except (KeyboardInterrupt, _Stopped):
        _complain(f"{script}: interrupted.")
        return 1


def install(dry_run: bool, force: bool) -> int:
    purelib = target.purelib()
    if target.externally_managed() and not force:
        raise Refusal(
            f"{sys.executable} is managed by the operating system (PEP 668); use a virtual "
            "environment, or --force to install into it all the same."
        )
    _refuse_if_read_only(purelib)
    disk = Disk(purelib)
    with contextlib.nullcontext() if dry_run else disk.locked():
        present = target.survey(disk, ROOT)
        _refuse_if_foreign(present)
        files = contents.build(ROOT, purelib, present.state)
        wanted = {file.path for file in files}
        target.refuse_odd_places(disk, wanted | present.files)
        if force:
            present.take_over()
        _refuse_if_others(disk, present)

        intact = _is_intact(disk, present, files)
        # What interpreters have compiled beside it goes, too, if anything has to be written:
        # whoever misses it makes it anew.
        obsolete = sorted(present.files - wanted, key=contents.removal_rank)
        release = contents.version(ROOT)
        if dry_run:
            if intact:
                _say(
                    f"{contents.DISTRIBUTION} {release} is installed and intact in {purelib}; "
                    "nothing would be written."
                )
            else:
                _say(f"Would install {contents.DISTRIBUTION} {release} into {purelib}")
                _list_changes([*present.temporaries, *obsolete], files)
            return 0

        _fact("Target", f"{sys.executable} (Python {sys.version.split()[0]})")
        _fact("", purelib)
        if intact:
            live = _examine(purelib, files)
            if not _is_enough(live, force):
                raise Refusal(
                    "every file is in place, but the hook is not live: "
                    f"{live.reason}{_remedy(live, ', or --force')}."
                )
            _fact("Installed", f"{contents.DISTRIBUTION} {release} already, every file intact")
        else:
            live = _replace(disk, present, files, obsolete, force)
            before = sorted(set(present.versions) - {release})
            _fact(
                "Installed",
                f"{contents.DISTRIBUTION} {release}, {len(files)} files"
                + (f", in place of {', '.join(before)}" if before else ""),
            )
    _report_live(live)
    return 0


def _is_intact(disk: Disk, present: target.Present, files: list[contents.File]) -> bool:
    """Whether these files are there as they would be written, and no other that may be wrong."""
    if present.temporaries or present.unfinished:
        return False
    told = compiled.verdicts(disk, {path for path in present.files if _is_compiled(path)})
    wanted = {file.path for file in files}
    # A .pyc differs by the time that is in it: its code is compared.
    return all(
        told.get(path) == compiled.GOOD and contents.compiled_source(path) in wanted
        for path in present.files - wanted
    ) and all(
        told.get(file.path) == compiled.GOOD
        if file.path.endswith(".pyc")
        else disk.read(file.path) == file.data
        for file in files
    )


def _list_changes(removed: list[str], written: list[contents.File]) -> None:
    """What `install` would do, for --dry-run."""
    for path in removed:
        _say(f"  remove {path}")
    for file in written:
        _say(f"  write  {file.path}")


def _examine(purelib: str, files: list[contents.File]) -> liveness.Liveness:
    return liveness.examine(purelib, contents.modules(file.path for file in files))


def _is_enough(live: liveness.Liveness, force: bool) -> bool:
    # Another user's programs, or this one's under another HOME, may well be without the copy
    # that comes first here.
    return live.good or (force and live.shadowed)


def _remedy(live: liveness.Liveness, otherwise: str = "") -> str:
    if not live.shadowed:
        return ""
    return f"; remove that copy first (with pip uninstall, if pip installed it){otherwise}"


def _report_live(live: liveness.Liveness) -> None:
    """The last facts of an installation whose hook was seen to be live."""
    _fact("Live", "in a fresh interpreter and in a spawned child")
    if live.shadowed:
        _fact("Not live", live.reason, good=False)
    version = target.sglang()
    _fact(
        "SGLang",
        f"{version}" if version else "not in this environment yet; the hook will wait for it",
    )
    if os.environ.get(liveness.OFF_SWITCH) == "0":
        _fact("Note", f"{liveness.OFF_SWITCH}=0 is set in this shell: here the hook stays off")


def _replace(
    disk: Disk,
    present: target.Present,
    files: list[contents.File],
    obsolete: list[str],
    force: bool,
) -> liveness.Liveness:
    """Bring in `files`, take out `obsolete`, verify; or put everything back as it was."""
    wanted = {file.path for file in files}
    before: dict[str, Kept | None] = {path: disk.keep(path) for path in wanted | present.files}
    journal = {**present.state, "files": sorted(before)}
    had_directories = {path for path in contents.directories(before) if disk.exists(path)}
    # Of an earlier run that was killed; it is still needed if this one fails.
    before_journal = disk.keep(target.JOURNAL)
    try:
        # First of all the journal.  If we are killed from here on, the next run of either
        # script finds in it what may lie around.
        disk.write(target.JOURNAL, json.dumps(journal).encode())
        disk.flush([""])
        for path in present.temporaries:
            disk.remove(path)
        # An interpreter that starts meanwhile goes without the hook, rather than with the
        # loader of one version and the library of another.
        for path in (contents.PTH, contents.START):
            disk.remove(path)
        disk.flush([""])
        for path in obsolete:
            disk.remove(path)
        directories = contents.directories(wanted)
        for file in files:
            if file.path == contents.START:
                # What every interpreter imports is on the disk before the line that says so.
                disk.flush(["", *directories])
            disk.write(file.path, file.data, file.mtime * 10**9)
        for directory in present.directories:
            if directory not in contents.directories(wanted):
                disk.remove_directory(directory)
        disk.flush([""])
        live = _examine(disk.purelib, files)
        if not _is_enough(live, force):
            raise Refusal(
                "nothing was installed, because the hook was not live: "
                f"{live.reason}{_remedy(live, ', or --force')}."
            )
        disk.remove(target.JOURNAL)
        disk.flush([""])
    except BaseException as error:
        _put_back(disk, before, had_directories, before_journal)
        if isinstance(error, OSError):
            raise Refusal(f"nothing was installed: {_why(error, _HINT)}") from error
        raise
    return live


def _put_back(
    disk: Disk,
    before: dict[str, Kept | None],
    had_directories: set[str],
    before_journal: Kept | None,
) -> None:
    """Undo what `_replace` did so far; a second signal does not stop it half-way."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        for path in sorted(before, key=contents.removal_rank):
            if before[path] is None or path in (contents.PTH, contents.START):
                disk.remove(path)
        for path in sorted(before, key=contents.rank):
            kept = before[path]
            if path == contents.START:
                disk.flush(["", *contents.directories(before)])
            if kept is not None and disk.keep(path) != kept:
                disk.put_back(path, kept)
        for directory in sorted(
            contents.directories(before) - had_directories, key=len, reverse=True
        ):
            disk.remove_directory(directory)
        if before_journal is None:
            disk.remove(target.JOURNAL)
        else:
            disk.put_back(target.JOURNAL, before_journal)
    except OSError as error:
        raise Refusal(
            f"the installation failed and could not be undone completely ({_why(error)}); run "
            f"this script or {UNINSTALLER} again to finish."
        ) from error


def uninstall(dry_run: bool, force: bool) -> int:
    """Longer than 60 lines because each refusal has to come before the first removal."""
    purelib = target.purelib()
    disk = Disk(purelib)
    present = target.survey(disk, ROOT)
    _refuse_if_foreign(present)
    if not (present.anything or present.locked):
        # Said without the lock, which only those can take who may write there.
        return _nothing_to_remove(disk, present)
    _refuse_if_read_only(purelib)
    with contextlib.nullcontext() if dry_run else disk.locked():
        present = target.survey(disk, ROOT)
        _refuse_if_foreign(present)
        if force:
            present.files |= present.contested
            present.owned = {
                path: owner
                for path, owner in present.owned.items()
                if path not in present.contested
            }
        elif present.contested:
            raise Refusal(
                f"{_named(disk, present.contested)} {_belongs(present, present.contested)} too, "
                "by its RECORD; uninstall that first, or --force removes the files from it as well."
            )
        if not present.anything:
            return _nothing_to_remove(disk, present)
        target.refuse_odd_places(disk, present.files)
        paths = sorted(present.files, key=contents.removal_rank)
        if dry_run:
            _say(f"Would remove {contents.DISTRIBUTION} from {purelib}")
            for path in [*paths, *present.temporaries]:
                _say(f"  remove {path}")
            return 0

        # Nothing is written, so this works on a full disk too.  The order is what makes it
        # safe to be killed: the .pth goes first, and the records of the other files go last.
        records = [path for path in paths if path.partition("/")[0] in present.dist_infos]
        for path in paths:
            if path not in records:
                disk.remove(path)
                if path in (contents.PTH, contents.START):
                    # Off the disk before the loader goes that every interpreter imports.
                    disk.flush([""])
        for path in present.temporaries:
            disk.remove(path)
        emptied = [path for path in present.directories if path not in present.dist_infos]
        if not present.pycache_existed:
            emptied.append("__pycache__")
        left = [path for path in emptied if not disk.remove_directory(path)]
        for path in records:
            disk.remove(path)
        left += [path for path in present.dist_infos if not disk.remove_directory(path)]
        disk.remove(target.JOURNAL)
        disk.flush([""])

    _fact("Target", f"{sys.executable} (Python {sys.version.split()[0]})")
    _fact("", purelib)
    version = f" {present.versions[0]}" if present.versions else ""
    _fact("Removed", f"{contents.DISTRIBUTION}{version}, {len(paths)} files")
    for path in left:
        _fact("Left", f"{path}, which holds files that the hook did not install")
    _report_left(disk, present)
    _report_still_live()
    return 0


def _nothing_to_remove(disk: Disk, present: target.Present) -> int:
    _say(f"{contents.DISTRIBUTION} is not installed in {disk.purelib}; nothing to do.")
    _report_left(disk, present)
    _report_still_live()
    return 0


def _report_left(disk: Disk, present: target.Present) -> None:
    for path, owner in sorted(present.owned.items()):
        if disk.exists(path):
            _fact("Left", f"{path}, which belongs to {owner} by its RECORD")
    for path in sorted(present.unknown):
        _fact("Left", f"{path}, which no record says is the hook's, and which is not this release")


def _report_still_live() -> None:
    place = liveness.still_live()
    if place:
        _fact("Still live", f"in this user's interpreters, from {place}; that copy", good=False)
        _fact("", "goes with pip uninstall, or with this script run by the Python that it is in")


def check() -> int:
    purelib = target.purelib()
    disk = Disk(purelib)
    disk.wait_for_others()
    present = target.survey(disk, ROOT)
    _fact("Target", f"{sys.executable} (Python {sys.version.split()[0]})")
    _fact("", purelib)
    if not present.anything:
        _fact("Installed", "no", good=False)
        return 1

    good = True
    if len(present.versions) == 1 and not present.unfinished:
        method = present.foreign[0] if present.foreign else contents.INSTALLER
        _fact("Installed", f"{contents.DISTRIBUTION} {present.versions[0]}, by {method}")
    else:
        good = False
        if present.unfinished or len(present.versions) > 1:
            reason = "an installation was interrupted"
        else:
            reason = "there are files, but no record of an installation"
        _fact("Installed", f"in part: {reason}; run {contents.INSTALLER} again", good=False)

    wrong, notes = _compare(disk, present)
    if wrong:
        good = False
        for line in wrong:
            _fact("Files", line, good=False)
    else:
        _fact("Files", f"{len(present.files)} intact")
    for line in notes:
        _fact("", line)
    for path, owner in sorted(present.owned.items()):
        good = False
        _fact("Files", f"{path} belongs to {owner}, by its RECORD", good=False)

    editable = any(_is_editable(disk, dist_info) for dist_info in present.dist_infos)
    live = liveness.examine(
        purelib,
        contents.LIBRARY if editable else contents.modules(_listed(disk, present)),
        editable,
    )
    for where, reason in (
        ("a fresh interpreter", live.fresh),
        ("a spawned child", live.child),
        ("an interpreter as this user starts it", live.usual),
    ):
        _fact("Live", f"in {where}: {reason or 'yes'}", good=not reason)
    version = target.sglang()
    _fact("SGLang", version if version else "not in this environment yet")
    return 0 if good and live.good else 1


def _compare(disk: Disk, present: target.Present) -> tuple[list[str], list[str]]:
    """Every file with its record, and each compiled one with its source: faults, and notes."""
    wrong: list[str] = []
    hashes: dict[str, str] = {}
    absent = 0
    for dist_info in present.dist_infos:
        recorded = target.record(disk, dist_info)
        listed = {path for path, _ in recorded}
        wrong += [
            f"{dist_info}/RECORD lacks {name}"
            for name in contents.ROOT_FILES
            if name not in listed and not _is_editable(disk, dist_info)
        ]
        for path, expected in recorded:
            # pip records the console script too, outside purelib, by "../../../bin/...".
            hashes[os.path.normpath(path)] = expected
            # An interpreter that misses a compiled file makes it again.
            absent += path.endswith(".pyc") and not disk.exists(path)
    if not any(hashes.values()):
        wrong.append("RECORD has no hashes to compare with")
    for path, expected in sorted(hashes.items()):
        if not expected:
            continue
        data = disk.read(path)
        if data is None:
            wrong.append(f"{path} is missing")
        elif contents.digest(data) != expected:
            wrong.append(f"{path} was changed")

    told = compiled.verdicts(disk, {path for path in present.files if _is_compiled(path)})
    wrong += [
        f"{path} is in no RECORD"
        for path in sorted(present.files - hashes.keys() - told.keys())
        if path.partition("/")[0] not in present.dist_infos
    ]
    wrong += [
        f"{path} is not what its source compiles to"
        for path, verdict in sorted(told.items())
        if verdict == compiled.DAMAGED
    ]
    notes = []
    for number, text in (
        (absent, "absent; Python compiles their sources again"),
        (sum(verdict == compiled.STALE for verdict in told.values()),
         "older than their sources; Python compiles those again"),
        (sum(verdict == compiled.UNKNOWN for verdict in told.values()),
         "of other Pythons, not compared"),
    ):  # fmt: skip
        if number:
            notes.append(f"of the compiled files, {number} {text}")
    return wrong, notes


def _listed(disk: Disk, present: target.Present) -> list[str]:
    return [path for name in present.dist_infos for path, _ in target.record(disk, name)]


def _is_compiled(path: str) -> bool:
    return path.startswith("__pycache__/") or "/__pycache__/" in path


def _is_editable(disk: Disk, dist_info: str) -> bool:
    return b'"editable": true' in (disk.read(f"{dist_info}/direct_url.json") or b"")


def _refuse_if_foreign(present: target.Present) -> None:
    if present.foreign is None:
        return
    installer, version = present.foreign
    word = installer.split()[0].lower()
    advice = {
        "pip": "pip uninstall {}",
        "uv": "uv pip uninstall {}",
        "poetry": "poetry remove {}",
        "pdm": "pdm remove {}",
        "conda": "conda remove {}",
    }.get(word)
    raise Refusal(
        f"{contents.DISTRIBUTION} {version} was installed here by {installer}; remove it with "
        + (f"`{advice.format(contents.DISTRIBUTION)}`." if advice else "that tool.")
    )


def _refuse_if_others(disk: Disk, present: target.Present) -> None:
    """Nothing is written over what somebody else may miss."""
    if present.owned:
        raise Refusal(
            f"{_named(disk, present.owned)} {_belongs(present, present.owned)}, by its RECORD; "
            "uninstall that first, or --force writes over its files."
        )
    if present.unknown:
        raise Refusal(
            f"{_named(disk, present.unknown)} lies where the hook is to go, and no record says "
            "that it is the hook's; move it away, or --force writes over it."
        )


def _named(disk: Disk, paths: Iterable[str]) -> str:
    first, *more = sorted(paths)
    return disk.absolute(first) + (f" (with {len(more)} more)" if more else "")


def _belongs(present: target.Present, paths: Iterable[str]) -> str:
    return "belongs to " + ", ".join(sorted({present.owned[path] for path in paths}))


def _refuse_if_read_only(purelib: str) -> None:
    # For everyone but root.  Read-only mounts and immutable directories show themselves at
    # the first write, before anything has changed; see `_why`.
    if not os.access(purelib, os.W_OK | os.X_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), purelib)


def _why(error: OSError, hint: str = "") -> str:
    """An operating system's refusal as one sentence."""
    place = str(error.filename or "a file")
    if place.endswith(".tmp") or os.path.basename(place) == LOCK:
        place = os.path.dirname(place)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{place} cannot be written ({error.strerror}){hint}."
    return f"{error.strerror or error} ({place})."


def _parse(arguments: list[str]) -> argparse.Namespace:
    """The shell scripts have read ``--python`` and ``--help``; all other options are handed on."""
    parser = argparse.ArgumentParser(prog="installer", add_help=False, allow_abbrev=False)
    parser.add_argument("action", choices=("install", "uninstall"))
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--force", action="store_true")
    return parser.parse_args(arguments)


def _stop(number: int, frame: object) -> None:
    raise _Stopped


def _fact(label: str, text: str, good: bool = True) -> None:
    """One line of the report, with its label in colour if a person is looking."""
    # sys.stdout is None where file descriptor 1 is closed, whatever its type says.
    colour = bool(sys.stdout) and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    padded = f"{label:<10}"
    if colour and label:
        padded = f"\033[{32 if good else 31}m{padded}\033[0m"
    _say(f"{padded} {text}")


def _say(text: str) -> None:
    try:
        print(text, flush=True)
    except OSError:
        # A closed pipe (`head`) or a full disk must not undo an installation; what Python
        # still flushes at exit needs a valid descriptor.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _complain(text: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        print(text, file=sys.stderr, flush=True)
