"""What subscribers cost where there are none, and where there is one that does nothing.

Three kinds of process, interleaved.  *without* has the publisher's own source with everything that
asks for subscribers folded away (`subscribing_owner`), as if there were none in the package.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sglang_weight_hook.layout.variables import CHECK_SECONDS, SUBSCRIBERS

from . import table
from .measure import Sample, ratios, rotated
from .subscribing_owner import ACTIONS, TENSORS
from .table import Line, Section

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("without", "unset", "one")
NAME = "benchmarks.subscribing_owner:nothing"

# Compiled modules are to be kept: their compilation is not measured.
_UNSET = {SUBSCRIBERS, "PYTHONDONTWRITEBYTECODE"}


class Ready(NamedTuple):
    """What a process says of its start-up."""

    cpu: float  # seconds, from the publisher's import until the first map is published
    modules: int
    threads: int


class Owner:
    """A process that publishes a model of its own, and acts when it is told to."""

    def __init__(self, kind: str, place: str, compiled: str) -> None:
        environment = {
            **{name: value for name, value in os.environ.items() if name not in _UNSET},
            "PYTHONPATH": str(ROOT),
            "SGLANG_WEIGHT_HOOK_DIR": place,
            CHECK_SECONDS: "0",
            **({SUBSCRIBERS: NAME} if kind == "one" else {}),
        }
        command = [sys.executable, "-m", "benchmarks.subscribing_owner", kind, compiled]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        cpu, modules, threads = self._answer()
        self.ready = Ready(cpu, int(modules), int(threads))

    def act(self, action: str, times: int) -> float:
        """Seconds of CPU of all threads, of one of ``times``."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{action} {times}\n")
        self._process.stdin.flush()
        return self._answer()[0]

    def _answer(self) -> list[float]:
        assert self._process.stdout is not None
        return list(map(float, self._process.stdout.readline().split()))

    def end(self) -> None:
        self._process.terminate()
        self._process.wait()


def measure(quick: bool) -> Section:
    with tempfile.TemporaryDirectory(prefix="subscribing-") as compiled:
        lines = _start_ups(3 if quick else 15, compiled)
        with _owners(KINDS, compiled) as owners:
            for action, (what, times) in ACTIONS.items():
                lines += _actions(owners, action, what, times, 5 if quick else 41)
    return Section("Subscribers, where there are none", lines, HOW, LIMITS)


def _start_ups(rounds: int, compiled: str) -> list[Line]:
    starts: dict[str, list[Ready]] = {kind: [] for kind in KINDS}
    for turn in range(-1, rounds):
        for kind in rotated(KINDS, turn):
            with _owners((kind,), compiled) as owners:
                if turn >= 0:  # the first one compiles
                    starts[kind].append(owners[kind].ready)
    return [_start_up(starts, kind) for kind in KINDS[1:]]


def _actions(
    owners: dict[str, Owner], action: str, what: str, times: int, rounds: int
) -> list[Line]:
    took: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(-1, rounds):
        for kind in rotated(KINDS, turn):
            seconds = owners[kind].act(action, times)
            if turn >= 0:
                took[kind].append(seconds)
    return [_compared(what, took, kind) for kind in KINDS[1:]]


@contextlib.contextmanager
def _owners(kinds: tuple[str, ...], compiled: str) -> Iterator[dict[str, Owner]]:
    with contextlib.ExitStack() as stack:
        owners = {}
        for kind in kinds:
            place = stack.enter_context(tempfile.TemporaryDirectory(prefix="subscribing-"))
            owners[kind] = Owner(kind, place, compiled)
            stack.callback(owners[kind].end)
        yield owners


def _start_up(starts: dict[str, list[Ready]], kind: str) -> Line:
    ours, bare = starts[kind][0], starts["without"][0]
    cpu = {name: Sample([ready.cpu for ready in each]) for name, each in starts.items()}
    same = (ours.modules, ours.threads) == (bare.modules, bare.threads)
    return Line(
        f"import of the publisher and the first map, {TENSORS} tensors: {_called(kind)}",
        f"{table.timing(cpu[kind])}, {ours.modules} modules, {ours.threads} threads",
        f"without {table.timing(cpu['without'])}, {bare.modules} modules, {bare.threads} threads",
        table.times(ratios(cpu[kind], cpu["without"]), 3),
        "the same modules and threads" if kind == "unset" else "",
        same if kind == "unset" else None,
    )


def _compared(what: str, took: dict[str, list[float]], kind: str) -> Line:
    ours, bare = Sample(took[kind]), Sample(took["without"])
    return Line(
        f"{what}, {TENSORS} tensors: {_called(kind)}",
        table.timing(ours),
        f"without {table.timing(bare)}",
        table.times(ratios(ours, bare), 3),
    )


def _called(kind: str) -> str:
    return "unset" if kind == "unset" else "one that does nothing"


HOW = """\
Three processes that publish the same model, in turn; CPU time of all of their threads. *without*
runs the publisher's source with every question for subscribers folded away before it is
compiled."""
LIMITS = """\
Where the variable is unset, an event asks a few times whether a module's variable is None, some
30 ns each; what calls subscribers is not imported. One that does nothing costs the comparison of
the new map with the one that it was given before, and two turns of its thread. Requests: no method
on their way is wrapped, and the rows of a real server below are with the variable unset."""
