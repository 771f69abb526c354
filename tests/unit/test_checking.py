"""The map that checks itself: what moves without a call is published, and the header says when
map and memory were last found equal.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_sglang import FakeRunner, event, load, settle, stream, update
from published_files import a_model, eventually, generations, header_of, layout_of, log_of, state_of

from sglang_weight_hook.layout import files, header
from sglang_weight_hook.publisher import background, capture, recorder, settings

torch = pytest.importorskip("torch")


@pytest.fixture
def runner(checking: Callable[[float], None]) -> FakeRunner:
    checking(0.05)
    made = FakeRunner(a_model())
    load(made)
    settle()
    return made


def tracked_of(runner: FakeRunner) -> recorder.Tracked:
    return recorder._tracked[id(runner)]


# --- what moves without a call ------------------------------------------------------------


def test_a_buffer_rebound_in_a_forward_is_published_as_an_unannounced_change(
    runner: FakeRunner, maps: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # As SGLang's RotaryEmbedding does with its cos_sin_cache (layers/rotary_embedding).
    runner.model[0].register_buffer("cache", torch.zeros(8, dtype=torch.float32))
    update(runner)
    before = generations(maps)
    runner.model[0].cache = runner.model[0].cache.to(torch.bfloat16)
    state = eventually(lambda: (s := state_of(maps))["event"]["kind"] == "unannounced_change" and s)
    assert state["event"]["tensors"] == ["0.cache"]
    assert (state["event"]["moved"], state["event"]["calls"]) == (1, 0)
    assert state["state"] == "ready"
    assert generations(maps) == (before[0] + 1, before[1] + 1)
    tensor = layout_of(maps)["tensors"]["0.cache"]
    assert tensor["ptr"] == runner.model[0].cache.data_ptr()
    assert tensor["dtype"] == "torch.bfloat16"
    eventually(
        lambda: header_of(maps).layout_generation == before[0] + 1
    )  # written after the state
    for _ in range(3):
        runner.model[0].cache = runner.model[0].cache.clone()
        count = len(log_of(maps))
        eventually(lambda count=count: len(log_of(maps)) > count)
    told = [text for text in caplog.messages if "without a call" in text]
    assert len(told) == 1
    assert "0.cache" in told[0]


def test_up_to_five_tensors_are_named(runner: FakeRunner, maps: Path) -> None:
    for number in range(7):
        runner.model[0].register_buffer(f"b{number}", torch.zeros(2))
    update(runner)
    # In one go, as far as the thread is concerned: it looks between two bytecodes at the earliest.
    fresh = {f"b{number}": torch.zeros(2) for number in range(7)}
    runner.model[0]._buffers.update(fresh)
    eventually(lambda: sum(line["moved"] for line in log_of(maps) if "tensors" in line) >= 7)
    assert all(1 <= len(line["tensors"]) <= 5 for line in log_of(maps) if "tensors" in line)


def test_a_tensor_that_appears_and_one_that_goes_are_found(runner: FakeRunner, maps: Path) -> None:
    update(runner)
    runner.model[1].scale = torch.ones(2)
    eventually(lambda: "1.scale" in layout_of(maps)["tensors"])
    del runner.model[1].scale
    eventually(lambda: "1.scale" not in layout_of(maps)["tensors"])
    eventually(lambda: log_of(maps)[-1]["removed"] == 1)


def test_a_failed_state_stays_failed_after_an_unannounced_change(
    runner: FakeRunner, maps: Path
) -> None:
    event("update_weights_from_disk", "update", [runner], error=ValueError("no"))
    runner.model[0].weight.data = torch.zeros(3, 4)
    eventually(lambda: log_of(maps)[-1]["kind"] == "unannounced_change")
    assert state_of(maps)["state"] == "failed"


def test_a_model_that_the_quick_look_cannot_ask_is_checked_by_captures(
    runner: FakeRunner, maps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture, "places_of", lambda *_: None)
    looked = tracked_of(runner).looked_at
    eventually(lambda: tracked_of(runner).looked_at > looked + 0.2)
    assert [line["kind"] for line in log_of(maps)] == ["load_model", "scheduler_ready"]
    runner.model[0].weight.data = torch.zeros(3, 4)
    eventually(lambda: log_of(maps)[-1]["kind"] == "unannounced_change")


def test_a_model_that_cannot_be_looked_at_is_not_reported_equal(
    runner: FakeRunner, maps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("dictionary changed size during iteration")

    monkeypatch.setattr(capture, "places_of", fail)
    # A check that had begun before may still end.
    time.sleep(0.3)
    checked = header_of(maps).checked_at
    time.sleep(0.3)
    assert header_of(maps).checked_at == checked
    assert [line["kind"] for line in log_of(maps)] == ["load_model", "scheduler_ready"]
    assert background.is_running()


def test_a_capture_that_fails_while_it_confirms_a_move_is_tried_again(
    runner: FakeRunner, maps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: list[None] = []
    find = recorder.Tracked.find_unannounced

    def fail_once(self: recorder.Tracked) -> bool:
        if not failures:
            failures.append(None)
            raise RuntimeError("dictionary changed size during iteration")
        return find(self)

    monkeypatch.setattr(recorder.Tracked, "find_unannounced", fail_once)
    runner.model[0].weight.data = torch.zeros(3, 4)
    eventually(lambda: log_of(maps)[-1]["kind"] == "unannounced_change")
    assert failures
    assert background.is_running()


def test_offloaded_weights_that_are_on_the_device_during_a_forward_have_not_moved(
    checking: Callable[[float], None], maps: Path
) -> None:
    # The offloaders of SGLang's put a copy on the device in a parameter's place while a forward
    # runs (srt/utils/offloader.py, functional_call).  Without a GPU: the device is "meta".
    checking(0.05)
    runner = FakeRunner(a_model(), device="meta")
    load(runner)
    settle()
    assert layout_of(maps)["tensors"]["0.weight"]["volatile"] is True
    parameters = runner.model[0]._parameters
    offloaded = parameters["weight"]
    parameters["weight"] = torch.nn.Parameter(offloaded.data.clone())
    looked = tracked_of(runner).looked_at
    eventually(lambda: tracked_of(runner).looked_at > looked + 0.2)
    parameters["weight"] = offloaded
    assert [line["kind"] for line in log_of(maps)] == ["load_model", "scheduler_ready"]


# --- when map and memory were found equal -------------------------------------------------


def test_checked_at_advances_in_the_header_and_writes_no_document(
    runner: FakeRunner, maps: Path
) -> None:
    first = header_of(maps)
    inodes = {path.name: path.stat().st_ino for path in maps.glob("*.json")}
    assert first.checked_at is not None
    later = eventually(
        lambda: (h := header_of(maps)).checked_at and h.checked_at > first.checked_at + 0.2 and h
    )
    assert abs(time.time() - later.checked_at) < 60
    assert later._replace(checked_at=0, sequence=0) == first._replace(checked_at=0, sequence=0)
    assert {path.name: path.stat().st_ino for path in maps.glob("*.json")} == inodes


def test_nothing_is_checked_while_an_event_or_a_stream_is_under_way(
    checking: Callable[[float], None], maps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checking(0.02)
    monkeypatch.setenv("SGLANG_WEIGHT_HOOK_QUIET_MS", "60000")
    settings._settings = None
    runner = FakeRunner(a_model())
    load(runner)
    settle()

    def wait_and_move() -> None:
        runner.model[0].weight.data = torch.zeros(3, 4)
        checked = header_of(maps).checked_at
        time.sleep(0.2)
        assert header_of(maps).checked_at == checked

    update(runner, during=wait_and_move)
    stream(runner)
    wait_and_move()
    assert "unannounced_change" not in {line["kind"] for line in log_of(maps)}


def test_an_event_is_followed_by_checks_that_come_further_and_further_apart(
    checking: Callable[[float], None], maps: Path
) -> None:
    checking(10)
    runner = FakeRunner(a_model())
    load(runner)
    settle()
    tracked = tracked_of(runner)
    ended = tracked.event_ended_at
    due = []
    for step in range(7):
        tracked.check_step, tracked.looked_at = step, ended + 4.0
        due.append(round(background._due_at(tracked, 10.0) - ended, 3))
    assert due == [0.25, 0.5, 1.0, 2.0, 4.0, 14.0, 14.0]


def test_with_the_audit_off_nothing_runs(maps: Path) -> None:
    # The unit tests' own setting: no check, no quiet time.
    runner = FakeRunner(a_model())
    load(runner)
    settle()
    stream(runner)
    runner.model[0].weight.data = torch.zeros(3, 4)
    time.sleep(0.5)
    assert not background.is_running()
    assert not list(maps.glob("*.sock"))
    assert state_of(maps)["control"] is None
    assert state_of(maps)["event"]["kind"] == "update_weights_from_tensor"


def test_a_collected_runner_is_checked_no_more_and_its_header_says_so(
    checking: Callable[[float], None], maps: Path
) -> None:
    checking(0.02)
    runner = FakeRunner(a_model())
    load(runner)
    settle()
    with (maps / files.HEADER.format(0)).open("rb") as kept:  # as a reader that polls it
        del runner
        gc.collect()
        settle()
        found = header.unpack(kept.read())
        assert found is not None
        assert found.state == header.LEFT
    assert not (maps / files.HEADER.format(0)).exists()
    assert background.is_running()


def test_a_truncated_header_does_not_harm_the_server_and_heals(
    runner: FakeRunner, maps: Path
) -> None:
    path = maps / files.HEADER.format(0)
    os.truncate(path, 0)
    eventually(lambda: path.read_bytes().startswith(header.MAGIC))
    assert header_of(maps).state == "ready"
