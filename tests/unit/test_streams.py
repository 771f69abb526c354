"""Streams of buckets outside a session: nothing between the buckets, one publication at the end.

The background thread runs here; the other tests of the recorder do without it.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_sglang import FakeRunner, event, load, settle, stream, update
from published_files import a_model, generations, lock_is_free, state_of

from sglang_weight_hook.layout import files
from sglang_weight_hook.publisher import background, recorder, settings

torch = pytest.importorskip("torch")

TENSOR = "update_weights_from_tensor"


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Set the quiet time, in milliseconds, before the first runner is published."""

    def set_it(milliseconds: float) -> None:
        monkeypatch.setenv("SGLANG_WEIGHT_HOOK_QUIET_MS", str(milliseconds))
        settings._settings = None

    return set_it


@pytest.fixture
def runner(quiet: Callable[[float], None]) -> FakeRunner:
    """A settled runner whose streams end after 50 ms of quiet, as by default."""
    quiet(50)
    made = FakeRunner(a_model())
    load(made)
    settle()
    return made


def wait_for(maps: Path, state: str, slot: str = "0", seconds: float = 10.0) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while True:
        found = state_of(maps, slot)
        if found["state"] == state:
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.002)


def wait_for_lock(maps: Path) -> None:
    """The lock is let go right after the state is written."""
    deadline = time.monotonic() + 10.0
    while not lock_is_free(maps):
        assert time.monotonic() < deadline
        time.sleep(0.002)


def written(maps: Path) -> list[tuple[str, int, int]]:
    """What would change if any file of the directory were replaced or appended to."""
    found = [(path.name, path.stat()) for path in sorted(maps.iterdir())]
    return [(name, status.st_ino, status.st_mtime_ns) for name, status in found]


def test_further_buckets_look_at_nothing_and_write_nothing(
    runner: FakeRunner, maps: Path, quiet: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet(60_000)
    stream(runner)
    before = written(maps)
    looks: list[None] = []
    with monkeypatch.context() as patch:
        patch.setattr(recorder.Tracked, "look", lambda *_: looks.append(None))
        for _ in range(100):
            stream(runner)
    assert looks == []
    assert written(maps) == before
    assert state_of(maps)["state"] == "updating"
    assert not lock_is_free(maps)


def test_a_stream_ends_after_quiet_time_as_one_event_and_one_content_generation(
    runner: FakeRunner, maps: Path
) -> None:
    before = generations(maps)
    for _ in range(20):
        stream(runner)
    state = wait_for(maps, "ready")
    assert generations(maps) == (before[0], before[1] + 1)
    assert (state["event"]["kind"], state["event"]["calls"]) == (TENSOR, 20)
    assert state["event"]["nested"] == {}
    wait_for_lock(maps)


def test_a_stream_that_goes_on_is_not_ended_between_its_buckets(
    runner: FakeRunner, maps: Path, quiet: Callable[[float], None]
) -> None:
    quiet(1000)
    end = time.monotonic() + 2.0
    seen = set()
    while time.monotonic() < end:
        stream(runner)
        time.sleep(0.05)
        seen.add(state_of(maps)["state"])
    assert seen == {"updating"}
    assert wait_for(maps, "ready")["content_generation"] == 2


def test_a_weight_that_a_bucket_moved_is_published_at_the_end(
    runner: FakeRunner, maps: Path
) -> None:
    stream(runner)

    def move() -> None:
        runner.model[0].weight.data = torch.zeros(3, 4)

    stream(runner, during=move)
    stream(runner)
    state = wait_for(maps, "ready")
    assert state["event"]["moved"] == 1
    layout = json.loads((maps / files.LAYOUT.format(0)).read_bytes())
    assert layout["tensors"]["0.weight"]["ptr"] == runner.model[0].weight.data_ptr()
    assert layout["layout_generation"] == state["layout_generation"] == 2


def test_a_failed_bucket_makes_the_whole_stream_failed(runner: FakeRunner, maps: Path) -> None:
    stream(runner)
    event(TENSOR, "stream", [runner], error=ValueError("bucket 2"))
    stream(runner)
    state = wait_for(maps, "failed")
    assert state["event"]["message"] == "ValueError: bucket 2"


@pytest.mark.parametrize("kind", ["update", "relocate", "release", "settle", "adapt"])
def test_an_event_of_another_kind_ends_the_stream_before_it_begins(
    kind: str, runner: FakeRunner, maps: Path, quiet: Callable[[float], None]
) -> None:
    quiet(60_000)
    stream(runner)
    stream(runner)
    seen: list[dict[str, Any]] = []
    runners = [] if kind == "settle" else [runner]
    event("another", kind, runners, during=lambda: seen.append(state_of(maps)))
    lines = list(map(json.loads, (maps / "weight_events_0.jsonl").read_text().splitlines()))
    ended = next(line for line in lines if line["kind"] == TENSOR)
    assert (ended["calls"], ended["content_generation"]) == (2, 2)
    if kind != "settle":  # which begins when it has returned
        assert seen[0]["event"]["kind"] == "another"
        assert seen[0]["content_generation"] == 2


def test_a_session_ends_the_stream_before_it_and_is_an_event_of_its_own(
    runner: FakeRunner, maps: Path, quiet: Callable[[float], None]
) -> None:
    quiet(60_000)
    stream(runner)
    event("weight_update_session", "open", [runner])
    assert state_of(maps)["event"]["kind"] == "weight_update_session"
    for _ in range(3):
        stream(runner)
    event("weight_update_session", "close", [runner])
    state = state_of(maps)
    assert state["state"] == "ready"
    assert state["event"]["calls"] == 5
    assert state["content_generation"] == 3


def test_what_sglang_says_is_the_last_bucket_ends_the_stream_at_once(
    runner: FakeRunner, maps: Path, quiet: Callable[[float], None]
) -> None:
    quiet(60_000)
    for number in range(3):
        request = recorder.begin_request({"is_last": number == 2})
        stream(runner)
        recorder.finish_request(request, None, None)
        if number < 2:
            assert state_of(maps)["state"] == "updating"
    assert wait_for(maps, "ready")["event"]["calls"] == 3


def test_two_runners_that_share_a_weight_end_their_stream_together(
    maps: Path, quiet: Callable[[float], None]
) -> None:
    quiet(50)
    target, draft = FakeRunner(a_model()), FakeRunner(a_model(), draft=True)
    draft.model[0].weight = target.model[0].weight
    load(target)
    load(draft)
    settle()
    for _ in range(5):
        stream(target)
        stream(draft)
    states = [wait_for(maps, "ready", slot) for slot in ("0", "0_draft")]
    assert [state["event"]["calls"] for state in states] == [10, 10]
    assert [state["content_generation"] for state in states] == [2, 2]


def test_two_runners_that_share_nothing_have_streams_of_their_own(
    maps: Path, quiet: Callable[[float], None]
) -> None:
    quiet(60_000)
    first, second = FakeRunner(a_model()), FakeRunner(a_model(), gpu_id=1)
    load(first)
    load(second)
    settle()
    stream(first)
    assert (state_of(maps, "0")["state"], state_of(maps, "1")["state"]) == ("updating", "ready")
    update(second)
    assert (state_of(maps, "0")["state"], state_of(maps, "1")["state"]) == ("updating", "ready")


def test_a_reader_that_waits_for_the_lock_gets_it_after_the_quiet_time(
    runner: FakeRunner, maps: Path
) -> None:
    stream(runner)
    with open(maps / files.SAVING_LOCK.format(0), "rb") as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)  # waits
        assert state_of(maps)["state"] == "ready"


def test_a_stream_that_began_without_the_lock_waits_for_no_reader_again(
    runner: FakeRunner, maps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_WEIGHT_HOOK_LOCK_TIMEOUT", "0.05")
    settings._settings = None
    with open(maps / files.SAVING_LOCK.format(0), "rb") as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        started = time.process_time()
        stream(runner)
        for _ in range(100):
            stream(runner)
        assert time.process_time() - started < 5
        assert wait_for(maps, "ready")["lock"] == "timeout"


def test_a_relocation_waits_for_no_reader_at_all(
    runner: FakeRunner, maps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    from sglang_weight_hook.publisher import publish

    try_lock = publish.try_lock

    def remember(descriptor: int, timeout: float) -> bool:
        waited.append(timeout)
        return try_lock(descriptor, timeout)

    monkeypatch.setattr(publish, "try_lock", remember)
    with open(maps / files.SAVING_LOCK.format(0), "rb") as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        event("expert_location_update", "relocate", [runner])
    assert waited == [0.0]


def test_a_tensor_that_a_lone_bucket_brings_is_in_the_map_within_the_first_check(
    maps: Path, quiet: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_WEIGHT_HOOK_CHECK_SECONDS", "10")
    quiet(50)
    runner = FakeRunner(a_model())
    load(runner)
    settle()

    def bring() -> None:
        runner.model[0].w_kc = torch.ones(2, 3)

    stream(runner, during=bring)
    deadline = time.monotonic() + 5
    while "0.w_kc" not in json.loads((maps / files.LAYOUT.format(0)).read_bytes())["tensors"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    wait_for(maps, "ready")


def test_without_quiet_time_every_bucket_is_an_event(
    maps: Path, quiet: Callable[[float], None]
) -> None:
    quiet(0)
    runner = FakeRunner(a_model())
    load(runner)
    settle()
    for number in range(3):
        stream(runner)
        assert state_of(maps)["state"] == "ready"
        assert state_of(maps)["content_generation"] == 2 + number
    assert not background.is_running()


def test_where_the_thread_is_gone_every_bucket_ends_its_own_stream(
    runner: FakeRunner, maps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream(runner)
    wait_for(maps, "ready")
    background.stop()
    monkeypatch.setattr(background, "ensure", lambda *_: False)
    stream(runner)
    assert state_of(maps)["state"] == "ready"


def test_a_thread_that_dies_ends_the_open_stream(
    runner: FakeRunner, maps: Path, quiet: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet(60_000)
    stream(runner)

    def die(*_: Any) -> None:
        raise MemoryError

    thread = background._thread
    assert thread is not None
    monkeypatch.setattr(type(thread), "_work", die)
    background.wake()
    thread.join(10)
    assert not thread.is_alive()
    assert state_of(maps)["state"] == "ready"


def test_no_thread_can_be_started_and_sglang_goes_on(
    maps: Path, quiet: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    monkeypatch.setattr(background, "_failed", False)
    quiet(50)
    runner = FakeRunner(a_model())
    load(runner)
    settle()
    stream(runner)
    assert state_of(maps)["state"] == "ready"
    monkeypatch.setattr(background, "_failed", False)


def test_a_child_forked_inside_a_stream_leaves_it_to_its_parent(
    quiet: Callable[[float], None], maps: Path
) -> None:
    quiet(1500)  # a fork takes long on a busy machine
    runner = FakeRunner(a_model())
    load(runner)
    settle()
    stream(runner)
    child = os.fork()
    if child == 0:
        # It has no thread, no runner and no lock; its parent's stream is none of its business.
        os._exit(0 if not background.is_running() and not recorder._tracked else 1)
    stream(runner)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert wait_for(maps, "ready")["event"]["calls"] == 2
    wait_for_lock(maps)


def test_a_child_that_outlives_its_parents_stream_does_not_hold_the_lock(
    runner: FakeRunner, maps: Path
) -> None:
    stream(runner)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    os.close(reading)
    try:
        wait_for(maps, "ready")
        wait_for_lock(maps)
    finally:
        os.close(writing)
        os.waitpid(child, 0)


STREAMER = """
import sys
from fake_sglang import FakeRunner, load, settle, stream
from published_files import a_model
runner = FakeRunner(a_model())
load(runner)
settle()
stream(runner)
print("streaming", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def streaming(
    start_python: Callable[..., subprocess.Popen[str]], maps: Path
) -> subprocess.Popen[str]:
    """A process in the middle of a stream that no quiet time ends."""
    process = start_python(STREAMER, SGLANG_WEIGHT_HOOK_QUIET_MS="60000")
    assert process.stdout is not None
    assert process.stdout.readline() == "streaming\n"
    assert state_of(maps)["state"] == "updating"
    return process


def test_a_process_killed_inside_a_stream_frees_the_lock_and_the_slot(
    streaming: subprocess.Popen[str], maps: Path
) -> None:
    streaming.send_signal(signal.SIGKILL)
    streaming.wait()
    assert state_of(maps)["state"] == "updating"
    assert lock_is_free(maps)
    successor = FakeRunner(a_model())
    load(successor)
    settle()
    assert generations(maps) == (1, 1)


def test_a_process_that_shuts_down_inside_a_stream_ends_it(
    streaming: subprocess.Popen[str], maps: Path
) -> None:
    _, errors = streaming.communicate("\n")
    assert streaming.returncode == 0
    assert not errors
    state = state_of(maps)
    assert (state["state"], state["event"]["calls"]) == ("ready", 1)
    assert not list(maps.glob("*.sock"))
