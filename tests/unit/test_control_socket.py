"""The control socket as the publishing process serves it: who may ask, and what comes of it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import selectors
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_sglang import FakeRunner, load, settle, update
from published_files import a_model, eventually, generations, header_of, layout_of, state_of

from sglang_weight_hook.publisher import background

torch = pytest.importorskip("torch")


def connect(maps: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.settimeout(10)
    client.connect(str(maps / state_of(maps)["control"]))
    return client


def ask(maps: Path, request: Any) -> dict[str, Any]:
    with connect(maps) as client, client.makefile("rw") as stream_:
        stream_.write(json.dumps(request) + "\n")
        stream_.flush()
        answer: dict[str, Any] = json.loads(stream_.readline())
        return answer


def test_a_check_on_demand_finds_map_and_memory_equal(asked: FakeRunner, maps: Path) -> None:
    before = time.time()
    answer = ask(maps, {"op": "check", "slot": "0"})
    assert (answer["ok"], answer["equal"], answer["published"]) == (True, True, False)
    assert before <= answer["checked_at"] <= time.time()
    assert (answer["layout_generation"], answer["content_generation"]) == generations(maps)
    assert answer["instance"] == state_of(maps)["instance"] == layout_of(maps)["instance"]


def test_a_check_on_demand_publishes_what_it_finds_and_finds_it_once(
    asked: FakeRunner, maps: Path
) -> None:
    asked.model[1].weight.data = torch.zeros(2, 3)
    answer = ask(maps, {"op": "check", "slot": "0"})
    assert (answer["ok"], answer["equal"], answer["published"]) == (True, False, True)
    assert answer["tensors"] == ["1.weight"]
    assert layout_of(maps)["tensors"]["1.weight"]["ptr"] == asked.model[1].weight.data_ptr()
    assert answer["layout_generation"] == layout_of(maps)["layout_generation"] == 2
    assert ask(maps, {"op": "check", "slot": "0"})["equal"] is True


def test_a_check_during_an_update_is_refused_as_busy(asked: FakeRunner, maps: Path) -> None:
    answers: list[dict[str, Any]] = []
    update(asked, during=lambda: answers.append(ask(maps, {"op": "check", "slot": "0"})))
    assert [(one["ok"], one["error"]) for one in answers] == [(False, "busy")]


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        ({"op": "check", "slot": "7"}, "no_slot"),
        ({"op": "write"}, "unknown"),
        ({}, "unknown"),
        ([], "malformed"),
        ("check", "malformed"),
        ({"op": "check", "slot": ["0"]}, "no_slot"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_a_reason(
    request_: Any, error: str, asked: FakeRunner, maps: Path
) -> None:
    answer = ask(maps, request_)
    assert (answer["ok"], answer["error"]) == (False, error)
    assert answer["message"]


def test_clients_that_talk_nonsense_or_nothing_keep_nobody_waiting(
    asked: FakeRunner, maps: Path
) -> None:
    silent = [connect(maps) for _ in range(5)]
    with connect(maps) as client:
        client.sendall(b"x" * 100_000)
        # It is dropped, perhaps while it is still sending.
        with contextlib.suppress(ConnectionError):
            assert client.recv(1) == b""
    with connect(maps) as client:
        client.sendall(b'{"op": "check"')  # and never the rest
        assert ask(maps, {"op": "check", "slot": "0"})["ok"] is True
    with connect(maps) as client:
        client.sendall(b'\xff\xfe\x00\n{"op":"check","slot":"0"}\n')
        lines = client.makefile("r")
        assert json.loads(lines.readline())["error"] == "malformed"
        assert json.loads(lines.readline())["ok"] is True
        lines.close()
    for one in silent:
        one.close()


def test_the_socket_is_for_its_user_alone(asked: FakeRunner, maps: Path) -> None:
    path = maps / state_of(maps)["control"]
    assert path.stat().st_mode & 0o777 == 0o600
    if os.geteuid():
        pytest.skip("only root can become somebody else")
    path.chmod(0o666)  # so that only the question who is there refuses
    for folder in (maps, *maps.parents):
        if folder.stat().st_uid == 0 and str(folder).startswith("/tmp/"):
            folder.chmod(0o755)
    child = os.fork()
    if child == 0:
        try:
            os.setuid(65534)
            client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            client.connect(str(path))
            client.sendall(b'{"op":"check","slot":"0"}\n')
            said = client.recv(100)  # why not, and nothing more
            refused = said == b"" or json.loads(said)["error"] == "not_allowed"
            os._exit(0 if refused and client.recv(100) == b"" else 1)
        except ConnectionError:
            os._exit(0)
        except BaseException:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_directory_with_a_long_path_has_its_socket(
    checking: Callable[[float], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = tmp_path / ("x" * 100) / ("y" * 100)
    monkeypatch.setenv("SGLANG_WEIGHT_HOOK_DIR", str(maps))
    checking(1000)
    runner = FakeRunner(a_model())
    load(runner)
    settle()
    assert (maps / state_of(maps)["control"]).is_socket()


def test_a_directory_that_was_removed_gets_its_socket_and_header_again(
    asked: FakeRunner, maps: Path
) -> None:
    import shutil

    shutil.rmtree(maps)
    update(asked)
    eventually(
        lambda: ((name := state_of(maps)["control"]) and (maps / name).exists()) or (update(asked))
    )
    assert header_of(maps).content_generation == state_of(maps)["content_generation"]


def test_a_forked_child_has_no_thread_and_leaves_the_socket_to_its_parent(
    asked: FakeRunner, maps: Path
) -> None:
    name = state_of(maps)["control"]
    child = os.fork()
    if child == 0:
        os._exit(int(background.is_running()))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (maps / name).exists()
    assert ask(maps, {"op": "check", "slot": "0"})["ok"] is True


def test_without_a_free_descriptor_nobody_is_accepted_for_a_while(
    asked: FakeRunner, maps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits for accept(2) keeps the listener readable, which must not keep the thread busy."""
    calls = []
    listener = background._thread.control._listener  # type: ignore[union-attr]

    class Full:
        def fileno(self) -> int:
            return listener.fileno()

        def accept(self) -> None:
            calls.append(time.monotonic())
            raise OSError(errno.EMFILE, "Too many open files")

    control_socket = background._thread.control  # type: ignore[union-attr]
    full = Full()
    control_socket._selector.unregister(listener)
    control_socket._selector.register(full, selectors.EVENT_READ)
    with monkeypatch.context() as patched:
        patched.setattr(control_socket, "_listener", full)
        background.wake()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as waiting:
            waiting.connect(str(maps / state_of(maps)["control"]))
            time.sleep(1.5)
    assert 1 <= len(calls) <= 3
