"""`Slot.weights_held(check=True)`: a body runs only with a map that is true.

Against real owner processes (`owner_process`): the real recorder over real torch tensors.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from owner_process import Owner

from sglang_weight_hook.layout import files
from sglang_weight_hook.reader import Busy, Check, HookError, NoAnswer, OwnerGone, open_slot


def test_a_body_runs_with_a_map_that_is_true(owner: Owner) -> None:
    with owner.slot.weights_held(check=True):
        document = owner.slot.read()
    assert document.state["state"] == "ready"


def test_a_body_runs_with_the_map_that_the_check_has_published(owner: Owner) -> None:
    before = owner.slot.read()
    owner.tell("move")
    with owner.slot.weights_held(check=True):
        inside = owner.slot.read(timeout=0)
        assert inside.tensors["0.weight"]["ptr"] != before.tensors["0.weight"]["ptr"]
        assert inside.state["event"]["kind"] == "unannounced_change"
    assert owner.slot.check().equal


HOLDER = """
import sys, time
from sglang_weight_hook.reader import open_slot
slot = open_slot(sys.argv[1], "0")
with slot.weights_held():
    print("held", flush=True)
    sys.stdin.readline()
    with slot.weights_held(check=True):
        print(slot.read(timeout=0).content_generation, flush=True)
        sys.stdin.readline()
    print("let go", flush=True)
"""


def test_a_check_under_the_lock_is_answered_while_an_update_waits_for_it(
    owner: Owner, start_python: Callable[..., subprocess.Popen[str]]
) -> None:
    holder = start_python(HOLDER, owner.slot.directory)
    assert holder.stdin is not None
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    content = owner.slot.read().content_generation
    assert owner.tell("begin") == "done"
    time.sleep(0.2)  # it waits for the lock by now
    holder.stdin.write("check\n")
    holder.stdin.flush()
    assert int(holder.stdout.readline()) == content
    state = owner.slot.read_state()
    assert (state["state"], state["content_generation"]) == ("ready", content)
    holder.stdin.write("let go\n")
    holder.stdin.flush()
    assert holder.stdout.readline() == "let go\n"
    assert owner.tell("join") == "done"
    assert owner.slot.read_state()["content_generation"] == content + 1


def test_without_an_answer_no_body_runs_and_the_lock_is_let_go(owner: Owner) -> None:
    owner.process.kill()
    owner.process.wait()
    with pytest.raises(OwnerGone), owner.slot.weights_held(check=True):
        pytest.fail("the body ran")
    import fcntl

    with open(owner.slot.path(files.SAVING_LOCK), "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_stopped_owner_keeps_no_body_waiting_for_long(owner: Owner) -> None:
    owner.stop()
    try:
        started = time.monotonic()
        with pytest.raises(NoAnswer), owner.slot.weights_held(timeout=0.3, check=True):
            pytest.fail("the body ran")
        assert time.monotonic() - started < 1.5
    finally:
        owner.go_on()


def test_a_map_that_is_wrong_and_not_published_again_runs_no_body(
    runner: Any, maps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = open_slot(str(maps), "0")
    asked = []

    def check(timeout: float = 1.0) -> Check:
        asked.append(timeout)
        return Check(False, False, 1.0, "ready", "ab", 1, 1, ("a.weight",))

    monkeypatch.setattr(slot, "check", check)
    with pytest.raises(HookError, match=r"a\.weight.*not published"), slot.weights_held(check=True):
        pytest.fail("the body ran")
    assert len(asked) > 1


def test_a_moment_of_being_busy_is_waited_out(
    runner: Any, maps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = open_slot(str(maps), "0")
    answers = [Busy("busy"), Check(True, False, 1.0, "ready", "ab", 1, 1, ())]

    def check(timeout: float = 1.0) -> Check:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(slot, "check", check)
    with slot.weights_held(check=True):
        pass
    assert answers == []
    answers += [Busy("busy")] * 1000
    with pytest.raises(Busy), slot.weights_held(check=True):
        pytest.fail("the body ran")
