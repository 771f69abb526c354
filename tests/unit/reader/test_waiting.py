"""Waiting for the next generation, for a slot, and for what happens in a directory.

The documents are published by the real recorder over a real torch model.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_sglang import FakeRunner, update

from sglang_weight_hook import reader
from sglang_weight_hook.layout import files
from sglang_weight_hook.reader import HookError, open_slot


def test_a_change_is_seen_and_quiet_is_not(runner: FakeRunner, maps: Path) -> None:
    slot = open_slot(str(maps), "0")
    document = slot.read()
    assert slot.wait_for_change(document, timeout=0.05) is None
    assert slot.wait_for_change(timeout=0.05) is None
    update(runner)
    state = slot.wait_for_change(document, timeout=5)
    assert state is not None
    assert state["event"]["kind"] == "update_weights_from_disk"
    assert slot.wait_for_change(state, timeout=0.05) is None


WRITER = """
import sys
from fake_sglang import FakeRunner, load, settle, update
import torch
runner = FakeRunner(torch.nn.Linear(4, 4))
sys.stdin.readline()
load(runner)
settle()
print("loaded", flush=True)
while sys.stdin.readline() == "update\\n":
    runner.model.weight.data = torch.zeros(4, 4)
    update(runner)
"""


def test_a_slot_may_be_waited_for_before_there_is_one(
    maps: Path, start_python: Callable[..., Any]
) -> None:
    slot = open_slot(str(maps), "0")
    assert slot.wait_for_change(timeout=0.05) is None
    writer = start_python(WRITER)
    writer.stdin.write("\n")
    writer.stdin.flush()
    state = slot.wait_for_change(timeout=60)
    assert state is not None
    assert state["pid"] == writer.pid


def test_generations_go_on_until_the_process_is_gone(
    maps: Path, start_python: Callable[..., Any]
) -> None:
    writer = start_python(WRITER)
    writer.stdin.write("\n")
    writer.stdin.flush()
    assert writer.stdout.readline() == "loaded\n"
    seen = []
    for document in open_slot(str(maps), "0").generations(timeout=60):
        seen.append((document.layout_generation, document.content_generation))
        if len(seen) < 4:
            writer.stdin.write("update\n")
            writer.stdin.flush()
        else:
            writer.kill()
            writer.wait()
    assert len(seen) == 4
    assert seen == sorted(set(seen))
    assert seen[0] == (1, 1)


def test_generations_of_a_slot_that_is_not_there_are_an_error(maps: Path) -> None:
    maps.mkdir()
    with pytest.raises(HookError, match="no hooked SGLang publishes slot 0"):
        next(open_slot(str(maps), "0").generations())


def test_generations_end_after_a_time_of_quiet(runner: FakeRunner, maps: Path) -> None:
    assert len(list(open_slot(str(maps), "0").generations(timeout=0.05))) == 1


def test_a_directory_tells_what_happens_in_it(maps: Path, start_python: Callable[..., Any]) -> None:
    writer = start_python(WRITER)
    states = []
    writer.stdin.write("\n")
    writer.stdin.flush()
    for change in reader.open_directory(str(maps)).events(timeout=60):
        assert change.slot.name == "0"
        if not change.alive:
            assert change.state is not None
            assert change.state["pid"] == writer.pid
            break
        assert change.state is not None
        states.append(change.state["state"])
        if states[-1] == "ready":
            writer.kill()
            writer.wait()
    else:
        pytest.fail("the end of the process was not seen")
    assert states[-1] == "ready"


@pytest.mark.parametrize("step", [-86_400.0, 86_400.0])
def test_a_clock_that_steps_makes_no_wait_shorter_or_longer(
    step: float, runner: FakeRunner, maps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NTP or an operator sets the clock while a reader waits."""
    slot = open_slot(str(maps), "0")
    document = slot.read()
    now = time.time
    calls = 0

    def stepping() -> float:
        nonlocal calls
        calls += 1
        return now() + step * calls

    monkeypatch.setattr(time, "time", stepping)
    waits: list[Callable[[], object]] = [
        lambda: slot.wait_for_change(document, timeout=0.3),
        lambda: list(slot.generations(timeout=0.3)),
        lambda: list(reader.open_directory(str(maps)).events(timeout=0.3)),
    ]
    for wait in waits:
        started = time.monotonic()
        wait()
        assert 0.25 < time.monotonic() - started < 5
    # What a later event says of its time does not count either.
    for name in (files.STATE, files.LAYOUT):
        path = maps / name.format(0)
        told = json.loads(path.read_bytes())
        path.write_text(json.dumps({**told, "updated_at": told["updated_at"] + step}))
    assert slot.owner_alive()
    assert slot.read().content_generation == document.content_generation
    update(runner)
    assert slot.wait_for_change(document, timeout=5) is not None
    assert slot.read().content_generation > document.content_generation
