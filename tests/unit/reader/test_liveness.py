"""Whether an owner lives: its lock and its process both count, and how certain the answer is.

The publishers are real processes with the real recorder, the locks are real.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_weight_hook.layout import files, process
from sglang_weight_hook.reader import open_slot, verify

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


@pytest.fixture
def server(maps: Path, start_python: Callable[..., Any]) -> Any:
    pytest.importorskip("torch")
    writer = start_python(WRITER)
    assert writer.stdout.readline() == "ready\n"
    return writer


@pytest.fixture
def hold(maps: Path) -> Iterator[Callable[[], None]]:
    """Lock the owner's lock file, as anybody may who can read it."""
    held: list[int] = []

    def hold() -> None:
        held.append(os.open(maps / files.OWNER_LOCK.format(0), os.O_RDONLY))
        fcntl.flock(held[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)

    yield hold
    for descriptor in held:
        os.close(descriptor)


def retell(maps: Path, **fields: Any) -> None:
    for name in (files.STATE, files.LAYOUT):
        path = maps / name.format(0)
        document = json.loads(path.read_bytes())
        part = document if name == files.STATE else document["identity"]
        part.update({key: value for key, value in fields.items() if key in part})
        path.write_text(json.dumps(document))


def test_a_lock_that_another_process_holds_makes_no_dead_owner_live(
    server: Any, maps: Path, hold: Callable[[], None]
) -> None:
    slot = open_slot(str(maps), "0")
    assert slot.liveness()[:2] == (True, True)
    server.kill()
    server.wait()
    hold()
    assert not slot.owner_alive()
    assert slot.liveness().certain
    assert not slot.read().owner_alive()
    found = verify.verify_slot(slot)
    assert [finding.check for finding in found.findings] == ["owner"]


def test_an_owner_that_was_killed_and_not_yet_waited_for_is_dead(
    server: Any, maps: Path, hold: Callable[[], None]
) -> None:
    slot = open_slot(str(maps), "0")
    server.kill()
    os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)
    hold()
    assert slot.liveness()[:2] == (False, True)


def test_a_live_process_without_the_lock_is_no_owner(server: Any, maps: Path) -> None:
    (maps / files.OWNER_LOCK.format(0)).unlink()
    (maps / files.OWNER_LOCK.format(0)).touch()
    assert open_slot(str(maps), "0").liveness()[:2] == (False, True)


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"boot_id": "another"}, "another host"),
        ({"pid": 2**22 + 1, "pid_namespace": "pid:[1]"}, "another pid namespace"),
    ],
)
def test_where_the_process_is_out_of_sight_the_lock_decides_and_that_is_said(
    fields: dict[str, Any], where: str, server: Any, maps: Path, hold: Callable[[], None]
) -> None:
    server.kill()
    server.wait()
    hold()
    retell(maps, **fields)
    slot = open_slot(str(maps), "0")
    found = slot.liveness()
    assert found[:2] == (True, False)
    assert where in found.why
    levels = {(each.level, each.check) for each in verify.verify_slot(slot).findings}
    assert ("warning", "owner") in levels


def test_a_free_lock_of_another_host_is_no_certain_end(server: Any, maps: Path) -> None:
    server.kill()
    server.wait()
    retell(maps, boot_id="another")
    assert open_slot(str(maps), "0").liveness()[:2] == (False, False)


def test_another_process_with_the_owners_pid_is_not_the_owner(
    server: Any, maps: Path, hold: Callable[[], None]
) -> None:
    server.kill()
    server.wait()
    hold()
    retell(maps, pid=os.getpid())
    assert open_slot(str(maps), "0").liveness()[:2] == (False, True)


@pytest.mark.parametrize("pid", [0, -1, -(2**70), 2**70])
def test_what_is_no_pid_is_no_process(pid: int) -> None:
    assert process.is_running(pid, 1) is False


def test_a_process_that_proc_hides_is_not_called_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_read", lambda path: None)  # hidepid=2, proc(5)
    assert process.is_running(os.getpid(), 1) is None
