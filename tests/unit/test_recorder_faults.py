"""Sequences of events that were published wrongly once, each as short as it can be.

Found by `state_machine`, or by reading for it.  The runners are fakes (`fake_sglang`), their models
are real torch modules, the files, locks and forked children are real.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
from fake_sglang import FakeRunner, event, load, settle, update
from published_files import (
    a_model,
    generations,
    lock_is_free,
    state_of,
)

from sglang_weight_hook.publisher import recorder

torch = pytest.importorskip("torch")

PHYSICAL = {"tags": ["weights"], "physical": True}


# --- failed, and how it is left --------------------------------------------------------------


def test_a_release_that_failed_is_mended_by_a_write_alone(runner: FakeRunner, maps: Path) -> None:
    event("release", "release", details=PHYSICAL, error=RuntimeError("half way"))
    assert state_of(maps)["state"] == "failed"
    settle()
    assert state_of(maps)["state"] == "failed"
    event("resume", "resume", details=PHYSICAL)
    assert state_of(maps)["state"] == "failed"
    update(runner)
    assert state_of(maps)["state"] == "ready"


@pytest.mark.parametrize(
    ("effect", "details"),
    [
        ("adapt", {}),
        ("release", {"tags": ["weights"], "physical": False}),
        ("release", {"tags": ["kv_cache"], "physical": True}),
        ("resume", {"tags": ["kv_cache"], "physical": True}),
    ],
)
def test_a_failure_of_what_does_not_touch_the_weights_leaves_them_ready(
    effect: str, details: dict[str, Any], runner: FakeRunner, maps: Path
) -> None:
    event("call", effect, [], details=details, error=RuntimeError("no such adapter"))
    state = state_of(maps)
    assert (state["state"], state["event"]["success"]) == ("ready", False)


# --- contents ----------------------------------------------------------------------------------


def test_a_model_loaded_again_has_other_contents(runner: FakeRunner, maps: Path) -> None:
    load(runner)
    assert generations(maps) == (1, 2)


def test_a_session_that_opened_half_way_may_have_changed_contents(
    runner: FakeRunner, maps: Path
) -> None:
    event("weight_update_session", "open", [runner], error=RuntimeError("unpacked some"))
    assert state_of(maps)["state"] == "failed"
    assert generations(maps) == (1, 2)


# --- calls and requests whose end is never told ----------------------------------------------


def test_a_request_whose_end_is_never_told_keeps_no_event_open(
    runner: FakeRunner, maps: Path
) -> None:
    lost = recorder.begin_request({})
    update(runner)
    del lost
    inner = recorder.begin_request({})
    update(runner)
    recorder.finish_request(inner, None, None)
    assert state_of(maps)["state"] == "ready"
    assert lock_is_free(maps)


def test_a_session_of_a_runner_that_is_gone_keeps_no_other_runner_updating(maps: Path) -> None:
    runners = [FakeRunner(a_model()), FakeRunner(a_model(), draft=True)]
    for runner in runners:
        load(runner)
    runners[1].model[0].weight = runners[0].model[0].weight
    settle()
    event("weight_update_session", "open", [runners[0]])
    assert state_of(maps, "0_draft")["state"] == "updating"
    del runner
    runners.pop(0)
    gc.collect()
    update(runners[0])
    assert state_of(maps, "0_draft")["state"] == "ready"
    assert lock_is_free(maps, "0_draft")


# --- forked children --------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("in_request", [False, True])
def test_a_child_that_returns_through_its_parents_call_publishes_nothing(
    in_request: bool, runner: FakeRunner, maps: Path
) -> None:
    request = recorder.begin_request({}) if in_request else None
    begun = recorder.begin("update_weights_from_disk", "update", [runner])
    before = {path.name: path.read_bytes() for path in maps.iterdir()}
    child = os.fork()
    if child == 0:
        try:
            recorder.finish(begun, None, SystemExit())
            if request is not None:
                recorder.finish_request(request, None, SystemExit())
            os._exit(0)
        except BaseException:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert {path.name: path.read_bytes() for path in maps.iterdir()} == before
    assert not lock_is_free(maps)
