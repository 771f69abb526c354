"""Torn and mixed reads: publishers at full speed, killed again and again, and many readers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

import sglang_weight_hook as hook
from sglang_weight_hook import reader
from sglang_weight_hook.publisher import publish
from tests.stress.processes import ROOT, TENSORS, ForkServer, environment, length_at

READERS = 8


class CReaders(threading.Thread):
    """Runs the C example over and over and holds each answer against `processes.length_at`."""

    def __init__(self, program: Path, maps: Path) -> None:
        super().__init__(daemon=True)
        self.command = [str(program), str(maps), "0"]
        self.seen: Counter[str] = Counter()
        self.failures: list[str] = []
        self.enough = threading.Event()

    def run(self) -> None:
        while not self.enough.is_set():
            self.once()

    def once(self) -> int:
        done = subprocess.run(self.command, capture_output=True, text=True, check=False)
        self.seen[f"exit {done.returncode}"] += 1
        if done.returncode == 0:
            sizes = [int(line.split()[1]) for line in done.stdout.splitlines()]
            lengths = {length_at(generation) for generation in range(1000)}
            # Storages that touch are one region, so the sum is what tells.
            length, rest = divmod(sum(sizes), 4 * TENSORS)
            self.seen["mixed"] += bool(sizes) and (rest != 0 or length not in lengths)
        elif done.returncode != 3:
            self.failures.append(done.stderr)
        return done.returncode


def publish_some(maps: Path, publisher: int, generations: int) -> None:
    """Return when the publisher has come that far."""
    for _ in range(3000):
        try:
            state = json.loads((maps / "weight_state_0.json").read_bytes())
        except FileNotFoundError:
            state = {"pid": None}
        if state["pid"] == publisher and state["layout_generation"] >= generations:
            return
        time.sleep(0.01)
    raise AssertionError(f"{publisher} does not publish")


def test_no_read_is_torn_mixed_or_of_a_dead_owner_shown_as_live(
    fork_server: ForkServer, maps: Path, tmp_path: Path, print_regions: Path, is_long: bool
) -> None:
    """Eight readers in Python and one in C, while publishers come and are killed."""
    wanted = (100_000 if is_long else 3_000) // READERS
    dead = tmp_path / "dead"
    dead.touch()
    publisher = fork_server.start("publish_for_ever", directory=str(maps))
    publish_some(maps, publisher, generations=1)
    followers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.stress.follow", str(maps), str(dead), str(wanted)],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(READERS)
    ]
    in_c = CReaders(print_regions, maps)
    in_c.start()
    killed = generations = 0
    try:
        while any(follower.poll() is None for follower in followers):
            publish_some(maps, publisher, generations=30 if is_long else 10)
            fork_server.kill(publisher)
            killed += 1
            with open(dead, "a") as file:
                file.write(f"{publisher}\n")
            state = maps / "weight_state_0.json"
            if state.exists():
                generations += json.loads(state.read_bytes())["layout_generation"]
            publisher = fork_server.start("publish_for_ever", directory=str(maps))
    finally:
        for follower in followers:
            follower.kill()
        said = [follower.communicate()[0] for follower in followers]
        in_c.enough.set()
        in_c.join()
        fork_server.kill(publisher)
    total: Counter[str] = Counter()
    for line in said:
        total.update(json.loads(line))
    print(f"python: {dict(total)}; C: {dict(in_c.seen)}; {killed} kills, {generations} generations")
    assert (total["torn"], total["mixed"], total["dead as live"]) == (0, 0, 0)
    assert total["reads"] == wanted * READERS
    assert total["alive"] > 0
    assert killed > 0
    assert (in_c.seen["mixed"], in_c.failures) == (0, [])
    assert in_c.seen["exit 0"] > 0
    # All dead now: neither says otherwise.
    assert in_c.once() == 3
    assert not hook.open_slot(str(maps), "0").owner_alive()


def test_what_a_dead_owner_left_is_removed_before_its_successor_is_seen_alive(
    fork_server: ForkServer, maps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork_server.run("life", directory=str(maps), at=0, action=0)
    fork_server.run("successor", directory=str(maps))
    slot = reader.open_slot(str(maps), "0")
    seen = []
    really = os.unlink

    def unlink(path: str) -> None:
        seen.append(slot.owner_alive())
        really(path)

    monkeypatch.setattr(os, "unlink", unlink)
    successor = publish.Slot(str(maps), "0", 1.0)
    assert seen
    assert not any(seen)
    assert slot.owner_alive()
    assert not [name for name in os.listdir(maps) if name.endswith(".json")]
    successor.abandon()


def test_a_document_is_not_alive_because_of_a_successor(
    fork_server: ForkServer, maps: Path
) -> None:
    fork_server.run("successor", directory=str(maps))
    slot = reader.open_slot(str(maps), "0")
    document = slot.read(timeout=0)
    successor = publish.Slot(str(maps), "0", 1.0)
    assert slot.owner_alive()
    assert not document.owner_alive()
    successor.abandon()


def test_two_that_claim_one_slot_at_once_never_both_have_it(maps: Path, is_long: bool) -> None:
    """Eight processes claim and let go in a loop, marking where each must be alone."""
    code = """
import os, sys, random, time
from sglang_weight_hook.publisher import publish
directory, rounds = sys.argv[1], int(sys.argv[2])
mark = os.path.join(directory, "mark")
had = 0
for _ in range(rounds):
    slot = publish.Slot(directory, "0", 1.0)
    if slot.name == "0":
        had += 1
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL))  # fails if another is in here
        time.sleep(random.random() * 0.002)
        os.unlink(mark)
    slot.abandon()
    time.sleep(random.random() * 0.002)
print(had)
"""
    rounds = 300 if is_long else 40
    maps.mkdir()
    claimants = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(maps), str(rounds)],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(READERS)
    ]
    answers = [claimant.communicate() for claimant in claimants]
    # Who comes too late for a while goes elsewhere, and says so on stderr.
    assert [claimant.returncode for claimant in claimants] == [0] * READERS, answers
    print(f"{sum(int(said) for said, _ in answers)} of {rounds * READERS} claims had the slot")
    assert all(int(said) > 0 for said, _ in answers)
