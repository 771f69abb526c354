"""What the scheduler's own methods tell beyond those that write; adapters; the event log."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
from fake_sglang import FakeRunner, event, load, settle, update
from published_files import a_model, generations, state_of

from sglang_weight_hook.layout import files
from sglang_weight_hook.publisher import recorder

torch = pytest.importorskip("torch")


# --- adapters, answers ---------------------------------------------------------------------


def test_an_adapter_loaded_at_run_time_is_an_event_that_leaves_contents_alone(
    asked: FakeRunner, maps: Path
) -> None:
    before = generations(maps)
    event("load_lora_adapter", "adapt", [asked])
    state = state_of(maps)
    assert (state["state"], state["event"]["kind"]) == ("ready", "load_lora_adapter")
    assert generations(maps) == before


class Answer:
    def __init__(self, success: bool, message: str) -> None:
        self.success, self.message = success, message


def test_weights_written_and_a_refusal_answered_are_both_said(
    asked: FakeRunner, maps: Path
) -> None:
    request = recorder.begin_request({"is_last": True})
    update(asked)
    assert state_of(maps)["state"] == "updating"  # until SGLang has answered
    recorder.finish_request(request, Answer(False, "the cache was not flushed"), None)
    said = state_of(maps)["event"]
    assert (said["success"], said["answered"]) == (True, False)
    assert said["message"] == "the cache was not flushed"
    assert state_of(maps)["state"] == "ready"


def test_a_request_that_writes_nothing_is_no_event(asked: FakeRunner, maps: Path) -> None:
    before = state_of(maps)
    request = recorder.begin_request({})
    recorder.finish_request(request, Answer(False, "no session"), None)
    assert state_of(maps) == before


def test_a_session_that_opens_half_way_ends_with_its_request_as_failed(
    asked: FakeRunner, maps: Path
) -> None:
    draft = FakeRunner(a_model(), draft=True)
    load(draft)
    settle()
    request = recorder.begin_request({})
    event("weight_update_session", "open", [asked])
    event("weight_update_session", "open", [draft], error=RuntimeError("out of memory"))
    recorder.finish_request(request, None, RuntimeError("out of memory"))
    assert [state_of(maps, slot)["state"] for slot in ("0", "0_draft")] == ["failed", "failed"]
    update(asked)
    assert state_of(maps)["state"] == "ready"


def test_a_stale_session_ends_with_an_update_outside_of_any(asked: FakeRunner, maps: Path) -> None:
    event("weight_update_session", "open", [asked])  # whose end is never told
    assert state_of(maps)["state"] == "updating"
    request = recorder.begin_request({"is_sessionless": True})
    update(asked)
    recorder.finish_request(request, Answer(True, "ok"), None)
    assert state_of(maps)["state"] == "ready"


def test_the_event_log_is_rotated_once_and_outlives_its_owner(
    asked: FakeRunner, maps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang_weight_hook.publisher import event_log

    monkeypatch.setattr(event_log, "LIMIT", 4000)
    for _ in range(30):
        update(asked)
    current = (maps / files.EVENTS.format(0)).read_text().splitlines()
    before = (maps / files.EVENTS_BEFORE.format(0)).read_text().splitlines()
    assert sum(len(line) for line in current) < 5000
    assert current
    both = [json.loads(line)["content_generation"] for line in (*before, *current)]
    assert both == list(range(both[0], both[0] + len(both)))
    successor = FakeRunner(a_model())
    recorder._after_fork_in_child()
    load(successor)
    assert len((maps / files.EVENTS.format(0)).read_text().splitlines()) == len(current) + 1


def test_a_planted_event_log_is_not_written_through(
    asked: FakeRunner, maps: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    precious = tmp_path / "precious"
    precious.write_text("mine")
    path = maps / files.EVENTS.format(0)
    for plant in (lambda: path.symlink_to(precious), lambda: os.mkfifo(path)):
        path.unlink()
        plant()
        update(asked)
        assert state_of(maps)["state"] == "ready"
        assert precious.read_text() == "mine"
    assert sum("event log" in text for text in caplog.messages) == 1
