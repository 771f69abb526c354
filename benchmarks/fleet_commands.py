"""The command line over one directory with many slots, each published by a process of its own."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from sglang_weight_hook import reader
from sglang_weight_hook.layout import files, process
from sglang_weight_hook.publisher import publish

from . import table
from .fleet import SLOTS, TENSORS, directory
from .measure import Sample, rotated
from .table import Line, Section

REPOSITORY = Path(__file__).resolve().parents[1]
# Arguments, the baseline beside them, which clock the target is for, and the target in seconds.
COMMANDS = (
    ("verify", "parse everything", "wall", 2.0),
    ("report", "parse the layouts", "wall", 0.7),
    ("slots", "python -c pass", "cpu", 0.25),
    ("--help", "python -c pass", "cpu", 0.25),
)
_PARSE = (
    "import glob, json, sys\n"
    "for pattern in sys.argv[1:]:\n"
    "    for path in glob.glob(pattern):\n"
    "        json.loads(open(path, 'rb').read())\n"
)


def measure(quick: bool) -> Section:
    with directory() as place, owners(place):
        layouts = os.path.join(place, files.LAYOUT.format("*"))
        subjects = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "parse the layouts": [sys.executable, "-c", _PARSE, layouts],
            "parse everything": [sys.executable, "-c", _PARSE, os.path.join(place, "*.json")],
        }
        for word, *_ in COMMANDS:
            more = [] if word == "--help" else ["--dir", place]
            subjects[word] = [sys.executable, "-m", "sglang_weight_hook", word, *more]
        found = _interleaved(subjects, 3 if quick else 9)
        lines = []
        for word, baseline, clock, target in COMMANDS:
            what = word if word == "--help" else f"{word}, {SLOTS} slots"
            lines.append(_line(what, found[word], found[baseline], baseline, clock, target))
        return Section(f"The command over {SLOTS} slots", lines, HOW, LIMITS)


def _line(
    what: str,
    hook: dict[str, Sample],
    baseline: dict[str, Sample],
    name: str,
    clock: str,
    target: float,
) -> Line:
    def told(sample: dict[str, Sample]) -> str:
        return ", ".join(f"{table.seconds(sample[each].median)} {each}" for each in ("wall", "cpu"))

    measured = hook[clock].median
    return Line(
        f"{what}: the whole command",
        f"{told(hook)} n={hook[clock].n}",
        f"{name}: {told(baseline)}",
        f"{table.seconds(measured)} {clock}",
        f"≤ {table.seconds(target)} {clock}",
        measured <= target,
    )


def _interleaved(subjects: dict[str, list[str]], rounds: int) -> dict[str, dict[str, Sample]]:
    """Wall and CPU time of each, its children included; the order rotates from round to round."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    values: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in subjects}
    for number in range(rounds + 1):
        for name in rotated(subjects, number):
            started = time.perf_counter()
            child = subprocess.Popen(
                subjects[name], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
            assert child.stderr is not None
            said = child.stderr.read()
            _, status, usage = os.wait4(child.pid, 0)
            wall = time.perf_counter() - started
            child.returncode = os.waitstatus_to_exitcode(status)
            child.stderr.close()
            assert child.returncode == 0, f"{name}: {said.decode()}"
            if number:  # the first round compiles and fills caches
                values[name]["wall"].append(wall)
                values[name]["cpu"].append(usage.ru_utime + usage.ru_stime)
    return {
        name: {clock: Sample(each) for clock, each in clocks.items()}
        for name, clocks in values.items()
    }


@contextlib.contextmanager
def owners(place: str) -> Iterator[None]:
    """A process for each slot, which holds its lock and is named by its documents."""
    children: list[int] = []
    try:
        for slot in reader.open_directory(place).slots():
            pid = _owner(slot.path(files.OWNER_LOCK))
            children.append(pid)
            own = {"pid": pid, "process_start_ticks": process.start_ticks(pid)}
            for name in (files.LAYOUT, files.STATE):
                content = json.loads(Path(slot.path(name)).read_bytes())
                content.get("identity", content).update(own)
                content["state"] = "ready"
                publish.write_whole(slot.path(name), publish.encode(content, name != files.LAYOUT))
        yield
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _owner(lock: str) -> int:
    """A forked process that has locked ``lock``, and does nothing more until it is killed."""
    told, tell = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            fcntl.flock(os.open(lock, os.O_RDWR | os.O_CREAT, 0o644), fcntl.LOCK_EX)
            os.write(tell, b"1")
            while True:
                signal.pause()
        finally:
            os._exit(1)
    os.close(tell)
    with os.fdopen(told, "rb") as file:
        assert file.read(1)
    return pid


HOW = f"""\
The same {SLOTS} slots of {table.number(TENSORS)} tensors, each with a live process that holds its
owner lock. Each command is started as one types it, with its output thrown away; CPU time is that
of all its processes. Beside it the same interpreter that does nothing, or that parses the same
files with `json.loads`, one after the other, and does nothing with them."""
LIMITS = """\
`verify` and `report` use all cores of the machine (two here); the wall time of both rises with what
else runs on it. Half of what `report` does and a third of what `verify` does is parsing JSON with
the standard library."""
