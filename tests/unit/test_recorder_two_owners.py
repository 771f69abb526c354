"""Two owners with one pid in one directory, many slots held by one reader, a clock that steps."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from child_environment import environment_for_children
from fake_sglang import FakeRunner, event, load, settle, stream, update
from published_files import a_model, generations, header_of, lock_is_free, state_of

from sglang_weight_hook.layout import files, variables
from sglang_weight_hook.publisher import publish, recorder, settings
from sglang_weight_hook.reader import open_slot

pytest.importorskip("torch")

# --- two containers ----------------------------------------------------------------------------

OWNER = """
import sys
from fake_sglang import FakeRunner, load, settle, update
from published_files import a_model
runner = FakeRunner(a_model())
load(runner)
settle()
print("published", flush=True)
for line in sys.stdin:
    update(runner)
    print("updated", flush=True)
"""

NAMESPACE = ("--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc")


class Container:
    """An owner that is process 1 of a pid namespace of its own."""

    def __init__(self, maps: Path, **environment: str) -> None:
        unshare = shutil.which("unshare")
        if (
            unshare is None
            or subprocess.run(
                [unshare, *NAMESPACE, "true"], capture_output=True, check=False
            ).returncode
        ):
            pytest.skip("no pid namespaces of one's own here")
        self.process = subprocess.Popen(
            [unshare, *NAMESPACE, sys.executable, "-c", OWNER],
            env=environment_for_children(None, maps, environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.hear() == "published"

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def update(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("update\n")
        self.process.stdin.flush()
        assert self.hear() == "updated"

    def kill(self) -> None:
        self.process.kill()  # with it the kernel kills all of the namespace
        self.process.communicate()


@pytest.fixture
def containers(maps: Path) -> Iterator[list[Container]]:
    started: list[Container] = []
    try:
        for _ in range(2):
            started.append(Container(maps, SGLANG_WEIGHT_HOOK_CHECK_SECONDS="10"))
        yield started
    finally:
        for container in started:
            container.kill()


def published_states(maps: Path) -> dict[str, dict[str, Any]]:
    states = map(json.loads, (path.read_bytes() for path in maps.glob("weight_state_*.json")))
    return {state["slot"]: state for state in states}


def test_two_owners_with_one_pid_have_different_slots_and_sockets(
    containers: list[Container], maps: Path
) -> None:
    states = published_states(maps)
    first, second = states["0"], next(one for slot, one in states.items() if slot != "0")
    assert len(states) == 2
    assert first["pid"] == second["pid"] == 1
    assert first["instance"] != second["instance"]
    assert first["control"] != second["control"]
    for state in states.values():
        slot = open_slot(str(maps), state["slot"])
        assert slot.owner_alive()
        assert slot.read().state["instance"] == state["instance"]
        assert slot.check(timeout=10).instance == state["instance"]


def test_each_of_two_owners_with_one_pid_updates_its_own_slot_alone(
    containers: list[Container], maps: Path
) -> None:
    (other,) = (slot for slot in published_states(maps) if slot != "0")
    containers[1].update()
    assert generations(maps, "0") == (1, 1)
    assert generations(maps, other) == (1, 2)
    containers[0].update()
    containers[0].update()
    assert generations(maps, "0") == (1, 3)
    assert generations(maps, other) == (1, 2)


def test_the_death_of_one_owner_leaves_the_other_with_the_same_pid_alive(
    containers: list[Container], maps: Path
) -> None:
    (other,) = (slot for slot in published_states(maps) if slot != "0")
    containers[0].kill()
    assert not open_slot(str(maps), "0").owner_alive()
    assert open_slot(str(maps), other).owner_alive()
    successor = FakeRunner(a_model())
    load(successor)
    assert state_of(maps, "0")["pid"] == os.getpid()
    containers[1].update()
    assert open_slot(str(maps), other).read().state["state"] == "ready"


# --- one deadline for many slots --------------------------------------------------------------


@pytest.fixture
def many(maps: Path, monkeypatch: pytest.MonkeyPatch) -> list[FakeRunner]:
    """A target and four drafts, all of which share the target's embedding."""
    monkeypatch.setenv(variables.LOCK_TIMEOUT, "0.3")
    settings._settings = None
    runners = [FakeRunner(a_model(), draft=number > 0) for number in range(5)]
    for runner in runners:
        load(runner)
        runner.model[0].weight = runners[0].model[0].weight
    settle()
    return runners


@pytest.mark.parametrize("effect", ["update", "stream", "relocate", "release"])
def test_a_reader_of_all_slots_is_waited_for_once_an_event(
    effect: str, many: list[FakeRunner], maps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = [tracked.slot.name for tracked in recorder._tracked.values()]
    assert len(slots) == 5
    slept: list[float] = []
    real = publish.time.sleep

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        real(seconds)

    monkeypatch.setattr(publish.time, "sleep", sleep)
    with ExitStack() as held:
        for slot in slots:
            reader = held.enter_context((maps / files.SAVING_LOCK.format(slot)).open("rb"))
            fcntl.flock(reader, fcntl.LOCK_SH)
        event("a_call", effect, many[:1])
        for slot in slots:
            assert state_of(maps, slot)["lock"] in ("timeout", "not waited for")
    waited = sum(slept)
    assert waited == 0 if effect == "relocate" else 0.15 < waited < 0.4
    assert all(lock_is_free(maps, slot) for slot in slots)


# --- a clock that steps ------------------------------------------------------------------------


def test_a_clock_that_jumps_back_and_forth_breaks_nothing(
    maps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time
    offsets = iter([0.0, -86400.0 * 365, 3600.0, -0.5, -86400.0 * 3650, 86400.0 * 365] * 1000)
    monkeypatch.setattr(time, "time", lambda: now() + next(offsets))
    runner = FakeRunner(a_model())
    load(runner)
    settle()
    before = generations(maps)
    for number in range(1, 5):
        update(runner)
        stream(runner)
        state = state_of(maps)
        assert state["state"] == header_of(maps).state == "ready"
        assert generations(maps) == (before[0], before[1] + 2 * number)
        assert recorder._RECORDER.check(recorder._tracked[id(runner)], True) is True
    assert lock_is_free(maps)
    document = open_slot(str(maps), "0").read()
    assert document.content_generation == generations(maps)[1]


def test_a_stream_ends_after_its_quiet_time_whatever_the_clock_says(
    maps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variables.QUIET_MS, "30")
    settings._settings = None
    runner = FakeRunner(a_model())
    load(runner)
    settle()
    now = time.time
    stream(runner)
    monkeypatch.setattr(time, "time", lambda: now() - 86400.0)
    deadline = time.monotonic() + 10
    while state_of(maps)["state"] != "ready":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert generations(maps) == (1, 2)
