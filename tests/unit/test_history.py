"""The event log as it is read: in order, filtered, and whatever else stands in the files.

The logs are written by the publisher's own `EventLog`, or by the real recorder.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_sglang import FakeRunner, event, stream, update

from sglang_weight_hook.layout import files
from sglang_weight_hook.publisher import event_log
from sglang_weight_hook.publisher.event_log import EventLog
from sglang_weight_hook.reader import HookError, PastEvent, open_directory, open_slot


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "logs"
    path.mkdir()
    return path


def a_line(at: float, kind: str = "update_weights_from_disk", **more: Any) -> dict[str, Any]:
    return {"kind": kind, "success": True, "state": "ready", "updated_at": at, **more}


def log(folder: Path, slot: str = "0") -> EventLog:
    return EventLog(str(folder), slot)


def kinds(events: Any) -> list[str]:
    return [event.kind for event in events]


def test_what_the_recorder_logs_is_read_in_order(runner: FakeRunner, maps: Path) -> None:
    update(runner)
    event("update_weights_from_disk", "update", [runner], result=(False, "no such directory"))
    stream(runner)
    found = list(open_slot(str(maps), "0").history())
    assert kinds(found) == [
        *("load_model", "scheduler_ready", "update_weights_from_disk"),
        *("update_weights_from_disk", "update_weights_from_tensor"),
    ]
    assert [one.raw["content_generation"] for one in found] == [1, 1, 2, 3, 4]
    assert [one.raw["success"] for one in found] == [True, True, True, False, True]
    assert [one.at for one in found] == sorted(one.at for one in found)
    assert {one.slot for one in found} == {"0"}


OWNER = """
from fake_sglang import FakeRunner, load, settle, update
import torch
runner = FakeRunner(torch.nn.Linear(4, 4))
load(runner)
settle()
update(runner)
print("ready", flush=True)
input()
del runner  # the slot is withdrawn
"""


@pytest.mark.parametrize("ending", ["killed", "ended"])
def test_the_log_outlives_its_owner(
    ending: str, maps: Path, start_python: Callable[..., subprocess.Popen[str]]
) -> None:
    owner = start_python(OWNER)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "ready\n"
    if ending == "killed":
        owner.kill()
    else:
        owner.communicate("\n", timeout=60)
        assert open_directory(str(maps)).slots() == []
    owner.wait()
    assert not open_slot(str(maps), "0").owner_alive()
    (history,) = open_directory(str(maps)).histories()
    assert kinds(history) == ["load_model", "scheduler_ready", "update_weights_from_disk"]


def test_only_events_since_a_time_and_of_a_kind(folder: Path) -> None:
    written = log(folder)
    for at, kind in ((1.0, "load_model"), (2.0, "update_a"), (3.0, "update_b"), (4.0, "release")):
        written.append(a_line(at, kind))
    slot = open_slot(str(folder), "0")
    assert kinds(slot.history(since=3.0)) == ["update_b", "release"]
    assert kinds(slot.history(kind="update_*")) == ["update_a", "update_b"]
    assert kinds(slot.history(since=2.5, kind="update_*")) == ["update_b"]
    assert kinds(slot.history(since=99.0)) == []
    history = slot.history(kind="load_model")
    assert kinds(history) == kinds(history) == ["load_model"]  # can be read again


def test_the_rotated_file_comes_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_log, "LIMIT", 500)
    written = log(folder)
    for at in range(6):
        written.append(a_line(float(at), message="m" * 150))
    assert (folder / files.EVENTS_BEFORE.format("0")).exists()
    found = [one.at for one in open_slot(str(folder), "0").history()]
    assert found == sorted(found)
    assert found[-1] == 5.0
    assert len(found) >= 3
    (folder / files.EVENTS.format("0")).unlink(missing_ok=True)
    assert list(open_slot(str(folder), "0").history())  # the moment after a rotation


def test_a_log_that_is_rotated_while_it_is_read_is_read_once(folder: Path) -> None:
    written = log(folder)
    for at in range(3):
        written.append(a_line(float(at)))
    os.link(folder / files.EVENTS.format("0"), folder / files.EVENTS_BEFORE.format("0"))
    assert [one.at for one in open_slot(str(folder), "0").history()] == [0.0, 1.0, 2.0]


def test_what_is_appended_while_it_is_read_is_not_waited_for(folder: Path) -> None:
    written = log(folder)
    written.append(a_line(0.0))
    seen = 0
    for one in open_slot(str(folder), "0").history():
        seen += 1
        written.append(a_line(one.at + 1))
    assert seen == 1


def test_a_torn_last_line_is_left_out_and_counted(folder: Path) -> None:
    written = log(folder)
    written.append(a_line(1.0))
    with open(written.path, "ab") as file:
        file.write(json.dumps(a_line(2.0)).encode()[:-3])
    history = open_slot(str(folder), "0").history()
    assert [one.at for one in history] == [1.0]
    assert history.skipped == 1
    written.append(a_line(3.0))  # ends the torn line, and is lost with it
    written.append(a_line(4.0))
    assert [one.at for one in history] == [1.0, 4.0]
    assert history.skipped == 1


FOREIGN = [
    b"",
    b"not JSON",
    b"[]",
    b"7",
    b"null",
    b"{}",
    b'{"kind": "x"}',
    b'{"updated_at": 1}',
    b'{"kind": 3, "updated_at": 1}',
    b'{"kind": "x", "updated_at": "1"}',
    b'{"kind": "x", "updated_at": true}',
    b'{"kind": "x", "updated_at": NaN}',
    b'{"kind": "x", "updated_at": 1e999}',
    b'{"kind": "x", "updated_at": ' + b"9" * 400 + b"}",
    b"\xff\xfe\x00",
    b"[" * 60_000,
    b"9" * 10_000,
]


@pytest.mark.parametrize("foreign", FOREIGN, ids=range(len(FOREIGN)))
def test_a_foreign_line_is_left_out_and_counted(foreign: bytes, folder: Path) -> None:
    written = log(folder)
    written.append(a_line(1.0))
    with open(written.path, "ab") as file:
        file.write(foreign + b"\n")
    written.append(a_line(2.0))
    history = open_slot(str(folder), "0").history()
    assert [one.at for one in history] == [1.0, 2.0]
    assert history.skipped == 1


def test_a_huge_line_and_a_huge_file_take_little_memory(folder: Path) -> None:
    written = log(folder)
    written.append(a_line(1.0))
    with open(written.path, "ab") as file:
        for _ in range(64):
            file.write(b" " * (1 << 20))
        file.write(b"\n")
        for _ in range(20_000):
            file.write(b"x" * 999 + b"\n")
    written.append(a_line(2.0))
    history = open_slot(str(folder), "0").history()
    # The append above rotated it; both names have one file then.
    tracemalloc.start()
    try:
        found = [one.at for one in history]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == [1.0, 2.0]
    assert history.skipped == 20_001
    assert peak < 2 << 20


def test_a_file_without_an_end_of_line_is_no_event(folder: Path) -> None:
    path = folder / files.EVENTS.format("0")
    with open(path, "wb") as file:
        file.truncate(8 << 30)  # sparse
        file.seek(0)
        file.write(json.dumps(a_line(1.0)).encode() + b"\n")
        file.truncate(200_000)
    history = open_slot(str(folder), "0").history()
    assert [one.at for one in history] == [1.0]
    assert history.skipped == 1


@pytest.mark.parametrize("kind", ["fifo", "link", "folder"])
def test_what_is_no_file_is_refused_at_once(kind: str, folder: Path) -> None:
    path = folder / files.EVENTS.format("0")
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        (folder / "other").write_text(json.dumps(a_line(1.0)) + "\n")
        path.symlink_to(folder / "other")
    else:
        path.mkdir()
    started = time.monotonic()
    with pytest.raises(HookError):
        list(open_slot(str(folder), "0").history())
    assert time.monotonic() - started < 5


def test_no_descriptor_is_left_behind(folder: Path) -> None:
    written = log(folder)
    for at in range(100):
        written.append(a_line(float(at)))
    before = len(os.listdir("/proc/self/fd"))
    for _ in open_slot(str(folder), "0").history():
        break
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_slot_without_a_log_says_what_to_check(folder: Path) -> None:
    with pytest.raises(HookError, match="check the directory and the slot's name"):
        list(open_slot(str(folder), "0").history())
    assert open_directory(str(folder)).histories() == []


def test_every_slot_that_has_a_log_is_found(folder: Path) -> None:
    for slot in ("1", "0", "0_draft", "0.node.1-77"):
        log(folder, slot).append(a_line(1.0))
    (folder / files.EVENTS_BEFORE.format("2")).write_text(json.dumps(a_line(1.0)) + "\n")
    (folder / "weight_events_.jsonl").touch()
    (folder / "weight_events_3.jsonl.tmp").touch()
    found = open_directory(str(folder)).histories()
    assert [history.slot for history in found] == ["0", "0.node.1-77", "0_draft", "1", "2"]
    assert list(found[-1]) == [PastEvent("2", 1.0, "update_weights_from_disk", a_line(1.0))]
