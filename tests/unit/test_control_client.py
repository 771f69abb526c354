"""Asking the owner whether the map is true: `Slot.check` and `Slot.weights_held(check=True)`.

Against real owner processes (the real recorder over real torch tensors), stopped and killed ones,
and fake sockets that answer what the hook never would.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_weight_hook.layout import files
from sglang_weight_hook.reader import (
    Busy,
    Check,
    ControlError,
    HookError,
    NoAnswer,
    NoSocket,
    OwnerGone,
    Slot,
    open_slot,
)

# Does what it is told on stdin, and says when it is done.
OWNER = """
import sys, threading
import torch
from fake_sglang import FakeRunner, load, settle, update
from sglang_weight_hook.publisher import background

background.DELAYS = (10_000.0,)  # it looks when it is asked, and not by itself
runner = FakeRunner(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 32)))
load(runner)
settle()
kept = []
def pause():
    print("updating", flush=True)
    sys.stdin.readline()
waiting = None
print("ready", flush=True)
for line in sys.stdin:
    what = line.strip()
    if what == "move":  # behind the hook's back
        kept.append(runner.model[0].weight.data)
        runner.model[0].weight.data = torch.zeros(64, 64)
    elif what == "update":
        update(runner)
    elif what == "pause":
        update(runner, during=pause)
    elif what == "begin":  # an update that waits for the lock, in a thread of its own
        waiting = threading.Thread(target=update, args=[runner])
        waiting.start()
    elif what == "join":
        waiting.join()
    print("done", flush=True)
"""


class Owner:
    def __init__(self, process: subprocess.Popen[str], directory: Path) -> None:
        self.process = process
        self.slot = open_slot(str(directory), "0")
        assert self.answer() == "ready"

    def stop(self) -> None:
        """SIGSTOP, until every thread has stopped."""
        os.kill(self.process.pid, signal.SIGSTOP)
        for _ in range(1000):
            threads = Path(f"/proc/{self.process.pid}/task").iterdir()
            if all("State:\tT" in (thread / "status").read_text() for thread in threads):
                return
            time.sleep(0.01)
        raise AssertionError("it does not stop")

    def go_on(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, what: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self.answer()


@pytest.fixture
def start_owner(
    start_python: Callable[..., subprocess.Popen[str]], maps: Path
) -> Callable[..., Owner]:
    """Start a process that publishes, and checks when it is asked."""

    def start(directory: Path = maps, **environment: str) -> Owner:
        settings = {
            "SGLANG_WEIGHT_HOOK_CHECK_SECONDS": "10000",
            "SGLANG_WEIGHT_HOOK_DIR": str(directory),
            **environment,
        }
        return Owner(start_python(OWNER, **settings), directory)

    return start


@pytest.fixture
def owner(start_owner: Callable[..., Owner]) -> Owner:
    return start_owner()


# --- check --------------------------------------------------------------------------------


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


# --- answers that are none ----------------------------------------------------------------

GOOD = {
    "ok": True,
    "equal": True,
    "published": False,
    "checked_at": 12.5,
    "state": "ready",
    "instance": "ab",
    "layout_generation": 1,
    "content_generation": 2,
    "tensors": [],
}


@pytest.fixture
def fake_owner(
    runner: Any, maps: Path
) -> Iterator[Callable[[Callable[[socket.socket], None]], Slot]]:
    """A socket in the place of the owner's, answered by the test."""
    threads, listeners = [], []

    def start(answer: Callable[[socket.socket], None]) -> Slot:
        slot = open_slot(str(maps), "0")
        path = Path(slot.path(files.STATE))
        name = "weight_hook_1.sock"
        path.write_text(json.dumps({**slot.read_state(), "control": name}))
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(slot.path(name))
        listener.listen(1)
        listeners.append(listener)

        def serve() -> None:
            peer, _ = listener.accept()
            with peer, contextlib.suppress(OSError):
                peer.recv(4096)
                answer(peer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        threads.append(thread)
        return slot

    yield start
    for listener in listeners:
        listener.close()
    for thread in threads:
        thread.join(10)


def test_a_good_answer_of_a_fake_is_taken(fake_owner: Any) -> None:
    """So that the refusals below are for what they change."""
    slot = fake_owner(lambda peer: peer.sendall(json.dumps(GOOD).encode() + b"\n"))
    assert slot.check() == Check(True, False, 12.5, "ready", "ab", 1, 2, ())


@pytest.mark.parametrize(
    "changed",
    [
        {"equal": 1},
        {"equal": None},
        {"published": "no"},
        {"checked_at": "now"},
        {"checked_at": True},
        {"checked_at": float("nan")},
        {"checked_at": float("inf")},
        {"state": 3},
        {"instance": None},
        {"layout_generation": -1},
        {"layout_generation": 1.5},
        {"content_generation": 1 << 70},
        {"tensors": None},
        {"tensors": [1]},
        {"tensors": {"a": 1}},
        {"ok": 1},
        {"ok": False},
        {"ok": False, "error": "unknown", "message": "m"},
        {"ok": False, "error": ["busy"], "message": {}},
    ],
)
def test_an_answer_of_other_types_is_refused(changed: dict[str, Any], fake_owner: Any) -> None:
    answer = json.dumps({**GOOD, **changed}).encode() + b"\n"
    slot = fake_owner(lambda peer: peer.sendall(answer))
    with pytest.raises(ControlError):
        slot.check()


@pytest.mark.parametrize("field", [name for name in GOOD if name != "ok"])
def test_an_answer_that_lacks_a_field_is_refused(field: str, fake_owner: Any) -> None:
    answer = {name: value for name, value in GOOD.items() if name != field}
    slot = fake_owner(lambda peer: peer.sendall(json.dumps(answer).encode() + b"\n"))
    with pytest.raises(ControlError, match="lacks a field"):
        slot.check()


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"", "hung up"),
        (b'{"ok": true', "hung up"),
        (b"\n", "not JSON"),
        (b"[]\n", "no JSON object"),
        (b"\xff\xfe\n", "not JSON"),
        (b"[" * 100_000 + b"\n", "not JSON"),
        (b"1" * 100_000 + b"\n", "no"),
        (b" " * (3 << 20), "more than"),
    ],
)
def test_garbage_is_refused(answer: bytes, says: str, fake_owner: Any) -> None:
    slot = fake_owner(lambda peer: peer.sendall(answer))
    with pytest.raises(ControlError, match=says):
        slot.check(timeout=10)


def test_an_answer_in_drops_gets_no_longer_than_was_given(fake_owner: Any) -> None:
    def drip(peer: socket.socket) -> None:
        while True:
            peer.sendall(b" ")
            time.sleep(0.02)

    slot = fake_owner(drip)
    started = time.monotonic()
    with pytest.raises(NoAnswer):
        slot.check(timeout=0.3)
    assert time.monotonic() - started < 1.3


@pytest.mark.parametrize(
    "name",
    [
        "../weight_hook_1.sock",
        "/tmp/weight_hook_1.sock",
        "x.sock",
        "",
        7,
        ["a"],
        True,
        "weight_hook_\0.sock",
    ],
)
def test_the_state_leads_to_no_socket_outside_the_directory(
    name: Any, runner: Any, maps: Path
) -> None:
    slot = open_slot(str(maps), "0")
    Path(slot.path(files.STATE)).write_text(json.dumps({**slot.read_state(), "control": name}))
    with pytest.raises(ControlError, match="no valid 'control'"):
        slot.check()


@pytest.mark.parametrize("kind", ["file", "folder", "fifo"])
def test_what_is_no_socket_is_refused(kind: str, runner: Any, maps: Path) -> None:
    slot = open_slot(str(maps), "0")
    name = "weight_hook_1.sock"
    {"file": Path.touch, "folder": Path.mkdir, "fifo": os.mkfifo}[kind](maps / name)
    Path(slot.path(files.STATE)).write_text(json.dumps({**slot.read_state(), "control": name}))
    with pytest.raises(ControlError):
        slot.check()


def test_the_state_of_release_0_1_names_no_socket(runner: Any, maps: Path) -> None:
    slot = open_slot(str(maps), "0")
    state = slot.read_state()
    del state["control"]
    Path(slot.path(files.STATE)).write_text(json.dumps(state))
    with pytest.raises(NoSocket, match=f"weight_hook_{os.getpid()}.sock"):
        slot.check()


# --- under the lock -----------------------------------------------------------------------


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
