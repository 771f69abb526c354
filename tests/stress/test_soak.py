"""A real server on the CPU under updates, releases and requests for a long time.

``STRESS_SOAK_SECONDS`` says for how long: 1800 in the long form, and nothing in the short one,
in which the real servers of ``tests/real_sglang`` do the same for a few seconds.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import sglang_weight_hook as hook
from cpu_sglang.environment import ensure_environment
from tests.real_sglang.hooked import HookedServer, make_checkpoint, make_venv, pid_of
from tests.real_sglang.scenario import check
from tests.stress.processes import ForkServer, measure

GROWTH = 32 * 1024**2  # bytes of resident memory that may come and go: allocator, page cache


class Follower(threading.Thread):
    """A reader that sees every state there is, one after the other.

    Events in quicker succession than it gets a core for would be skipped, as they may be: so each
    is waited for before the next is asked for.
    """

    def __init__(self, slot: hook.Slot) -> None:
        super().__init__(daemon=True)
        self.slot = slot
        self.states: list[dict[str, Any]] = [slot.read_state()]
        self.errors: list[str] = []
        self.enough = threading.Event()

    def catch_up(self) -> None:
        for _ in range(1000):
            if self.states[-1] == self.slot.read_state():
                return
            time.sleep(0.01)
        raise AssertionError("the follower does not see the state that is there")

    def run(self) -> None:
        while not self.enough.is_set():
            try:
                state = self.slot.wait_for_change(self.states[-1], timeout=1.0)
                if state is not None:
                    self.states.append(state)
                    if state["state"] == "ready":
                        self.slot.read()
            except hook.HookError as error:
                self.errors.append(str(error))


def test_the_hook_alone_keeps_nothing(fork_server: ForkServer, maps: Path, is_long: bool) -> None:
    rounds = 10_000 if is_long else 200
    told = fork_server.run("grows", directory=str(maps), rounds=rounds)
    early, late = told["early"], told["late"]
    print(f"{rounds} rounds of 6 events: {early}, then {late}")
    assert late["resident"] <= early["resident"] + 1024**2
    assert late["descriptors"] == early["descriptors"]
    assert late["files"] == early["files"]
    assert late["objects"] <= early["objects"] + 100


class Load:
    """Updates, releases and requests of one server, one after the other, and how many of each."""

    def __init__(self, server: HookedServer, models: list[Path], follower: Follower) -> None:
        self.server, self.models, self.follower = server, models, follower
        self.updates = self.releases = self.requests = 0
        self._says = {0: server.generate()}

    def turn(self) -> None:
        """One update and a request; at times a release and a resume, or an update that fails."""
        self._update(self.models[(self.updates + 1) % 2])
        self.updates += 1
        said = self.server.generate()
        assert said == self._says.setdefault(self.updates % 2, said)
        self.requests += 1
        if self.updates % 5 == 0:
            self.server.wait_idle()
            for route in ("/release_memory_occupation", "/resume_memory_occupation"):
                status, answer = self.server.post(route)
                assert status == 200, answer
                self.follower.catch_up()
            self.releases += 1
        if self.updates % 7 == 0:
            missing = self.models[0].parent / "missing"
            status, answer = self.server.update_weights_from_disk(missing)
            assert (status, answer["success"]) == (400, False)
            self.follower.catch_up()
            self._update(self.models[self.updates % 2])

    def _update(self, model: Path) -> None:
        status, answer = self.server.update_weights_from_disk(model)
        assert (status, answer["success"]) == (200, True), answer
        self.follower.catch_up()


def test_hours_of_updates_releases_and_requests(tmp_path: Path, is_long: bool) -> None:
    seconds = float(os.environ.get("STRESS_SOAK_SECONDS", "1800" if is_long else "0"))
    if not seconds:
        pytest.skip("takes long: --long, or STRESS_SOAK_SECONDS=300")
    environment = ensure_environment()
    python = make_venv(tmp_path / "venv", environment)
    models = [make_checkpoint(environment, tmp_path / str(seed), seed) for seed in (1, 2)]
    measured: list[tuple[int, int, list[str]]] = []
    with HookedServer(environment, python, models[0], tmp_path / "server") as server:
        (slot,) = server.maps.slots()
        pid = pid_of(slot)
        follower = Follower(slot)
        load = Load(server, models, follower)
        follower.start()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            load.turn()
            measured.append(measure(pid, Path(slot.directory)))
        check(server, [slot], "ready", updated=True)
        last = slot.read_state()
        follower.catch_up()
        follower.enough.set()
        follower.join()
        log = server.hook_log()
    resident = [one[0] for one in measured]
    quarter = max(len(measured) // 4, 1)
    early = statistics.median(resident[quarter : 2 * quarter] or resident)
    late = statistics.median(resident[-quarter:])
    generations = [state["content_generation"] for state in follower.states]
    print(
        f"{seconds:g} s: {load.updates} updates, {load.releases} releases, "
        f"{load.requests} requests; "
        f"{len(follower.states)} states seen, content generations {generations[0]} to "
        f"{generations[-1]}; resident {early / 1e6:.1f} then {late / 1e6:.1f} MB, "
        f"descriptors {sorted({one[1] for one in measured[quarter:]})}, "
        f"{len(measured[-1][2])} files"
    )
    assert follower.errors == []
    # Every one, in order, none left out.
    assert sorted(set(generations)) == list(range(generations[0], last["content_generation"] + 1))
    assert generations == sorted(generations)
    assert {state["pid"] for state in follower.states} == {pid}
    assert measured[-1][2] == measured[quarter][2]
    assert max(one[1] for one in measured[-quarter:]) <= max(one[1] for one in measured[:quarter])
    assert late <= early + GROWTH
    assert not [line for line in log if "WARNING" in line.upper()]
