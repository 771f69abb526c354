"""Between a slot's claim and its first state file readers wait: a server is about to publish."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sglang_weight_hook.layout import files
from sglang_weight_hook.reader import HookError, Slot, open_slot


@pytest.fixture
def claimed(runner: object, maps: Path) -> Iterator[tuple[Slot, Callable[[], None]]]:
    """A slot whose lock is held and whose state comes when the second thing is called."""
    path = maps / files.STATE.format(0)
    kept = path.with_name("kept")
    path.rename(kept)
    later = threading.Timer(0.3, lambda: kept.rename(path))
    yield open_slot(str(maps), "0"), later.start
    later.cancel()


def test_read_waits_for_the_first_state(claimed: tuple[Slot, Callable[[], None]]) -> None:
    slot, publish_later = claimed
    publish_later()
    assert slot.read(timeout=20).state["state"] == "ready"


def test_generations_wait_for_the_first_state(claimed: tuple[Slot, Callable[[], None]]) -> None:
    slot, publish_later = claimed
    publish_later()
    assert next(slot.generations(timeout=20)).state["state"] == "ready"


def test_a_state_that_does_not_come_is_an_error_in_time(
    claimed: tuple[Slot, Callable[[], None]],
) -> None:
    slot, _ = claimed
    started = time.monotonic()
    with pytest.raises(HookError):
        slot.read(timeout=0.2)
    assert list(slot.generations(timeout=0.2)) == []
    assert 0.4 <= time.monotonic() - started < 10


def test_where_nobody_has_claimed_the_slot_nobody_waits(maps: Path) -> None:
    maps.mkdir()
    started = time.monotonic()
    with pytest.raises(HookError, match="does not exist"):
        open_slot(str(maps), "0").read(timeout=30)
    assert time.monotonic() - started < 10


def test_a_change_is_told_once_where_an_owner_died_between_layout_and_state(
    maps: Path, start_python: Callable[..., object]
) -> None:
    writer: object = start_python(WRITER)
    assert writer.stdout.readline() == "ready\n"  # type: ignore[attr-defined]
    writer.kill()  # type: ignore[attr-defined]
    writer.wait()  # type: ignore[attr-defined]
    path = maps / files.LAYOUT.format(0)
    layout = json.loads(path.read_bytes())
    layout["layout_generation"] += 1
    path.write_text(json.dumps(layout))
    slot = open_slot(str(maps), "0")
    document = slot.read(timeout=1)
    assert document.layout_generation == layout["layout_generation"]
    assert slot.wait_for_change(document, timeout=0.1) is None
    assert slot.wait_for_change(document.state, timeout=0.1) is None


WRITER = """
import sys
from fake_sglang import FakeRunner, load, settle
import torch
runner = FakeRunner(torch.nn.Linear(4, 4))
load(runner)
settle()
print("ready", flush=True)
sys.stdin.readline()
"""


def test_a_layout_that_is_gone_is_not_waited_for(runner: object, maps: Path) -> None:
    """Without an event under way there is nobody who would write it."""
    (maps / files.LAYOUT.format(0)).unlink()
    started = time.monotonic()
    with pytest.raises(HookError, match="no layout document"):
        open_slot(str(maps), "0").read(timeout=60)
    assert time.monotonic() - started < 20


def test_a_layout_is_waited_for_while_an_event_is_under_way(runner: object, maps: Path) -> None:
    path, state = maps / files.LAYOUT.format(0), maps / files.STATE.format(0)
    kept = path.with_name("kept")
    path.rename(kept)
    state.write_text(json.dumps({**json.loads(state.read_bytes()), "state": "updating"}))
    later = threading.Timer(1.5, lambda: kept.rename(path))
    later.start()
    assert open_slot(str(maps), "0").read(timeout=60).layout_generation
    later.join()
