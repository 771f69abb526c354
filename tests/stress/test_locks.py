"""Abuse of the lock: an update is delayed at most by the timeout, once, and says so."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_weight_hook.layout import files
from tests.stress.processes import Child, ForkServer, RunningScenario

TIMEOUT = 0.5
UPDATES = 5

HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "rb")
fcntl.flock(file, fcntl.LOCK_EX if sys.argv[2] == "alone" else fcntl.LOCK_SH)
print("held", flush=True)
sys.stdin.readline()
"""

TAKE_IN_A_LOOP = """
import fcntl, sys
print("looping", flush=True)
while True:
    with open(sys.argv[1], "rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
"""


def abused(server: RunningScenario) -> dict[str, Any]:
    """What the server tells after its updates under abuse and one after it."""
    assert server.hear() == "abused"
    server.tell()
    told: dict[str, Any] = server.result()
    return told


@pytest.fixture
def server(fork_server: ForkServer, maps: Path, tmp_path: Path) -> Iterator[RunningScenario]:
    """It has loaded, and updates when it is told to."""
    arguments: dict[str, Any] = {"lock_timeout": TIMEOUT, "updates": UPDATES}
    scenario = "update_under_abuse"
    with RunningScenario(
        fork_server, tmp_path / "talk", scenario, directory=str(maps), **arguments
    ) as running:
        assert running.hear() == "loaded"
        yield running


@pytest.fixture
def lock(maps: Path) -> str:
    return str(maps / files.SAVING_LOCK.format("0"))


def check_one_timeout(told: dict[str, Any], name: str) -> None:
    assert told["locks"] == ["timeout"] * UPDATES
    # What was slept is what was waited: the timeout once, and nothing from then on.
    assert 0 < told["slept"][0] <= TIMEOUT
    assert told["slept"][1:UPDATES] == [0.0] * (UPDATES - 1)
    (said,) = told["said"]
    assert name in said


@pytest.mark.parametrize("how", ["alone", "shared"])
@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped"])
def test_held_for_ever(how: str, stopped: bool, server: RunningScenario, lock: str) -> None:
    with Child(HOLD, lock, how) as holder:
        assert holder.hear() == "held"
        if stopped:
            os.kill(holder.pid, signal.SIGSTOP)
        server.tell()
        assert server.hear() == "abused"
        holder.process.kill()
        holder.process.wait()
        server.tell()
        told = server.result()
    check_one_timeout(told, "weight_saving_0.lock")
    # Let go of, it is had again at once.
    assert told["after"] == "held"


def test_a_reader_that_dies_holding_it_delays_nobody(server: RunningScenario, lock: str) -> None:
    with Child(HOLD, lock, "shared") as holder:
        assert holder.hear() == "held"
        holder.process.kill()
        holder.process.wait()
        server.tell()
        told = abused(server)
    assert told["locks"] == ["held"] * UPDATES
    assert told["slept"] == [0.0] * (UPDATES + 1)
    assert told["said"] == []


def test_taken_in_a_loop_by_many_readers(server: RunningScenario, lock: str) -> None:
    """Together they hold it nearly always; each update gets it, or goes on without."""
    loopers = [Child(TAKE_IN_A_LOOP, lock) for _ in range(8)]
    try:
        assert [looper.hear() for looper in loopers] == ["looping"] * 8
        server.tell()
        told = abused(server)
    finally:
        for looper in loopers:
            looper.__exit__()
    assert set(told["locks"]) <= {"held", "timeout"}
    waits = [slept for slept in told["slept"][:UPDATES] if slept > 0]
    assert all(slept <= TIMEOUT for slept in waits)
    # After one that was in vain none waits until it was had again.
    for before, slept in zip(told["locks"], told["slept"][1:]):
        assert before == "held" or slept == 0.0
    assert len(told["said"]) <= UPDATES
    print(f"{told['locks'].count('held')} of {UPDATES} updates had it, slept {told['slept']}")


def test_deleted_and_held_anew(server: RunningScenario, lock: str, maps: Path) -> None:
    """Somebody deletes the lock files and holds new ones: another name is published, and said."""
    owner = str(maps / files.OWNER_LOCK.format("0"))
    for path in (owner, lock):
        os.unlink(path)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    with Child(HOLD, owner, "alone") as one, Child(HOLD, lock, "alone") as other:
        assert [one.hear(), other.hear()] == ["held", "held"]
        server.tell()
        told = abused(server)
    assert told["locks"] == ["held"] * UPDATES
    assert told["slept"][0] <= TIMEOUT  # for the owner lock
    assert told["slept"][1:] == [0.0] * UPDATES
    (said,) = told["said"]
    assert "another live process" in said


def test_the_owner_lock_held_by_a_stranger_sends_the_server_elsewhere(
    fork_server: ForkServer, maps: Path
) -> None:
    maps.mkdir()
    owner = maps / files.OWNER_LOCK.format("0")
    owner.touch()
    with Child(HOLD, str(owner), "alone") as stranger:
        assert stranger.hear() == "held"
        told = fork_server.run("successor", directory=str(maps))
    assert told["slot"].startswith("0.")
    assert len(told["said"]) == 1


def test_the_shell_can_hold_it_too(server: RunningScenario, lock: str) -> None:
    done = subprocess.run(["flock", "--shared", "--nonblock", lock, "true"], check=False)
    assert done.returncode == 0
    server.tell()
    assert abused(server)["locks"] == ["held"] * UPDATES
