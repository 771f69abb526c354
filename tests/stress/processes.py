"""What the scenarios share: processes under test, and what can be checked from outside.

No torch here: readers go without it here, as readers do.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Optional

from sglang_weight_hook.layout.files import CONTROL

ROOT = Path(__file__).resolve().parents[2]

TENSORS = 6

# The actions of faults.c, and its operations.
COUNT, KILL_BEFORE, KILL_AFTER, KILL_WITHIN, FAIL, LOSE_ANSWER, SHORTEN = range(7)
OPEN, WRITE, CLOSE, RENAME, UNLINK, MKDIR, FLOCK = (1 << bit for bit in range(7))


def length_at(generation: int) -> int:
    """The length of every tensor of `simulated_server.Weights` at a layout generation."""
    return 1000 + generation % 1000


def is_mixed(layout: Mapping[str, Any]) -> bool:
    """Whether a layout document of `simulated_server.Weights` is of more than one generation.

    An empty one is a map that was invalidated.
    """
    length = length_at(layout["layout_generation"])
    tensors = layout["tensors"].values()
    if not tensors:
        return bool(layout["regions"])
    sizes = sum(region["size"] for region in layout["regions"])
    return (
        len(tensors) != TENSORS
        or any(tensor["shape"] != [length] for tensor in tensors)
        or sizes != TENSORS * length * 4
    )


def measure(pid: int, maps: Path) -> tuple[int, int, list[str]]:
    """Resident bytes and descriptors of the process that publishes, and the files."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    descriptors = len(os.listdir(f"/proc/{pid}/fd"))
    return pages * os.sysconf("SC_PAGE_SIZE"), descriptors, sorted(os.listdir(maps))


def environment(**more: str) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "SGLANG_WEIGHT_HOOK", "LD_PRELOAD"))
    }
    return {**kept, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **more}


class ForkServer:
    """A process in whose forked children scenarios run."""

    def __init__(self, faults: Optional[Path] = None) -> None:
        preload = {} if faults is None else {"LD_PRELOAD": str(faults)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.stress.fork_server"],
            cwd=ROOT,
            env=environment(**preload),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._running: set[int] = set()

    def start(self, scenario: str, **arguments: Any) -> int:
        """The pid of a child that runs it."""
        pid = int(self._ask({"scenario": scenario, "arguments": arguments})["pid"])
        self._running.add(pid)
        return pid

    def wait(self, pid: int) -> tuple[int, str]:
        """Exit status (negative: the signal), and what it said."""
        answer = self._ask({"wait": pid})
        self._running.discard(pid)
        return answer["status"], answer["said"]

    def run(self, scenario: str, **arguments: Any) -> Any:
        """Run to the end; what it returned."""
        status, said = self.wait(self.start(scenario, **arguments))
        assert status == 0, said
        return json.loads(said)

    def kill(self, pid: int) -> None:
        """End a child, unless it was waited for already."""
        if pid in self._running:
            os.kill(pid, signal.SIGKILL)
            self.wait(pid)

    def close(self) -> None:
        for pid in list(self._running):
            self.kill(pid)
        self._process.communicate()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


class Child:
    """A process that runs one piece of code and talks over pipes; ended with the `with` block."""

    def __init__(self, code: str, *arguments: str, **more: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            cwd=ROOT,
            env=environment(**more),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGCONT)  # a stopped one
            self.process.kill()
        self.process.communicate()

    @property
    def pid(self) -> int:
        return self.process.pid

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, line: str = "") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()


class RunningScenario:
    """A scenario that can be talked to while it runs; ended with the `with` block."""

    def __init__(
        self, fork_server: ForkServer, talk: Path, scenario: str, **arguments: Any
    ) -> None:
        for end in ("in", "out"):
            os.mkfifo(f"{talk}.{end}")
        self._fork_server = fork_server
        self.pid = fork_server.start(scenario, talk=str(talk), **arguments)
        self._telling = open(f"{talk}.in", "w", buffering=1)  # noqa: SIM115
        self._hearing = open(f"{talk}.out")  # noqa: SIM115

    def __enter__(self) -> RunningScenario:
        return self

    def __exit__(self, *error: object) -> None:
        self._telling.close()
        self._hearing.close()
        self._fork_server.kill(self.pid)

    def hear(self) -> str:
        return self._hearing.readline().strip()

    def tell(self) -> None:
        self._telling.write("\n")

    def result(self) -> Any:
        status, said = self._fork_server.wait(self.pid)
        assert status == 0, said
        return json.loads(said)


def published_names(directory: Path) -> set[str]:
    """The files in a directory, but for control sockets: a dead process's stays for a while."""
    return {name for name in os.listdir(directory) if not fnmatch(name, CONTROL.format("*"))}


def copy_documents(good: Path, bad: Path) -> None:
    """``bad`` as a copy of the directory ``good``; a socket cannot be copied."""
    shutil.rmtree(bad, ignore_errors=True)
    shutil.copytree(good, bad, ignore=shutil.ignore_patterns(CONTROL.format("*")))


def whole_files(directory: Path) -> dict[str, Any]:
    """Every JSON file of a directory; each parses."""
    return {path.name: json.loads(path.read_bytes()) for path in sorted(directory.glob("*.json"))}
