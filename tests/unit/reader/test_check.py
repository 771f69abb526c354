"""Asking the owner whether the map is true (`Slot.check`): equal, moved, busy, stopped, killed.

Against real owner processes (`owner_process`): the real recorder over real torch tensors.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from owner_process import Owner

from sglang_weight_hook.layout import files
from sglang_weight_hook.reader import (
    Busy,
    Check,
    HookError,
    NoAnswer,
    NoSocket,
    OwnerGone,
    Slot,
    open_slot,
)


def test_a_map_that_is_true_is_equal(owner: Owner) -> None:
    started = time.time()
    found = owner.slot.check()
    state = owner.slot.read_state()
    assert isinstance(found, Check)
    assert (found.equal, found.published, found.tensors) == (True, False, ())
    assert found.state == "ready"
    assert found.instance == state["instance"]
    assert found.layout_generation == state["layout_generation"]
    assert found.content_generation == state["content_generation"]
    assert started <= found.checked_at <= time.time()
    checked_at = owner.slot.read().checked_at
    assert checked_at is not None
    assert checked_at >= started - 0.001


def test_a_move_behind_the_hook_is_found_published_and_then_equal(owner: Owner) -> None:
    before = owner.slot.read()
    owner.tell("move")
    found = owner.slot.check()
    assert (found.equal, found.published, found.tensors) == (False, True, ("0.weight",))
    after = owner.slot.read()
    event = after.state["event"]
    assert (event["kind"], event["tensors"]) == ("unannounced_change", ["0.weight"])
    assert found.layout_generation == after.layout_generation == before.layout_generation + 1
    assert after.tensors["0.weight"]["ptr"] != before.tensors["0.weight"]["ptr"]
    again = owner.slot.check()
    assert (again.equal, again.published) == (True, False)
    assert again.layout_generation == after.layout_generation


def test_during_an_update_there_is_no_answer_but_busy(owner: Owner) -> None:
    assert owner.tell("pause") == "updating"
    with pytest.raises(Busy, match=r"slot is updating.*ask again"):
        owner.slot.check()
    assert owner.tell("go on") == "done"
    assert owner.slot.check().equal


def test_without_checks_there_is_no_socket_and_the_error_says_why(
    start_owner: Callable[..., Owner],
) -> None:
    owner = start_owner(SGLANG_WEIGHT_HOOK_CHECK_SECONDS="0")
    with pytest.raises(NoSocket, match="SGLANG_WEIGHT_HOOK_CHECK_SECONDS=0"):
        owner.slot.check()
    owner.process.kill()
    owner.process.wait()
    with pytest.raises(OwnerGone, match="start the server again"):
        owner.slot.check()


def test_a_socket_that_was_removed_is_said_to_be_none(owner: Owner) -> None:
    os.unlink(owner.slot.path(owner.slot.read_state()["control"]))
    with pytest.raises(NoSocket, match="has no control socket weight_hook_"):
        owner.slot.check()


def test_a_killed_owner_is_gone(owner: Owner) -> None:
    owner.process.kill()
    owner.process.wait()
    with pytest.raises(OwnerGone, match=f"pid {owner.process.pid}"):
        owner.slot.check()


def test_a_stopped_owner_costs_the_time_that_was_given_and_no_more(owner: Owner) -> None:
    owner.stop()
    try:
        for timeout in (0.05, 0.3):
            started = time.monotonic()
            with pytest.raises(NoAnswer, match="stopped"):
                owner.slot.check(timeout)
            assert timeout <= time.monotonic() - started < timeout + 1
        # Its queue full of those that did not wait: still no longer.
        with contextlib.ExitStack() as many:
            for _ in range(64):
                peer = many.enter_context(socket.socket(socket.AF_UNIX))
                peer.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    peer.connect(owner.slot.path(owner.slot.read_state()["control"]))
            started = time.monotonic()
            with pytest.raises(NoAnswer):
                owner.slot.check(0.2)
            assert time.monotonic() - started < 1.2
    finally:
        owner.go_on()
    # It goes on, and answers.
    deadline = time.monotonic() + 30
    while True:
        try:
            assert owner.slot.check().equal
            break
        except NoAnswer:
            assert time.monotonic() < deadline


def test_a_stopped_owner_answers_once_it_goes_on(owner: Owner) -> None:
    owner.stop()
    timer = threading.Timer(0.3, owner.go_on)
    timer.start()
    try:
        assert owner.slot.check(timeout=30).equal
    finally:
        timer.join()


CLIENT = """
import os, sys
from sglang_weight_hook.reader import NotAllowed, open_slot
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
try:
    open_slot(sys.argv[1], "0").check()
except NotAllowed as error:
    print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_another_user_is_not_allowed(
    start_owner: Callable[..., Owner], start_python: Callable[..., subprocess.Popen[str]]
) -> None:
    import tempfile

    # pytest's own directories let nobody else in.
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        owner = start_owner(Path(name) / "maps")
        stranger = start_python(CLIENT, owner.slot.directory)
        said, _ = stranger.communicate(timeout=60)
        assert "ask as the user that runs the server" in said
        assert owner.slot.check().equal
        owner.process.kill()
        owner.process.wait()


def test_a_directory_with_a_path_of_200_characters_is_no_hindrance(
    start_owner: Callable[..., Owner], tmp_path: Path
) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    owner = start_owner(deep)
    assert len(owner.slot.path(owner.slot.read_state()["control"])) > 200
    assert owner.slot.check().equal
    before = len(os.listdir("/proc/self/fd"))
    assert owner.slot.check().equal
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_relative_directory_is_no_hindrance(owner: Owner, monkeypatch: Any) -> None:
    monkeypatch.chdir(owner.slot.directory)
    assert Slot(".", "0").check().equal


def test_a_slot_that_the_process_does_not_publish_is_gone(owner: Owner) -> None:
    other = open_slot(owner.slot.directory, "1")
    for name in (files.STATE, files.OWNER_LOCK):
        os.link(owner.slot.path(name), other.path(name))
    with pytest.raises(OwnerGone, match="does not publish slot 1"):
        other.check()


def test_a_slot_that_is_not_there_is_an_error_that_says_so(maps: Path) -> None:
    with pytest.raises(HookError, match="no hooked SGLang publishes slot 0"):
        open_slot(str(maps), "0").check()
