"""Sequences of events that were published wrongly once, each as short as it can be.

Found by `state_machine`, or by reading for it.  The runners are fakes (`fake_sglang`), their models
are real torch modules, the files, locks and forked children are real.
"""

from __future__ import annotations

import fcntl
import gc
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from fake_sglang import FakeRunner, event, load, settle, stream, update
from published_files import (
    a_model,
    generations,
    header_of,
    layout_of,
    lock_is_free,
    state_of,
)

from sglang_weight_hook.layout import files, header
from sglang_weight_hook.publisher import background, recorder, settings

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


def test_a_write_that_failed_in_an_event_whose_end_is_never_told_is_not_forgotten(
    runner: FakeRunner, maps: Path
) -> None:
    lost = recorder.begin_request({})
    event("update_weights_from_disk", "update", [runner], error=RuntimeError("half way"))
    del lost
    settle()
    assert state_of(maps)["state"] == "failed"


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


def test_a_call_that_outlives_its_runner_takes_no_slot_again(maps: Path) -> None:
    runners = [FakeRunner(a_model())]
    load(runners[0])
    begun = recorder.begin("release_memory_occupation", "release")
    runners.clear()
    gc.collect()
    recorder.finish(begun, None, None)
    runners.append(FakeRunner(a_model()))
    load(runners[0])
    assert state_of(maps)["slot"] == "0"


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


# --- a directory that is removed, and a slot that is another's then ----------------------------


class AnotherProcess:
    """The owner of slot 0 in a directory that was removed and made again."""

    def __init__(self, maps: Path) -> None:
        shutil.rmtree(maps)
        maps.mkdir()
        self.maps = maps
        self.owner = (maps / files.OWNER_LOCK.format(0)).open("wb")
        fcntl.flock(self.owner, fcntl.LOCK_EX)
        for name in (*files.DOCUMENTS, files.HEADER):
            (maps / name.format(0)).write_bytes(b'{"another": "process"}')

    def files(self) -> dict[str, bytes]:
        names = (name.format(0) for name in (*files.DOCUMENTS, files.HEADER))
        return {name: (self.maps / name).read_bytes() for name in names}


@pytest.mark.parametrize("what", ["update", "session", "stream"])
def test_an_event_under_way_ends_in_no_slot_that_is_another_process_by_then(
    what: str, runner: FakeRunner, maps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if what == "stream":
        monkeypatch.setenv("SGLANG_WEIGHT_HOOK_QUIET_MS", "60000")
        settings._settings = None
        monkeypatch.setattr(background, "ensure", lambda *_: True)
        stream(runner)
    elif what == "session":
        event("weight_update_session", "open", [runner])
    else:
        begun = recorder.begin("update_weights_from_disk", "update", [runner])
    other = AnotherProcess(maps)
    before = other.files()
    if what == "stream":
        recorder._RECORDER.end_streams(0.0, everything=True)
    elif what == "session":
        event("weight_update_session", "close", [runner])
    else:
        recorder.finish(begun, (True, "ok"), None)
    assert other.files() == before
    (own,) = (path.name for path in maps.glob("weight_state_0.*-*.json"))
    slot = own[13:-5]
    assert state_of(maps, slot)["state"] == header_of(maps, slot).state == "ready"
    assert state_of(maps, slot)["slot"] == slot
    ptr = runner.model[0].weight.data_ptr()
    assert layout_of(maps, slot)["tensors"]["0.weight"]["ptr"] == ptr
    other.owner.close()


def test_what_a_dead_owner_left_is_not_taken_for_ones_own(runner: FakeRunner, maps: Path) -> None:
    other = AnotherProcess(maps)
    other.owner.close()
    stream(runner)
    assert state_of(maps)["state"] == header_of(maps).state == "ready"
    ptr = runner.model[0].weight.data_ptr()
    assert layout_of(maps)["tensors"]["0.weight"]["ptr"] == ptr
    for name in files.DOCUMENTS:
        path = maps / name.format(0)
        assert not path.exists() or b"another" not in path.read_bytes()


def test_a_header_that_another_put_in_place_of_ours_is_replaced(
    runner: FakeRunner, maps: Path
) -> None:
    path = maps / files.HEADER.format(0)
    with path.open("rb") as kept:  # as a reader that polls it
        path.unlink()
        path.write_bytes(b"\0" * 128)
        update(runner)
        assert header_of(maps).content_generation == 2
        polled = header.unpack(kept.read())
    assert polled is not None
    assert polled.state == header.LEFT


def test_a_slot_that_cannot_be_claimed_again_is_not_written(runner: FakeRunner, maps: Path) -> None:
    other = AnotherProcess(maps)
    before = other.files()
    other.owner.close()
    owner = maps / files.OWNER_LOCK.format(0)
    owner.unlink()
    owner.mkdir()  # as little to be opened as another user's file
    update(runner)
    assert other.files() == before
    assert not (maps / files.EVENTS.format(0)).exists()
    owner.rmdir()
    update(runner)
    assert state_of(maps)["state"] == header_of(maps).state == "ready"
