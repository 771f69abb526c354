"""Which state each event leaves a slot in, and what it publishes when it fails.

The runners are fakes (`fake_sglang`), their models are real torch modules, the files are real.
``tests/real_sglang`` has the same events from a real SGLang.
"""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import pytest
from fake_sglang import FakeRunner, event, load, settle, stream, update
from published_files import a_model, generations, layout_of, read, state_of

from sglang_weight_hook.layout import files
from sglang_weight_hook.publisher import events, recorder

torch = pytest.importorskip("torch")


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


def test_a_runner_that_no_scheduler_builds_is_ready_with_its_last_step(maps: Path) -> None:
    runner = FakeRunner()
    event("runner_ready", "complete", [runner])
    assert not maps.exists()  # nothing of it was loaded, so there is nothing to say
    runner.model = a_model()
    load(runner)
    assert state_of(maps)["state"] == "loading"
    event("runner_ready", "complete", [runner], error=MemoryError("no room for a KV cache"))
    assert state_of(maps)["state"] == "loading"
    event("runner_ready", "complete", [runner])
    assert state_of(maps)["state"] == layout_of(maps)["state"] == "ready"
    assert state_of(maps)["event"]["kind"] == "runner_ready"
    before = generations(maps)
    event("runner_ready", "complete", [runner])
    assert (state_of(maps)["event"]["calls"], generations(maps)) == (1, before)


def test_the_last_step_of_a_runner_is_not_the_end_of_a_scheduler_that_is_being_built(
    maps: Path,
) -> None:
    runner = FakeRunner(a_model())

    def build() -> None:
        load(runner)
        event("runner_ready", "complete", [runner])
        assert state_of(maps)["state"] == "loading"
        assert state_of(maps)["event"]["kind"] == "load_model"

    event("scheduler_ready", "settle", during=build)
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
    found = [test for test in doctest.DocTestFinder().find(events, "events") if test.examples]
    assert found
    for test in found:
        assert doctest.DocTestRunner().run(test).failed == 0


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
