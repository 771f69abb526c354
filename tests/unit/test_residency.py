"""Memory that is released and resumed: which states, epochs and generations come of it.

The scheduler, its request and the memory saver are fakes with the names and the order of
SGLang's own (`managers/scheduler_components/weight_updater.py`, 0.5.23), wrapped by the real
patch core; the recorder, the tensors and the files are real.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_sglang import FakeRunner, load, settle, stream, update
from memory_saver import (
    FRESH,
    RESIDENT,
    TAGS,
    FakeMemorySaver,
    FakeRequest,
    scheduler_with,
    standing,
)
from published_files import layout_of, state_of

from sglang_weight_hook.publisher import recorder
from sglang_weight_hook.reader.diff import diff

torch = pytest.importorskip("torch")
nn = torch.nn


@pytest.mark.parametrize("tags", [None, [], ["weights"], ["kv_cache"], ["cuda_graph"], list(TAGS)])
def test_what_was_released_is_released_and_what_is_resumed_has_fresh_pages(
    tags: list[str] | None, runner: FakeRunner, scheduler: Any, maps: Path
) -> None:
    assert standing(maps) == FRESH
    named = tags or list(TAGS)
    assert scheduler.release_memory_occupation(FakeRequest(tags)) == "released"
    released = dict.fromkeys(named, "released")
    assert standing(maps) == {
        **FRESH,
        "state": "released" if "weights" in named else "ready",
        "residency": {**RESIDENT, **released},
    }
    assert scheduler.resume_memory_occupation(FakeRequest(tags)) == "resumed"
    assert standing(maps) == {
        **FRESH,
        "content_generation": 1 + ("weights" in named),
        "physical_epoch": int("weights" in named),
        "kv_physical_epoch": int("kv_cache" in named),
    }


@pytest.mark.parametrize("tags", [None, ["weights"], ["kv_cache"]])
def test_a_memory_saver_that_is_not_enabled_frees_nothing(
    tags: list[str] | None, runner: FakeRunner, maps: Path
) -> None:
    scheduler = scheduler_with(FakeMemorySaver(enabled=False))
    scheduler.release_memory_occupation(FakeRequest(tags))
    assert standing(maps) == FRESH
    scheduler.resume_memory_occupation(FakeRequest(tags))
    assert standing(maps) == FRESH


def test_a_scheduler_without_a_memory_saver_frees_nothing(runner: FakeRunner, maps: Path) -> None:
    scheduler = scheduler_with(FakeMemorySaver(enabled=True))
    scheduler.memory_saver_adapter.pause = lambda tag: None
    del scheduler.memory_saver_adapter.enabled
    scheduler.release_memory_occupation(FakeRequest())
    assert standing(maps) == FRESH


def test_during_a_release_the_state_is_updating_and_the_pages_still_count_as_there(
    runner: FakeRunner, scheduler: Any, maps: Path
) -> None:
    seen: list[Any] = []
    scheduler.during = lambda: seen.append(state_of(maps))
    scheduler.release_memory_occupation(FakeRequest(["weights"]))
    scheduler.resume_memory_occupation(FakeRequest(["weights"]))
    assert [state["state"] for state in seen] == ["updating", "updating"]
    assert [state["residency"]["weights"] for state in seen] == ["resident", "released"]


def test_weights_and_cache_come_back_one_after_the_other(
    runner: FakeRunner, scheduler: Any, maps: Path
) -> None:
    # As reinforcement learning does it: first the weights, then an update, then the cache.
    scheduler.release_memory_occupation(FakeRequest())
    scheduler.resume_memory_occupation(FakeRequest(["weights"]))
    found = standing(maps)
    assert (found["state"], found["physical_epoch"], found["kv_physical_epoch"]) == ("ready", 1, 0)
    update(runner)
    assert standing(maps)["state"] == "ready"
    scheduler.resume_memory_occupation(FakeRequest(["kv_cache", "cuda_graph"]))
    found = standing(maps)
    assert (found["physical_epoch"], found["kv_physical_epoch"]) == (1, 1)
    assert found["residency"] == RESIDENT


def test_the_epoch_rises_with_each_round(runner: FakeRunner, scheduler: Any, maps: Path) -> None:
    for round_ in range(1, 4):
        scheduler.release_memory_occupation(FakeRequest(["weights"]))
        assert standing(maps)["physical_epoch"] == round_ - 1
        scheduler.resume_memory_occupation(FakeRequest(["weights"]))
        assert standing(maps)["physical_epoch"] == round_
    assert standing(maps)["layout_generation"] == 1


def test_a_tag_of_no_known_memory_leaves_the_weights_resident(
    runner: FakeRunner, scheduler: Any, maps: Path
) -> None:
    scheduler.release_memory_occupation(FakeRequest(["a tag of a later release"]))
    assert standing(maps) == FRESH


def test_every_runner_of_the_process_is_released_together(scheduler: Any, maps: Path) -> None:
    runners = [FakeRunner(nn.Linear(2, 2)), FakeRunner(nn.Linear(2, 2), draft=True)]
    for runner in runners:
        load(runner)
    settle()
    scheduler.release_memory_occupation(FakeRequest(["weights"]))
    assert [standing(maps, s)["state"] for s in ("0", "0_draft")] == ["released"] * 2
    scheduler.resume_memory_occupation(FakeRequest(["weights"]))
    assert [standing(maps, s)["state"] for s in ("0", "0_draft")] == ["ready"] * 2
    assert [standing(maps, s)["physical_epoch"] for s in ("0", "0_draft")] == [1, 1]


def test_a_release_that_is_refused_changes_nothing_but_says_that_it_failed(
    runner: FakeRunner, scheduler: Any, saver: FakeMemorySaver, maps: Path
) -> None:
    before = layout_of(maps)
    scheduler.offload_tags.add("busy")
    with pytest.raises(AssertionError, match="while busy"):
        scheduler.release_memory_occupation(FakeRequest(["weights"]))
    assert saver.paused == []
    assert standing(maps) == {**FRESH, "state": "failed"}
    assert state_of(maps)["event"]["success"] is False
    after = layout_of(maps)
    assert (after["tensors"], after["regions"]) == (before["tensors"], before["regions"])
    assert not diff(before, after).must_register_again


def test_a_failed_release_of_released_weights_leaves_them_released(
    runner: FakeRunner, scheduler: Any, saver: FakeMemorySaver, maps: Path
) -> None:
    scheduler.release_memory_occupation(FakeRequest(["weights"]))
    saver.fails_at = "kv_cache"
    with pytest.raises(RuntimeError, match="memory saver failed"):
        scheduler.release_memory_occupation(FakeRequest(["kv_cache"]))
    found = standing(maps)
    assert (found["state"], found["residency"]["weights"]) == ("released", "released")


def test_a_resume_that_fails_leaves_the_weights_released(
    runner: FakeRunner, scheduler: Any, saver: FakeMemorySaver, maps: Path
) -> None:
    scheduler.release_memory_occupation(FakeRequest(["weights"]))
    saver.fails_at = "weights"
    with pytest.raises(RuntimeError, match="memory saver failed"):
        scheduler.resume_memory_occupation(FakeRequest(["weights"]))
    found = standing(maps)
    assert (found["state"], found["physical_epoch"]) == ("released", 0)
    saver.fails_at = None
    scheduler.offload_tags.add("weights")
    scheduler.resume_memory_occupation(FakeRequest(["weights"]))
    assert standing(maps)["physical_epoch"] == 1


def test_a_resume_of_what_was_never_released_gives_no_fresh_pages(
    runner: FakeRunner, scheduler: Any, maps: Path
) -> None:
    with pytest.raises(KeyError):
        scheduler.resume_memory_occupation(FakeRequest(["weights"]))
    found = standing(maps)
    assert found["residency"] == RESIDENT
    assert (found["physical_epoch"], found["content_generation"]) == (0, 1)


def test_pages_that_a_release_took_before_it_failed_are_fresh_when_they_are_resumed(
    runner: FakeRunner, scheduler: Any, saver: FakeMemorySaver, maps: Path
) -> None:
    # Released in the order kv_cache, weights, cuda_graph: the weights are released when it fails.
    saver.fails_at = "cuda_graph"
    with pytest.raises(RuntimeError, match="memory saver failed"):
        scheduler.release_memory_occupation(FakeRequest())
    assert saver.paused == ["kv_cache", "weights"]
    assert standing(maps)["state"] == "failed"
    saver.fails_at = None
    scheduler.resume_memory_occupation(FakeRequest(["kv_cache", "weights"]))
    assert saver.paused == []
    # What was registered before has other pages behind it now.
    found = standing(maps)
    assert (found["physical_epoch"], found["kv_physical_epoch"]) == (1, 1)
    assert found["residency"] == RESIDENT


def test_an_update_of_released_weights_leaves_them_released(
    runner: FakeRunner, scheduler: Any, maps: Path
) -> None:
    scheduler.release_memory_occupation(FakeRequest(["weights"]))
    during: list[str] = []
    update(runner, during=lambda: during.append(state_of(maps)["residency"]["weights"]))
    assert during == ["released"]
    found = standing(maps)
    assert (found["state"], found["residency"]["weights"]) == ("released", "released")
    scheduler.resume_memory_occupation(FakeRequest(["weights"]))
    assert standing(maps)["state"] == "ready"


def test_a_bucket_and_a_failed_update_of_released_weights_leave_them_released(
    runner: FakeRunner, scheduler: Any, maps: Path
) -> None:
    scheduler.release_memory_occupation(FakeRequest(["weights"]))
    stream(runner)
    assert state_of(maps)["state"] == "released"
    begun = recorder.begin("update_weights_from_disk", "update", [runner])
    recorder.finish(begun, (False, "no such file"), None)
    assert state_of(maps)["state"] == "released"
    scheduler.resume_memory_occupation(FakeRequest(["weights"]))
    assert state_of(maps)["state"] == "failed"
    update(runner)
    assert state_of(maps)["state"] == "ready"


def test_weights_bound_anew_while_released_are_published_where_they_are(
    runner: FakeRunner, scheduler: Any, maps: Path
) -> None:
    scheduler.release_memory_occupation(FakeRequest(["weights"]))
    kept = runner.model[0].weight.data
    update(runner, during=lambda: setattr(runner.model[0].weight, "data", kept.clone()))
    layout = layout_of(maps)
    assert layout["tensors"]["0.weight"]["ptr"] == runner.model[0].weight.data_ptr()
    assert standing(maps)["layout_generation"] == 2
