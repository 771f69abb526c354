"""Events in, states and generations out.

The runners are fakes (`fake_sglang`), their models are real torch modules, the files are real.
``tests/real_sglang`` has the same events from a real SGLang.
"""

from __future__ import annotations

import doctest
import fcntl
import gc
import json
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_sglang import FakeRunner, event, load, settle, stream, update

from sglang_weight_hook.layout import files, variables
from sglang_weight_hook.publisher import document, publish, recorder, settings
from sglang_weight_hook.reader import open_slot

torch = pytest.importorskip("torch")


def a_model() -> Any:
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))


def read(maps: Path, name: str, slot: str = "0") -> Any:
    return json.loads((maps / name.format(slot)).read_bytes())


def state_of(maps: Path, slot: str = "0") -> Any:
    return read(maps, files.STATE, slot)


def layout_of(maps: Path, slot: str = "0") -> Any:
    return read(maps, files.LAYOUT, slot)


def generations(maps: Path, slot: str = "0") -> tuple[int, int]:
    state = state_of(maps, slot)
    return state["layout_generation"], state["content_generation"]


def lock_is_free(maps: Path, slot: str = "0") -> bool:
    """Whether a reader could take the shared lock now."""
    with open(maps / files.SAVING_LOCK.format(slot), "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


@pytest.fixture
def runner() -> FakeRunner:
    """A runner that is loaded and settled."""
    runner = FakeRunner(a_model())
    load(runner)
    settle()
    return runner


# --- states -------------------------------------------------------------------------------


def test_a_loaded_runner_is_loading_until_its_scheduler_is_built(maps: Path) -> None:
    runner = FakeRunner()
    during: list[str] = []

    def load_it() -> None:
        during.append(state_of(maps)["state"])
        runner.model = a_model()

    event("load_model", "load", [runner], during=load_it)
    assert during == ["loading"]
    assert state_of(maps)["state"] == layout_of(maps)["state"] == "loading"
    assert len(layout_of(maps)["tensors"]) == 4
    settle()
    assert state_of(maps)["state"] == layout_of(maps)["state"] == "ready"


def test_the_state_is_updating_during_an_update_and_ready_after_it(
    runner: FakeRunner, maps: Path
) -> None:
    during: list[Any] = []
    update(runner, during=lambda: during.append(state_of(maps)))
    (inside,) = during
    assert inside["state"] == "updating"
    assert inside["event"]["kind"] == "update_weights_from_disk"
    assert inside["event"]["success"] is None
    after = state_of(maps)
    assert after["state"] == "ready"
    assert after["event"]["success"] is True
    assert after["event"]["message"] == "ok"
    assert inside["event"]["started_at"] == after["event"]["started_at"]
    assert after["event"]["started_at"] <= after["event"]["finished_at"] <= after["updated_at"]


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        ({"result": (False, "no such directory")}, "no such directory"),
        ({"error": RuntimeError("out of memory")}, "RuntimeError: out of memory"),
    ],
)
def test_a_failed_update_is_published_with_the_addresses_that_hold_now(
    outcome: dict[str, Any], message: str, runner: FakeRunner, maps: Path
) -> None:
    def half_way() -> None:
        runner.model[0].weight.data = torch.zeros(3, 4)

    event("update_weights_from_disk", "update", [runner], during=half_way, **outcome)
    state = state_of(maps)
    assert (state["state"], state["event"]["success"]) == ("failed", False)
    assert state["event"]["message"] == message
    assert state["event"]["moved"] == 1
    assert generations(maps) == (2, 2)
    tensors = layout_of(maps)["tensors"]
    assert tensors["0.weight"]["ptr"] == runner.model[0].weight.data_ptr()
    update(runner)
    assert state_of(maps)["state"] == "ready"


def test_the_end_of_a_deferred_load_changes_contents_and_keeps_loading(maps: Path) -> None:
    runner = FakeRunner(a_model())
    load(runner)
    assert generations(maps) == (1, 1)
    event("finalize_startup_weight_load", "commit", [runner])
    assert state_of(maps)["state"] == "loading"
    assert generations(maps) == (1, 2)
    assert "updated" not in read(maps, files.WEIGHTS_META)["0.weight"]
    settle()
    assert state_of(maps)["state"] == "ready"
    assert generations(maps) == (1, 2)


def test_an_update_in_a_program_without_a_scheduler_makes_its_runner_ready(maps: Path) -> None:
    runner = FakeRunner(a_model())
    load(runner)
    update(runner)
    assert state_of(maps)["state"] == "ready"


def test_a_scheduler_that_fails_to_start_leaves_its_runner_loading(maps: Path) -> None:
    runner = FakeRunner(a_model())
    load(runner)
    event("scheduler_ready", "settle", error=RuntimeError("no port"))
    assert state_of(maps)["state"] == "loading"


def test_a_load_that_fails_publishes_failed_and_no_address(maps: Path) -> None:
    runner = FakeRunner()
    event("load_model", "load", [runner], error=OSError("no such model"))
    state, layout = state_of(maps), layout_of(maps)
    assert (state["state"], layout["state"]) == ("failed", "failed")
    assert "no such model" in state["event"]["message"]
    assert layout["tensors"] == {}
    assert layout["regions"] == []
    assert read(maps, files.WEIGHTS_META) == {}


def test_memory_physically_released_is_released_until_it_is_resumed(
    runner: FakeRunner, maps: Path
) -> None:
    details = {"tags": [], "physical": True}
    event("release_memory_occupation", "release", details=details)
    assert state_of(maps)["state"] == layout_of(maps)["state"] == "released"
    assert generations(maps) == (1, 1)
    event("resume_memory_occupation", "resume", details=details)
    assert state_of(maps)["state"] == "ready"
    assert generations(maps) == (1, 2)


@pytest.mark.parametrize(
    ("tags", "physical", "state"),
    [
        (["weights"], True, "released"),
        (["kv_cache", "weights"], True, "released"),
        (["kv_cache"], True, "ready"),
        ([], False, "ready"),
    ],
)
def test_only_a_physical_release_of_the_weights_is_a_release(
    tags: list[str], physical: bool, state: str, runner: FakeRunner, maps: Path
) -> None:
    event("release_memory_occupation", "release", details={"tags": tags, "physical": physical})
    assert state_of(maps)["state"] == state


def test_a_release_that_failed_is_no_release(runner: FakeRunner, maps: Path) -> None:
    details = {"tags": [], "physical": True}
    event("release_memory_occupation", "release", details=details, error=RuntimeError("busy"))
    assert state_of(maps)["state"] == "failed"
    update(runner)
    assert state_of(maps)["state"] == "ready"


def test_an_update_of_released_memory_leaves_it_released(runner: FakeRunner, maps: Path) -> None:
    details = {"tags": ["weights"], "physical": True}
    event("release_memory_occupation", "release", details=details)
    update(runner)
    assert state_of(maps)["state"] == "released"


def test_an_unknown_effect_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown effect 'repaint'"):
        recorder.begin("x", "repaint")


def test_outcome_agrees_with_its_examples() -> None:
    found = [test for test in doctest.DocTestFinder().find(recorder, "recorder") if test.examples]
    assert found
    for test in found:
        assert doctest.DocTestRunner().run(test).failed == 0


# --- generations --------------------------------------------------------------------------


def test_settling_without_a_change_keeps_both_generations(maps: Path) -> None:
    runner = FakeRunner(a_model())
    load(runner)
    assert generations(maps) == (1, 1)
    settle()
    assert generations(maps) == (1, 1)


def test_an_update_in_place_raises_only_the_content_generation(
    runner: FakeRunner, maps: Path
) -> None:
    update(runner, during=lambda: runner.model[0].weight.data.fill_(1.0))
    assert generations(maps) == (1, 2)
    assert layout_of(maps)["event"]["moved"] == 0


def test_a_draft_that_rebinds_the_targets_embedding_is_captured_when_settled(maps: Path) -> None:
    target, draft = FakeRunner(a_model()), FakeRunner(a_model(), draft=True)
    load(target)
    load(draft)
    draft.model[0].weight = target.model[0].weight
    settle()
    assert generations(maps, "0_draft") == (2, 1)
    assert (
        layout_of(maps, "0_draft")["tensors"]["0.weight"]["ptr"]
        == layout_of(maps)["tensors"]["0.weight"]["ptr"]
    )


def test_moved_added_and_removed_are_counted(runner: FakeRunner, maps: Path) -> None:
    def change() -> None:
        runner.model[0].weight.data = torch.zeros(3, 4)
        runner.model[0].bias = None
        runner.model[1].register_buffer("scale", torch.ones(2))

    update(runner, during=change)
    counted = layout_of(maps)["event"]
    assert (counted["moved"], counted["added"], counted["removed"]) == (1, 1, 1)
    assert state_of(maps)["event"] == counted
    assert generations(maps) == (2, 2)


def test_state_and_layout_always_agree_on_the_layout_generation(
    runner: FakeRunner, maps: Path
) -> None:
    for round_ in range(5):
        if round_ % 2:
            runner.model[0].weight.data = torch.zeros(3, 4)
        update(runner)
        assert layout_of(maps)["layout_generation"] == state_of(maps)["layout_generation"]
        assert layout_of(maps)["content_generation"] == state_of(maps)["content_generation"]


# --- nesting, sessions, streams -----------------------------------------------------------


def test_a_nested_update_is_one_event_named_after_the_outer_one(
    runner: FakeRunner, maps: Path
) -> None:
    event(
        "expert_location_update",
        "update",
        during=lambda: update(runner, during=lambda: update(runner)),
    )
    assert generations(maps) == (1, 2)
    assert state_of(maps)["event"]["kind"] == "expert_location_update"
    assert state_of(maps)["event"]["calls"] == 3


def test_a_nested_call_does_not_end_the_event(runner: FakeRunner, maps: Path) -> None:
    seen: list[tuple[str, bool]] = []

    def inside() -> None:
        update(runner)
        seen.append((state_of(maps)["state"], lock_is_free(maps)))

    update(runner, during=inside)
    assert seen == [("updating", False)]
    assert lock_is_free(maps)


def test_a_failure_inside_a_nested_call_is_the_failure_of_the_event(
    runner: FakeRunner, maps: Path
) -> None:
    event(
        "expert_location_update",
        "update",
        [runner],
        during=lambda: event(
            "update_weights_from_disk", "update", [runner], result=(False, "rolled back")
        ),
    )
    state = state_of(maps)
    assert (state["state"], state["event"]["message"]) == ("failed", "rolled back")


def test_a_session_is_one_event(runner: FakeRunner, maps: Path) -> None:
    event("weight_update_session", "open", [runner])
    assert state_of(maps)["state"] == "updating"
    assert not lock_is_free(maps)
    for _ in range(3):
        stream(runner, during=lambda: runner.model[0].weight.data.fill_(2.0))
        assert state_of(maps)["state"] == "updating"
        assert not lock_is_free(maps)
    runner.model[0].weight.data = torch.zeros(3, 4)
    event("weight_update_session", "close", [runner])
    state = state_of(maps)
    assert (state["state"], state["event"]["kind"]) == ("ready", "weight_update_session")
    assert state["event"]["calls"] == 5
    assert state["event"]["moved"] == 1
    assert generations(maps) == (2, 2)
    assert lock_is_free(maps)


def a_session(runner: FakeRunner, during: Callable[[], object] = lambda: None) -> None:
    event("weight_update_session", "open", [runner])
    stream(runner, during=during)
    event("weight_update_session", "close", [runner])


def layout_file(maps: Path) -> int:
    return os.stat(maps / "weight_layout_0.json").st_ino


def test_a_session_after_which_all_is_where_it_was_rewrites_only_the_state(
    runner: FakeRunner, maps: Path
) -> None:
    a_session(runner)  # the first one marks the weights as updated
    assert read(maps, files.WEIGHTS_META)["0.weight"]["updated"]
    before, content = layout_file(maps), state_of(maps)["content_generation"]
    a_session(runner, lambda: runner.model[0].weight.data.fill_(2.0))
    assert layout_file(maps) == before
    assert state_of(maps)["content_generation"] == content + 1
    assert state_of(maps)["state"] == "ready"


def test_a_session_renews_the_time_of_the_last_update(runner: FakeRunner, maps: Path) -> None:
    a_session(runner)
    first = read(maps, files.SUMMARY)
    a_session(runner)
    second = read(maps, files.SUMMARY)
    assert second["update_timestamp"] > first["update_timestamp"]
    assert second.keys() == first.keys()
    assert second["total_weights"] == first["total_weights"]


def test_what_a_call_may_have_written_whose_end_was_never_told_counts_as_changed(
    runner: FakeRunner, maps: Path
) -> None:
    _, content = generations(maps)
    lost = recorder.begin("update_weights_from_disk", "update", [runner])
    runner.model[0].weight.data.fill_(3.0)
    del lost
    event("release_memory_occupation", "release", [runner])
    assert state_of(maps)["state"] == "ready"
    assert generations(maps)[1] == content + 1
    assert read(maps, files.WEIGHTS_META)["0.weight"]["updated"]
    assert lock_is_free(maps)


def test_after_such_a_call_a_bucket_does_not_trust_the_last_capture(
    runner: FakeRunner, maps: Path
) -> None:
    lost = recorder.begin("update_weights_from_disk", "update", [runner])
    del lost
    before = layout_file(maps)
    stream(runner)
    assert layout_file(maps) != before
    before = layout_file(maps)
    stream(runner)
    assert layout_file(maps) == before


def test_a_session_that_leaves_a_tensor_where_none_was_publishes_it(
    runner: FakeRunner, maps: Path
) -> None:
    a_session(runner)

    def keep_scales() -> None:
        runner.model[0].scales = torch.ones(3)

    a_session(runner, keep_scales)
    assert "0.scales" in layout_of(maps)["tensors"]
    assert state_of(maps)["event"]["added"] == 1


def test_a_session_renews_the_checksums_where_they_are_asked_for(
    runner: FakeRunner, maps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variables.CHECKSUM, "1")
    settings._settings = None
    for _ in range(2):
        a_session(runner, lambda: runner.model[0].weight.data.add_(1.0))
        layout = layout_of(maps)
        assert layout["checksums"]["content_generation"] == layout["content_generation"]


def test_two_sessions_in_a_row_are_two_events(runner: FakeRunner, maps: Path) -> None:
    for _ in range(2):
        event("weight_update_session", "open", [runner])
        event("weight_update_session", "close", [runner])
    assert generations(maps) == (1, 3)
    assert lock_is_free(maps)


def test_a_session_opened_twice_ends_with_one_close(runner: FakeRunner, maps: Path) -> None:
    event("weight_update_session", "open", [runner])
    event("weight_update_session", "open", [runner])
    event("weight_update_session", "close", [runner])
    assert state_of(maps)["state"] == "ready"
    assert lock_is_free(maps)


@pytest.mark.parametrize("effect", ["open", "close"])
def test_an_end_of_a_session_that_fails_ends_it(
    effect: str, runner: FakeRunner, maps: Path
) -> None:
    if effect == "close":
        event("weight_update_session", "open", [runner])
    event("weight_update_session", effect, [runner], error=RuntimeError("repacking failed"))
    assert state_of(maps)["state"] == "failed"
    assert lock_is_free(maps)
    update(runner)
    assert state_of(maps)["state"] == "ready"


def test_a_close_without_an_open_is_an_update(runner: FakeRunner, maps: Path) -> None:
    event("weight_update_session", "close", [runner])
    assert state_of(maps)["state"] == "ready"
    assert generations(maps) == (1, 2)


def test_a_shared_draft_is_done_when_the_sessions_of_both_runners_are(maps: Path) -> None:
    target, draft = FakeRunner(a_model()), FakeRunner(a_model(), draft=True)
    load(target)
    load(draft)
    draft.model[0].weight = target.model[0].weight
    settle()
    seen = []
    for effect in ("open", "close"):
        for runner in (target, draft):
            event("weight_update_session", effect, [runner])
            seen.append(state_of(maps, "0_draft")["state"])
    assert seen == ["updating", "updating", "updating", "ready"]
    assert lock_is_free(maps)
    assert lock_is_free(maps, "0_draft")


def test_an_update_while_the_scheduler_is_built_does_not_make_its_runner_ready(
    maps: Path,
) -> None:
    runner = FakeRunner(a_model())

    def build() -> None:
        load(runner)
        update(runner)
        assert state_of(maps)["state"] == "loading"

    event("scheduler_ready", "settle", during=build)
    assert state_of(maps)["state"] == "ready"


def test_what_a_failed_update_left_is_failed_until_an_update_mends_it(
    runner: FakeRunner, maps: Path
) -> None:
    event("update_weights_from_disk", "update", [runner], result=(False, "half written"))
    details = {"tags": ["kv_cache"], "physical": True}
    event("release_memory_occupation", "release", details=details)
    event("resume_memory_occupation", "resume", details=details)
    assert state_of(maps)["state"] == "failed"
    stream(runner)
    assert state_of(maps)["state"] == "ready"


def inodes(maps: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in maps.iterdir()}


def test_a_bucket_written_in_place_replaces_only_the_state_file(
    runner: FakeRunner, maps: Path
) -> None:
    kept = {path.name: open(path, "rb") for path in maps.iterdir()}  # noqa: SIM115
    try:
        for _ in range(3):
            stream(runner, during=lambda: runner.model[0].weight.data.fill_(3.0))
        after = inodes(maps)
        changed = {n for n, file in kept.items() if after[n] != os.fstat(file.fileno()).st_ino}
    finally:
        for file in kept.values():
            file.close()
    assert changed == {"weight_state_0.json"}
    assert set(after) == set(kept)
    assert generations(maps) == (1, 4)
    assert open_slot(str(maps), "0").read().content_generation == 4


def test_a_bucket_that_moves_a_weight_publishes_everything(runner: FakeRunner, maps: Path) -> None:
    def move() -> None:
        runner.model[0].weight.data = torch.zeros(3, 4)

    stream(runner, during=move)
    assert generations(maps) == (2, 2)
    assert (
        layout_of(maps)["tensors"]["0.weight"]["ptr"]
        == read(maps, files.WEIGHTS_META)["0.weight"]["ptr"]
        == runner.model[0].weight.data_ptr()
    )


def test_parameters_are_marked_as_updated_only_after_an_update(
    runner: FakeRunner, maps: Path
) -> None:
    assert "updated" not in read(maps, files.WEIGHTS_META)["0.weight"]
    assert not (maps / "weight_update_summary_0.json").exists()
    update(runner)
    assert all(entry["updated"] is True for entry in read(maps, files.WEIGHTS_META).values())
    assert read(maps, files.SUMMARY)["total_weights"] == 4


# --- whose event it is --------------------------------------------------------------------


def test_slots_are_named_after_gpu_and_draft(maps: Path) -> None:
    runners = [
        FakeRunner(a_model(), gpu_id=3),
        FakeRunner(a_model(), gpu_id=3, draft=True),
        FakeRunner(a_model(), gpu_id=3, draft=True),
        FakeRunner(a_model(), gpu_id=4, draft=True, draft_index=0),
        FakeRunner(a_model(), gpu_id=4, draft=True, draft_index=2),
    ]
    for runner in runners:
        load(runner)
    slots = sorted(path.name[13:-5] for path in maps.glob("weight_state_*.json"))
    assert slots == ["3", "3_draft", "3_draft1", "4_draft", "4_draft2"]


def test_an_update_concerns_its_own_runner_alone(runner: FakeRunner, maps: Path) -> None:
    draft = FakeRunner(a_model(), draft=True)
    load(draft)
    before = inodes(maps)["weight_state_0_draft.json"]
    update(runner)
    assert inodes(maps)["weight_state_0_draft.json"] == before
    assert generations(maps, "0_draft") == (1, 1)


def test_a_draft_that_shares_a_weight_is_updated_and_locked_with_its_target(maps: Path) -> None:
    target, draft = FakeRunner(a_model()), FakeRunner(a_model(), draft=True)
    load(target)
    load(draft)
    draft.model[0].weight = target.model[0].weight
    settle()
    seen: list[Any] = []
    update(
        target,
        during=lambda: seen.append(
            (state_of(maps, "0_draft")["state"], lock_is_free(maps, "0_draft"))
        ),
    )
    assert seen == [("updating", False)]
    assert generations(maps, "0_draft") == (2, 2)
    assert state_of(maps, "0_draft")["state"] == "ready"


def test_an_event_of_the_whole_process_concerns_every_runner(
    runner: FakeRunner, maps: Path
) -> None:
    draft = FakeRunner(a_model(), draft=True)
    load(draft)
    settle()
    event("expert_location_update", "update")
    assert generations(maps) == generations(maps, "0_draft") == (1, 2)


def test_a_model_stands_for_its_runner(runner: FakeRunner, maps: Path) -> None:
    event("reset_tensors", "update", [runner.model])
    assert state_of(maps)["event"]["kind"] == "reset_tensors"
    assert generations(maps) == (1, 2)


def test_a_model_of_no_known_runner_is_nobodys_event(runner: FakeRunner, maps: Path) -> None:
    event("reset_tensors", "update", [a_model()])
    assert generations(maps) == (1, 1)
    assert len(list(maps.glob("weight_state_*.json"))) == 1


def test_a_second_target_in_one_process_gets_a_slot_of_its_own(
    runner: FakeRunner, maps: Path
) -> None:
    second = FakeRunner(a_model())
    load(second)
    (own,) = (path.name for path in maps.glob("weight_state_0.*-*.json"))
    assert own.endswith(f"-{os.getpid()}.json")
    first, other = layout_of(maps), layout_of(maps, own[13:-5])
    assert first["tensors"]["0.weight"]["ptr"] == runner.model[0].weight.data_ptr()
    assert other["tensors"]["0.weight"]["ptr"] == second.model[0].weight.data_ptr()


# --- the end of a runner ------------------------------------------------------------------


def test_a_runner_that_is_collected_takes_its_documents_with_it(maps: Path) -> None:
    runner = FakeRunner(a_model())
    load(runner)
    update(runner)
    assert (maps / "weight_update_summary_0.json").exists()
    del runner
    gc.collect()
    settle()  # the next event, of anybody's: the garbage collector itself does nothing
    assert sorted(path.name for path in maps.iterdir()) == [
        "weight_owner_0.lock",
        "weight_saving_0.lock",
    ]
    assert recorder._tracked == {}
    successor = FakeRunner(a_model())
    load(successor)
    assert generations(maps) == (1, 1)


def test_no_model_and_no_tensor_is_kept_alive(runner: FakeRunner) -> None:
    held = [weakref.ref(runner.model), weakref.ref(runner.model[0].weight)]
    update(runner)
    runner.model = None
    gc.collect()
    assert [reference() for reference in held] == [None, None]


def test_a_runner_collected_while_an_event_runs_publishes_nothing_any_more(maps: Path) -> None:
    runners = [FakeRunner(a_model())]
    load(runners[0])

    def drop() -> None:
        runners.clear()
        gc.collect()

    event("expert_location_update", "update", during=drop)
    settle()
    assert sorted(path.suffix for path in maps.iterdir()) == [".lock", ".lock"]


# --- the lock -----------------------------------------------------------------------------

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


# --- threads ------------------------------------------------------------------------------


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


# --- forked children ----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_publishes_nothing_in_its_parents_slot(
    runner: FakeRunner, maps: Path
) -> None:
    before = (maps / "weight_state_0.json").read_bytes()
    child = os.fork()
    if child == 0:
        try:
            update(runner)
            os._exit(0)
        except BaseException:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert (maps / "weight_state_0.json").read_bytes() == before
    assert open_slot(str(maps), "0").owner_alive()
    update(runner)
    assert generations(maps) == (1, 2)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_that_collects_an_inherited_runner_removes_nothing(maps: Path) -> None:
    runners = [FakeRunner(a_model())]
    load(runners[0])
    before = sorted(path.name for path in maps.iterdir())
    child = os.fork()
    if child == 0:
        try:
            runners.clear()
            gc.collect()
            settle()
            os._exit(0)
        except BaseException:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert sorted(path.name for path in maps.iterdir()) == before


def test_the_identity_is_that_of_this_process(runner: FakeRunner, maps: Path) -> None:
    identity = layout_of(maps)["identity"]
    assert identity["pid"] == state_of(maps)["pid"] == os.getpid()
    assert identity["model_class"] == "Sequential"
    assert identity["role"] == "target"
    assert layout_of(maps)["schema"] == document.SCHEMA
