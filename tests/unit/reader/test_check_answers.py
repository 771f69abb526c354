"""Asking the owner: answers that the hook never gives, from fake sockets, are refused."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_weight_hook.layout import files
from sglang_weight_hook.reader import Check, ControlError, NoAnswer, NoSocket, Slot, open_slot

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
