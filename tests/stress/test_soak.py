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
from tests.stress.bench import Theatre, measure

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


def test_the_hook_alone_keeps_nothing(theatre: Theatre, maps: Path, is_long: bool) -> None:
    rounds = 10_000 if is_long else 200
    told = theatre.play("grows", directory=str(maps), rounds=rounds)
    early, late = told["early"], told["late"]
    print(f"{rounds} rounds of 6 events: {early}, then {late}")
    assert late["resident"] <= early["resident"] + 1024**2
    assert late["descriptors"] == early["descriptors"]
    assert late["files"] == early["files"]
    assert late["objects"] <= early["objects"] + 100


def test_hours_of_updates_releases_and_requests(tmp_path: Path, is_long: bool) -> None:
    seconds = float(os.environ.get("STRESS_SOAK_SECONDS", "1800" if is_long else "0"))
    if not seconds:
        pytest.skip("takes long: --long, or STRESS_SOAK_SECONDS=300")
    environment = ensure_environment()
    python = make_venv(tmp_path / "venv", environment)
    models = [make_checkpoint(environment, tmp_path / str(seed), seed) for seed in (1, 2)]
    measured: list[tuple[int, int, list[str]]] = []
    updates = releases = requests = 0
    with HookedServer(environment, python, models[0], tmp_path / "server") as server:
        (slot,) = server.maps.slots()
        pid = pid_of(slot)
        says = {0: server.generate()}
        follower = Follower(slot)
        follower.start()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            status, answer = server.update_weights_from_disk(models[(updates + 1) % 2])
            assert (status, answer["success"]) == (200, True), answer
            updates += 1
            follower.catch_up()
            said = server.generate()
            assert said == says.setdefault(updates % 2, said)
            requests += 1
            if updates % 5 == 0:
                server.wait_idle()
                for route in ("/release_memory_occupation", "/resume_memory_occupation"):
                    status, answer = server.post(route)
                    assert status == 200, answer
                    follower.catch_up()
                releases += 1
            if updates % 7 == 0:
                status, answer = server.update_weights_from_disk(tmp_path / "missing")
                assert (status, answer["success"]) == (400, False)
                follower.catch_up()
                status, answer = server.update_weights_from_disk(models[updates % 2])
                assert (status, answer["success"]) == (200, True)
                follower.catch_up()
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
        f"{seconds:g} s: {updates} updates, {releases} releases, {requests} requests; "
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
