"""Programs around SGLang that are no server: each published map against what torch says inside.

Another process, this one, reads the bytes at the published addresses, too.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import sglang_weight_hook as hook
from cpu_sglang.environment import Environment
from cpu_sglang.server import CPU_FLAGS
from tests.real_sglang.hooked import ROOT, assert_legacy_files, assert_true_map, wait_for_end
from tests.real_sglang.truth.comparison import Moment, Probe, compare
from tests.real_sglang.truth.outside_bytes import settled_maps
from tests.real_sglang.truth.report import OtherProcess, other_process
from tests.real_sglang.truth.serving import make_probed_venv

pytestmark = [pytest.mark.real_sglang, pytest.mark.truth]

HERE = Path(__file__).parent


class Program:
    """One that says a line when it has come to a point, and waits there."""

    def __init__(self, process: subprocess.Popen[str], folder: Path, log: Path) -> None:
        self.process = process
        self.log = log
        self.directory = folder / "weights_metadata"
        self.maps = hook.open_directory(str(self.directory))
        self._probe = folder / "probe"
        self._truth_probe = Probe(self._probe)
        self._asked = 0

    def point(self) -> Any:
        """The next line that it says."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            try:
                return json.loads(line)
            except ValueError:
                continue
        raise AssertionError(f"it ended:\n{self.log.read_text()[-3000:]}")

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def live(self, processes: int = 1) -> dict[int, dict[str, Any]]:
        """By pid, what torch says of the one runner in each process."""
        self._asked += 1
        (self._probe / f"request-{self._asked}").touch()
        deadline = time.monotonic() + 120
        while True:
            answers = list(self._probe.glob(f"answer-{self._asked}-*.json"))
            if len(answers) == processes:
                break
            assert time.monotonic() < deadline, f"{len(answers)} of {processes} have answered"
            time.sleep(0.05)
        found = {}
        for path in answers:
            (runner,) = json.loads(path.read_text())
            pid = int(path.stem.rpartition("-")[2])
            found[pid] = {**runner, "pid": pid}
        return found

    def look(self, row: OtherProcess, when: str, slots: int = 1) -> Moment:
        """The bytes at all published addresses against the probe and the mark."""
        maps = settled_maps(self.directory, slots)
        moment = compare(maps, None, self._truth_probe)
        row.look_by_probe(when, moment)
        return moment

    def events(self, slot: str) -> list[tuple[str, str]]:
        path = Path(self.maps.slot(slot).path("weight_events_{}.jsonl"))
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [(line["kind"], line["state"]) for line in lines]


@contextmanager
def running(
    environment: Environment, python: Path, script: str, arguments: Sequence[object], folder: Path
) -> Iterator[Program]:
    (folder / "probe").mkdir(parents=True)
    log = folder / "program.log"
    with open(log, "w") as errors:
        process = subprocess.Popen(
            [python, HERE / script, *map(str, arguments)],
            cwd=folder,
            env=environment.env({"WEIGHT_PROBE_DIR": str(folder / "probe")}, python_path=[ROOT]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
    try:
        yield Program(process, folder, log)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.communicate()


@pytest.fixture(scope="module")
def probed_python(environment: Environment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_probed_venv(tmp_path_factory.mktemp("probed") / "venv", environment)


def test_a_runner_that_a_program_makes_itself_is_ready_when_it_is_whole(
    environment: Environment,
    probed_python: Path,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    arguments = ["--model-path", checkpoint(1), *CPU_FLAGS]
    with (
        other_process("a lone `ModelRunner`", "`sglang.benchmark.one_batch`") as row,
        running(environment, probed_python, "lone_runner.py", arguments, tmp_path) as program,
    ):
        for point in ("built", "benchmarked"):
            assert program.point() == point
            slot = program.maps.slot("0")
            document = slot.read()
            assert document.state["state"] == "ready"
            assert document.raw["memory"]["kv_cache"]
            truth = program.live()[document.state["pid"]]
            assert_true_map(document, truth)
            assert_legacy_files(document, truth, updated=False)
            assert document.state["missing"] == []
            program.look(row, point)
            program.go_on()
        assert program.events("0") == [("load_model", "loading"), ("runner_ready", "ready")]
        assert program.process.wait(60) == 0
        assert not slot.owner_alive()


def test_two_engines_of_one_program_have_a_slot_each(
    environment: Environment,
    probed_python: Path,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    arguments = [checkpoint(1), checkpoint(2)]
    with (
        other_process("two Engines in one process", "`sglang.Engine`, twice") as row,
        running(environment, probed_python, "two_engines.py", arguments, tmp_path) as program,
    ):
        assert program.point() == "serving"
        slots = program.maps.slots()
        assert len(slots) == 2
        before = documents_of(slots, program.live(2))
        paths = {path: pid for pid, (path, _) in before.items()}
        assert set(paths) == {str(path) for path in arguments}
        loaded = program.look(row, "load", 2)
        program.go_on()

        assert program.point() == "updated"
        after = documents_of(slots, program.live(2))
        first, second = (paths[str(path)] for path in arguments)
        rises = {pid: after[pid][1] - before[pid][1] for pid in (first, second)}
        assert rises == {first: 1, second: 0}
        updated = program.look(row, "update of one from disk", 2)
        # From the other's checkpoint: now both hold the same, which is what the other held.
        by_pid = {slot.read_state()["pid"]: slot.name for slot in slots}
        assert updated.values[by_pid[second]] == loaded.values[by_pid[second]]
        assert updated.values[by_pid[first]] == loaded.values[by_pid[second]]
        assert updated.values[by_pid[first]] != loaded.values[by_pid[first]]
        program.go_on()

        # SGLang's shutdown of one engine kills all children of the program (entrypoints/engine.py,
        # kill_process_tree of its own pid): with them the other engine's scheduler.
        assert program.point() == "one shut down"
        for pid in (first, second):
            wait_for_end(pid)
        assert [slot for slot in slots if slot.owner_alive()] == []


def documents_of(
    slots: Sequence[hook.Slot], live: dict[int, dict[str, Any]]
) -> dict[int, tuple[str, int]]:
    """By pid, model and content generation; each map is held against its own process."""
    found = {}
    for slot in slots:
        document = slot.read()
        assert document.state["state"] == "ready"
        pid = document.state["pid"]
        assert_true_map(document, live[pid])
        found[pid] = (document.raw["identity"]["model_path"], document.content_generation)
    assert found.keys() == live.keys()
    return found
