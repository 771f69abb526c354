"""The saving lock, and events from several threads.

The runners are fakes (`fake_sglang`), their models are real torch modules, the files are real.
``tests/real_sglang`` has the same events from a real SGLang.
"""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_sglang import FakeRunner, load, settle, stream, update
from published_files import a_model, generations, layout_of, lock_is_free, state_of

from sglang_weight_hook.layout import variables
from sglang_weight_hook.publisher import publish, recorder

TRY_LOCK = """
import fcntl, sys
try:
    fcntl.flock(open(sys.argv[1], "rb"), fcntl.LOCK_SH | fcntl.LOCK_NB)
except BlockingIOError:
    print("held")
else:
    print("free")
"""


def test_another_process_cannot_take_the_lock_during_the_call_and_can_afterwards(
    runner: FakeRunner, maps: Path, run_python: Callable[..., Any]
) -> None:
    lock = str(maps / "weight_saving_0.lock")
    answers: list[str] = []

    def ask() -> None:
        answers.append(run_python("-c", TRY_LOCK, lock).stdout.strip())

    update(runner, during=ask)
    ask()
    assert answers == ["held", "free"]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A lock timeout of a moment, and the timeouts that were really waited."""
    monkeypatch.setenv(variables.LOCK_TIMEOUT, "0.01")
    waited: list[float] = []
    try_lock = publish.try_lock

    def remember(descriptor: int, timeout: float) -> bool:
        waited.append(timeout)
        return try_lock(descriptor, timeout)

    monkeypatch.setattr(publish, "try_lock", remember)
    return waited


def test_a_lock_held_by_a_reader_is_waited_for_once_and_the_state_says_so(
    impatient: list[float], maps: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runner = FakeRunner(a_model())
    load(runner)
    settle()
    impatient.clear()
    states: list[str] = []
    with open(maps / "weight_saving_0.lock", "rb") as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        for _ in range(4):
            stream(runner, during=lambda: states.append(state_of(maps)["lock"]))
        assert state_of(maps)["lock"] == "timeout"
    assert impatient == [0.01, 0.0, 0.0, 0.0]
    assert states == ["timeout"] * 4
    assert sum("weight_saving_0.lock" in text for text in caplog.messages) == 1
    stream(runner)
    assert state_of(maps)["lock"] == "held"
    stream(runner)
    assert impatient[-1] == 0.01


def test_a_shared_lock_is_left_to_the_reader_who_has_it(impatient: list[float], maps: Path) -> None:
    runner = FakeRunner(a_model())
    load(runner)
    with open(maps / "weight_saving_0.lock", "rb") as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        update(runner)
        assert lock_is_free(maps)
        with open(maps / "weight_saving_0.lock", "rb") as writer, pytest.raises(BlockingIOError):
            fcntl.flock(writer, fcntl.LOCK_EX | fcntl.LOCK_NB)


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("cannot be shown")


class UnprintableError(Exception):
    __str__ = Unprintable.__str__


@pytest.mark.parametrize(
    "outcome", [{"result": (True, Unprintable())}, {"error": UnprintableError()}]
)
def test_a_message_that_cannot_be_shown_does_not_keep_the_lock(
    outcome: dict[str, Any], runner: FakeRunner, maps: Path
) -> None:
    begun = recorder.begin("update_weights_from_disk", "update", [runner])
    assert begun is not None
    try:
        recorder.finish(begun, outcome.get("result"), outcome.get("error"))
    except RuntimeError:
        pass  # the patch core's business
    assert lock_is_free(maps)
    assert state_of(maps)["state"] in ("ready", "failed")


def test_events_from_several_threads_end_with_a_free_lock_and_agreeing_files(
    runner: FakeRunner, maps: Path
) -> None:
    problems: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for _ in range(10):
                (stream if number % 2 else update)(runner)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    state = state_of(maps)
    assert state["state"] == "ready"
    assert 2 <= state["content_generation"] <= 61
    assert state["layout_generation"] == layout_of(maps)["layout_generation"] == 1
    assert lock_is_free(maps)
    assert not recorder._tracked[id(runner)].inside


def test_two_calls_that_overlap_in_two_threads_are_one_event(
    runner: FakeRunner, maps: Path
) -> None:
    first = recorder.begin("update_weights_from_disk", "update", [runner])
    second: list[Any] = []
    thread = threading.Thread(
        target=lambda: second.append(recorder.begin("bucket", "stream", [runner]))
    )
    thread.start()
    thread.join()
    assert first is not None
    recorder.finish(first, (True, "ok"), None)
    assert state_of(maps)["state"] == "updating"
    assert not lock_is_free(maps)
    recorder.finish(second[0], (True, "ok"), None)
    assert state_of(maps)["state"] == "ready"
    assert generations(maps) == (1, 2)
    assert lock_is_free(maps)
