"""Two real servers on the CPU, one with the hook and one without, for a long time.

Both have updates from disk and in buckets, releases, requests and failing updates, turn by turn;
beside the hooked one there are a follower, a scrubber, an agent with a reader of its events, and
etcd.

``STRESS_SOAK_SECONDS`` says for how long: 1800 in the long form, and nothing in the short one,
in which the real servers of ``tests/real_sglang`` do the same for a few seconds.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

import sglang_weight_hook as hook
from cpu_sglang.environment import ensure_environment
from sglang_weight_hook.layout import files
from tests.real_sglang.hooked import HookedServer, make_checkpoint, make_venv, pid_of, wait_for_end
from tests.real_sglang.scenario import check
from tests.stress.processes import ForkServer
from tests.stress.soak_figures import Figures
from tests.stress.soak_load import BUCKETS, Load, Sender, make_venv_without_hook

# Bytes by which the hooked server may grow more than the other: by chance, in the two allocators.
GROWTH = 8 * 1024**2
# Bytes by which the agent or the scrubber may grow.
GROWTH_BESIDE = 8 * 1024**2
# So many times as long as a turn took is waited for before the next one: both servers are to leave
# most of a small machine to others.
PAUSE = 3.0
# A scheduler that has nothing to do asks for requests without a pause, unless it is told not to.
ARGUMENTS = ["--sleep-on-idle"]

HOOKED, PLAIN = "with the hook", "without"


def test_the_hook_alone_keeps_nothing(fork_server: ForkServer, maps: Path, is_long: bool) -> None:
    rounds = 10_000 if is_long else 200
    told = fork_server.run("grows", directory=str(maps), rounds=rounds)
    early, late = told["early"], told["late"]
    print(f"{rounds} rounds of 6 events: {early}, then {late}")
    assert late["resident"] <= early["resident"] + 1024**2
    assert late["descriptors"] == early["descriptors"]
    assert late["files"] == early["files"]
    assert late["objects"] <= early["objects"] + 100


@contextmanager
def two_servers(
    release: str, folder: Path
) -> Iterator[tuple[HookedServer, HookedServer, list[Path]]]:
    """One with the hook and one without it, of the same SGLang; and two models for them."""
    environment = ensure_environment(release)
    hooked_python = make_venv(folder / "venv-hooked", environment)
    plain_python = make_venv_without_hook(folder / "venv-plain", environment)
    models = [make_checkpoint(environment, folder / str(seed), seed) for seed in (1, 2)]
    with (
        HookedServer(environment, hooked_python, models[0], folder / "hooked", ARGUMENTS) as hooked,
        HookedServer(environment, plain_python, models[0], folder / "plain", ARGUMENTS) as plain,
    ):
        yield hooked, plain, models


def turns(loads: list[Load], figures: Figures) -> None:
    """Each load in a thread of its own, and the same number of turns of each."""
    with ThreadPoolExecutor(len(loads)) as threads:
        while not figures.is_over():
            began = time.monotonic()
            for turn in [threads.submit(load.turn) for load in loads]:
                turn.result()
            took = time.monotonic() - began
            figures.look()
            # In a short soak all quarters are to have turns, too.
            time.sleep(min(PAUSE * took, figures.seconds / 32))
    figures.tell()


def names_of(slot: hook.Slot, pid: int) -> set[str]:
    """Every file of a slot, but for the log that was full."""
    locks = (files.SAVING_LOCK, files.OWNER_LOCK)
    of_slot = (*files.DOCUMENTS, *locks, files.HEADER, files.EVENTS)
    return {name.format(slot.name) for name in of_slot} | {files.CONTROL.format(pid)}


def assert_growth(figures: Figures, beside: list[str]) -> None:
    for of in ("resident", "anonymous"):
        hooked, plain = (figures.growth(name, of) for name in (HOOKED, PLAIN))
        print(f"{of}: {hooked / 1e6:+.2f} MB with the hook, {plain / 1e6:+.2f} MB without")
        assert hooked - plain <= GROWTH
    for name in (HOOKED, PLAIN, *beside):
        for of in ("descriptors", "threads"):
            early, late = figures.floors(name, of)
            assert late <= early, (name, of)
    for name in beside:
        assert figures.growth(name) <= GROWTH_BESIDE, name


@pytest.mark.parametrize("release", BUCKETS)
def test_hours_of_updates_releases_and_requests(
    release: str, tmp_path: Path, is_long: bool
) -> None:
    seconds = float(os.environ.get("STRESS_SOAK_SECONDS", "1800" if is_long else "0"))
    if not seconds:
        pytest.skip("takes long: --long, or STRESS_SOAK_SECONDS=300")
    if shutil.which("etcd") is None:
        pytest.skip("no etcd here: install Debian's etcd-server")
    from tests.stress.soak_beside import Beside, running_etcd

    with (
        running_etcd(tmp_path / "etcd") as etcd,
        two_servers(release, tmp_path) as (hooked, plain, models),
    ):
        (slot,) = hooked.maps.slots()
        pid = pid_of(slot)
        (other,) = plain.live()
        with (
            Beside(slot, etcd, tmp_path) as beside,
            Sender(hooked) as to_hooked,
            Sender(plain) as to_plain,
        ):
            loads = [
                Load(hooked, to_hooked, models, beside.follower.catch_up),
                Load(plain, to_plain, models),
            ]
            figures = Figures({HOOKED: pid, PLAIN: other["pid"], **beside.pids()}, seconds)
            turns(loads, figures)
            check(hooked, [slot], "ready", updated=True)
            published = set(os.listdir(slot.directory)) - {files.EVENTS_BEFORE.format(slot.name)}
            beside.assert_all_have_seen(slot.read_state()["content_generation"])
            beside.follower.stop()
            hooked.stop()
            wait_for_end(pid)
            beside.assert_all_know_of_the_end()
        print(f"{release}, {seconds:g} s, each: {loads[0].turns} turns, {dict(loads[0].done)}")
        assert_growth(figures, ["agent", "scrub"])
        assert loads[0].done == loads[1].done
        assert loads[0].says == loads[1].says
        assert len(set(map(str, loads[0].says.values()))) == 2  # an update can be seen
        assert beside.follower.pids == {pid}
        assert published == names_of(slot, pid)
        assert not [line for line in hooked.hook_log() if "WARNING" in line.upper()]
        assert plain.hook_log() == []
        assert not (plain.cwd / "weights_metadata").exists()
