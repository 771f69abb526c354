"""Every kind of file at every name of an output directory, and everything that reads there.

    python -m tests.stress.planted_files GOOD WORK SEED [--long]

GOOD is a directory as a dead owner left it; here this process stands in for the owner, so that
what is read is live.  Each case runs in a forked child with little memory and a deadline.  Prints
one JSON object: how many cases there were, and what went wrong.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import os
import random
import resource
import select
import shutil
import signal
import socket
import stat
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

from sglang_weight_hook import reader
from sglang_weight_hook.commands import entry
from sglang_weight_hook.layout import files, process
from sglang_weight_hook.reader import verify
from tests.stress.processes import copy_documents

CONTROL = files.CONTROL.format(1)
NAMES = (
    *(name.format("0") for name in files.DOCUMENTS),
    *(name.format("0") for name in (files.OWNER_LOCK, files.SAVING_LOCK)),
    *(name.format("0") for name in (files.HEADER, files.EVENTS, files.EVENTS_BEFORE)),
    CONTROL,
)

MEMORY = 256 * 1024**2  # bytes that a case may take
DEADLINE = 20.0  # seconds for a case, of which it should need one
NOBODY = 65534
SWAPPING = 0.7  # seconds
GOOD_STATUS = (0, 1, 3)

# --- what is planted ------------------------------------------------------------------------


def folder(path: Path) -> None:
    path.mkdir()
    (path / "0").touch()


def zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def listening(path: Path) -> socket.socket:
    """A socket that never answers."""
    made = socket.socket(socket.AF_UNIX)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        made.bind(f"/proc/self/fd/{directory}/{path.name}")  # a socket's name must be short
    finally:
        os.close(directory)
    made.listen(64)
    return made


def device(path: Path) -> None:
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))  # zero(4)


def empty(path: Path) -> None:
    path.touch()


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 1024**3)


def noise(path: Path) -> None:
    path.write_bytes(random.Random(path.name).randbytes(5000))


def deep(path: Path) -> None:
    path.write_bytes(b'{"schema": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n")


def commands_of_a_terminal(path: Path) -> None:
    text = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\u202e"
    value = {"schema": text, "state": text, "kind": text, "updated_at": 1.0, text: [text]}
    path.write_text(json.dumps(value, ensure_ascii=False) + "\n" + text, encoding="utf-8")


def unreadable(path: Path) -> None:
    path.write_text("{}")
    path.chmod(0)


KINDS: tuple[Callable[[Path], Optional[socket.socket]], ...] = (
    *(os.mkfifo, folder, zero, dangling, loop, listening, device),
    *(empty, sparse, noise, deep, commands_of_a_terminal, unreadable),
)


def planted(kind: Callable[[Path], Any], path: Path) -> Optional[list[Any]]:
    """What has to be kept for it; None where it cannot be made here."""
    try:
        return [kind(path)]
    except OSError as error:
        if kind is device and error.errno in (errno.EPERM, errno.EACCES):
            return None
        raise


# --- what reads it --------------------------------------------------------------------------


def calls(place: Path) -> list[Callable[[], object]]:
    slot = reader.open_slot(str(place), "0")
    directory = reader.open_directory(str(place))

    def held(check: bool) -> None:
        with slot.weights_held(timeout=0.05, check=check, allow=("stale", "failed")):
            pass

    def document() -> None:
        found = slot.read(timeout=0)
        found.lookup(4096)
        found.owner_alive()
        _ = found.checked_at

    def polled() -> None:
        with slot.open_header() as header:
            _ = header.sequence
            header.read()

    return [
        slot.owner_alive,
        slot.liveness,
        slot.read_state,
        document,
        slot.header,
        polled,
        lambda: list(slot.history()),
        lambda: slot.check(timeout=0.1),
        lambda: held(False),
        lambda: held(True),
        lambda: slot.wait_for_change(timeout=0),
        lambda: list(slot.generations(timeout=0)),
        directory.slots,
        lambda: [list(history) for history in directory.histories()],
        lambda: list(directory.events(timeout=0)),
        lambda: verify.verify_slot(slot, timeout=0),
        lambda: reader.open_file(slot.path(files.LAYOUT)),
    ]


def commands(good: Path, place: Path) -> list[list[str]]:
    saved = str(good / files.LAYOUT.format("0"))
    page = str(place / "pages" / "page.html")
    at = ["--dir", str(place)]
    return [
        ["show", *at], ["show", "--json", *at],
        ["regions", *at], ["regions", "--json", *at],
        ["lookup", "0x1000", *at], ["lookup", "0x1000", "--json", *at],
        ["diff", saved, "0", *at], ["diff", "0", saved, "--json", *at],
        ["report", *at], ["report", "--json", *at],
        ["watch", "--timeout", "0", *at], ["watch", "--timeout", "0", "--json", *at],
        ["history", *at], ["history", "--json", *at],
        ["verify", *at], ["verify", "--json", *at], ["verify", "--live", *at],
        ["plot", "-o", page, *at], ["plot", "-o", page, "--before", saved, *at],
    ]  # fmt: skip


def run_command(arguments: list[str]) -> tuple[int, str, str]:
    """A command in this process: its status, and what it said on either stream."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    before, sys.argv = sys.argv, ["sglang-weight-hook", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = entry.main()
            for stream in (out, err):
                stream.flush()
    finally:
        sys.argv = before
    said = [stream.buffer.getvalue().decode() for stream in (out, err)]
    return status, said[0], said[1]


def is_command_of_a_terminal(letter: str) -> bool:
    return (ord(letter) < 32 and letter != "\n") or 127 <= ord(letter) < 160 or letter == "\u202e"


def problems_of_calls(place: Path) -> Iterator[str]:
    for number, call in enumerate(calls(place)):
        try:
            call()
        except reader.HookError:
            pass
        except BaseException:
            yield f"call {number}: {traceback.format_exc()}"


def problems_of_command(arguments: list[str]) -> Iterator[str]:
    what = " ".join(arguments[:2])
    try:
        status, out, err = run_command(arguments)
    except BaseException:
        yield f"{what}: {traceback.format_exc()}"
        return
    if status not in GOOD_STATUS:
        yield f"{what}: exit status {status}: {err}"
    if status == 1 and not err.strip():
        yield f"{what}: exit status 1 without a reason"
    if "Traceback" in out + err:
        yield f"{what}: {err}"
    for letter in filter(is_command_of_a_terminal, out + err):
        yield f"{what}: prints {letter!r}"
        break


# --- one case -------------------------------------------------------------------------------


def in_child(work: Callable[[], list[str]], as_nobody: bool) -> list[str]:
    """Run ``work`` in a child with little memory and a deadline; the problems that it found."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(ours)
            if as_nobody and os.geteuid() == 0:
                os.setgroups([])
                os.setresgid(NOBODY, NOBODY, NOBODY)
                os.setresuid(NOBODY, NOBODY, NOBODY)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
            found = work()
            with os.fdopen(theirs, "w") as pipe:
                pipe.write(json.dumps(found))
            status = 0
        finally:
            os._exit(status)
    os.close(theirs)
    data = b""
    deadline = time.monotonic() + DEADLINE
    with os.fdopen(ours, "rb", buffering=0) as pipe:
        while select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
            more = pipe.read(65536)
            if not more:
                break
            data += more
        else:
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if time.monotonic() >= deadline:
        return [f"not done after {DEADLINE:g} s"]
    return json.loads(data) if status == 0 else [f"ended with wait status {status}"]


class Place:
    """A copy of the good directory, of which this process is the owner."""

    def __init__(self, good: Path, path: Path) -> None:
        self.path = path
        copy_documents(good, path)
        path.chmod(0o755)
        (path / "pages").mkdir()
        (path / "pages").chmod(0o777)
        me = process.identity()
        for name, of in ((files.STATE, None), (files.LAYOUT, "identity")):
            document = path / name.format("0")
            value = json.loads(document.read_bytes())
            part = value if of is None else value[of]
            # The namespace is the layout's alone.
            part.update({key: me[key] for key in me if of or key != "pid_namespace"})
            if of is None:
                value["control"] = CONTROL
            document.write_text(json.dumps(value))
        self.lock = os.open(path / files.OWNER_LOCK.format("0"), os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(self.lock, fcntl.LOCK_EX)

    def close(self) -> None:
        os.close(self.lock)
        shutil.rmtree(self.path)


def case(good: Path, work: Path, name: str, kind: Any, chosen: list[int]) -> Optional[list[str]]:
    """The problems with one kind at one name; None where it cannot be planted here."""
    place = Place(good, work / "place")
    try:
        path = place.path / name
        path.unlink(missing_ok=True)
        kept = planted(kind, path)
        if kept is None:
            return None
        every = commands(good, place.path)

        def reads() -> list[str]:
            found = list(problems_of_calls(place.path))
            for number in chosen:
                found += problems_of_command(every[number % len(every)])
            return found

        found = in_child(reads, as_nobody=kind is unreadable)
        for each in kept:
            if each is not None:
                each.close()
        return found
    finally:
        place.close()


def swapped(good: Path, work: Path, name: str, kinds: list[Any], first: int) -> list[str]:
    """The problems while a name changes its kind all the time."""
    place = Place(good, work / "place")
    side = work / "side"
    side.mkdir()
    kept = [planted(kind, side / str(number)) for number, kind in enumerate(kinds)]
    path = place.path / name
    if path.exists():
        path.rename(side / "good")
    others = sorted(side.iterdir())
    every = commands(good, place.path)
    ended, told = os.pipe()
    swapper = os.fork()
    if swapper == 0:
        try:
            os.close(told)
            while not select.select([ended], [], [], 0)[0]:
                for other in others:
                    os.rename(other, path)
                    os.sched_yield()
                    os.rename(path, other)
        finally:
            os._exit(0)
    os.close(ended)

    def reads() -> list[str]:
        found: list[str] = []
        until = time.monotonic() + SWAPPING
        number = first
        while time.monotonic() < until and not found:
            found += problems_of_calls(place.path)
            found += problems_of_command(every[number % len(every)])
            number += 1
        return found

    try:
        return in_child(reads, as_nobody=False)
    finally:
        os.close(told)
        os.waitpid(swapper, 0)
        for each in kept:
            for made in each or ():
                if made is not None:
                    made.close()
        place.close()
        shutil.rmtree(side)


def unplanted(good: Path, work: Path) -> list[str]:
    """The problems where nothing is planted: there all of it has to succeed."""
    place = Place(good, work / "place")
    found: list[str] = []
    try:
        for number, call in enumerate(calls(place.path)):
            try:
                call()
            except reader.ControlError:  # nobody answers here
                pass
            except Exception:
                found.append(f"call {number}: {traceback.format_exc()}")
        for arguments in commands(good, place.path):
            status, out, err = run_command(arguments)
            # No tensor is at the address; an owner that cannot be asked is a finding; the saved
            # copy is of another process.
            if status not in ((0, 3) if arguments[0] in ("lookup", "verify", "diff") else (0,)):
                found.append(f"{arguments}: exit status {status}: {out}{err}")
        if not reader.open_slot(str(place.path), "0").owner_alive():
            found.append("this process is not taken for the owner")
    finally:
        place.close()
    return found


def main() -> None:
    good, work, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    is_long = "--long" in sys.argv
    chance = random.Random(seed)
    # A document that does not settle, or is not there yet, is not waited for.
    reader.Slot.read.__defaults__ = (0.0,)
    verify.verify_slot.__defaults__ = (0.0, False)
    cases = 0
    wrong = {"nothing planted": unplanted(good, work)}  # also imports all that the children need
    how_many = len(commands(good, work))
    for name in NAMES:
        for kind in KINDS:
            first = chance.randrange(how_many)
            chosen = list(range(how_many)) if is_long else [first, first + 7]
            found = case(good, work, name, kind, chosen)
            if found is not None:
                cases += 1
                wrong[f"{name}: {kind.__name__}"] = found
        pairs = [[kind] for kind in KINDS] if is_long else [chance.sample(KINDS, 3)]
        for kinds in pairs:
            cases += 1
            kinds = [kind for kind in kinds if kind is not device]
            what = ", ".join(kind.__name__ for kind in kinds)
            wrong[f"{name}: swapped with {what}"] = swapped(
                good, work, name, kinds, chance.randrange(how_many)
            )
    print(json.dumps({"cases": cases, "wrong": {k: v for k, v in wrong.items() if v}}))


if __name__ == "__main__":
    main()
