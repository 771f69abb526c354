"""Memory that is released and resumed: which states, epochs and generations come of it.

The scheduler, its request and the memory saver are fakes with the names and the order of
SGLang's own (`managers/scheduler_components/weight_updater.py`, 0.5.23), wrapped by the real
patch core; the recorder, the tensors and the files are real.  The CUDA driver is a fake:
``tests/gpu`` takes real pages away.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_sglang import FakeRunner, load, settle, stream, update
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

import sglang_weight_hook_patch_core as core
from sglang_weight_hook.layout import files
from sglang_weight_hook.publisher import capture as capture_module
from sglang_weight_hook.publisher import cuda_driver, recorder
from sglang_weight_hook.reader.diff import diff

torch = pytest.importorskip("torch")
nn = torch.nn

TAGS = ("kv_cache", "weights", "cuda_graph")
RESIDENT = dict.fromkeys(("weights", "kv_cache", "cuda_graph"), "resident")


class FakeMemorySaver:
    """A fake of SGLang's TorchMemorySaverAdapter, real or no-op."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.paused: list[str] = []
        self.fails_at: str | None = None

    def pause(self, tag: str) -> None:
        self._may_fail(tag)
        self.paused.append(tag)

    def resume(self, tag: str) -> None:
        self._may_fail(tag)
        self.paused.remove(tag)

    def _may_fail(self, tag: str) -> None:
        if tag == self.fails_at:
            raise RuntimeError("the memory saver failed")


class FakeRequest:
    def __init__(self, tags: Any = None) -> None:
        self.tags = tags


def scheduler_with(memory_saver: FakeMemorySaver) -> Any:
    """A fake scheduler whose two methods the patch core has wrapped."""

    class Manager:
        def __init__(self) -> None:
            self.memory_saver_adapter = memory_saver
            self.offload_tags: set[str] = set()
            self.during: Callable[[], None] = lambda: None

        def release_memory_occupation(self, recv_req: FakeRequest) -> str:
            assert not self.offload_tags & {"busy"}, "release_memory_occupation while busy"
            for tag in recv_req.tags or TAGS:
                self.offload_tags.add(tag)
                self.memory_saver_adapter.pause(tag)
            self.during()
            return "released"

        def resume_memory_occupation(self, recv_req: FakeRequest) -> str:
            for tag in recv_req.tags or TAGS:
                self.offload_tags.remove(tag)  # KeyError where it was not released
                self.memory_saver_adapter.resume(tag)
            self.during()
            return "resumed"

    for entry in core.ENTRY_POINTS:
        if entry.site == core.SCHEDULER_UPDATER:
            wrapped = core.make_wrapper(getattr(Manager, entry.method), entry)
            setattr(Manager, entry.method, wrapped)
    return Manager()


def read(maps: Path, name: str, slot: str = "0") -> Any:
    return json.loads((maps / name.format(slot)).read_bytes())


def state_of(maps: Path, slot: str = "0") -> Any:
    return read(maps, files.STATE, slot)


def layout_of(maps: Path, slot: str = "0") -> Any:
    return read(maps, files.LAYOUT, slot)


def standing(maps: Path, slot: str = "0") -> dict[str, Any]:
    """What both documents say of states and generations, which must be the same."""
    fields = (
        "state",
        "layout_generation",
        "content_generation",
        "physical_epoch",
        "kv_physical_epoch",
        "residency",
    )
    state, layout = state_of(maps, slot), layout_of(maps, slot)
    assert [state[field] for field in fields] == [layout[field] for field in fields]
    return {field: state[field] for field in fields}


@pytest.fixture
def runner() -> FakeRunner:
    runner = FakeRunner(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))
    load(runner)
    settle()
    return runner


@pytest.fixture
def saver() -> FakeMemorySaver:
    return FakeMemorySaver(enabled=True)


@pytest.fixture
def scheduler(saver: FakeMemorySaver) -> Any:
    return scheduler_with(saver)


FRESH = {
    "state": "ready",
    "layout_generation": 1,
    "content_generation": 1,
    "physical_epoch": 0,
    "kv_physical_epoch": 0,
    "residency": RESIDENT,
}


# --- one release and one resume -----------------------------------------------------------


@pytest.mark.parametrize("tags", [None, [], ["weights"], ["kv_cache"], ["cuda_graph"], list(TAGS)])
def test_what_was_released_is_released_and_what_is_resumed_has_fresh_pages(
    tags: list[str] | None, runner: FakeRunner, scheduler: Any, maps: Path
) -> None:
    assert standing(maps) == FRESH
    named = tags or list(TAGS)
    assert scheduler.release_memory_occupation(FakeRequest(tags)) == "released"
    gone = dict.fromkeys(named, "released")
    assert standing(maps) == {
        **FRESH,
        "state": "released" if "weights" in named else "ready",
        "residency": {**RESIDENT, **gone},
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


def test_a_tag_of_no_known_memory_is_nobodys_weights(
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


# --- failures -----------------------------------------------------------------------------


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
    # Released in the order kv_cache, weights, cuda_graph: the weights are gone when it fails.
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


# --- updates of what is not there ----------------------------------------------------------


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


# --- a driver that forgets what is unmapped -------------------------------------------------


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[tuple[int, int]]]:
    """What a fake CUDA driver knows, by storage; its "cuda" is the CPU."""
    known: dict[int, list[tuple[int, int]]] = {}
    monkeypatch.setattr(cuda_driver, "is_initialised", lambda: True)
    monkeypatch.setattr(cuda_driver, "allocations_under", lambda ptr, size: known.get(ptr, []))
    monkeypatch.setattr(
        cuda_driver,
        "allocation_kind",
        lambda base: "vmm" if any((base,) == p[0][:1] for p in known.values()) else None,
    )
    row = capture_module.row_of
    monkeypatch.setattr(
        capture_module,
        "row_of",
        lambda kind, tensor, device: row(kind, tensor, "cpu")._replace(device="cuda:0"),
    )
    monkeypatch.setattr("sglang_weight_hook.publisher.memory.device", lambda device_type: None)
    return known


def map_everything(known: dict[int, list[tuple[int, int]]], runner: FakeRunner) -> None:
    for tensor in runner.model.parameters():
        base = tensor.data_ptr() - 64
        known[tensor.data_ptr()] = [(base, 4096)]


@pytest.fixture
def on_gpu(driver: dict[int, list[tuple[int, int]]]) -> FakeRunner:
    runner = FakeRunner(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), device="cuda")
    map_everything(driver, runner)
    load(runner)
    settle()
    return runner


def test_the_layout_stands_while_the_driver_knows_nothing_of_the_memory(
    on_gpu: FakeRunner, driver: dict[int, list[tuple[int, int]]], scheduler: Any, maps: Path
) -> None:
    before = layout_of(maps)
    assert {region["allocation_source"] for region in before["regions"]} == {"driver"}
    assert {region["allocation_kind"] for region in before["regions"]} == {"vmm"}
    scheduler.during = driver.clear  # unmapped: nobody's memory
    scheduler.release_memory_occupation(FakeRequest(["weights"]))
    released = layout_of(maps)
    assert released["regions"] == before["regions"]
    assert released["tensors"] == before["tensors"]
    assert released["layout_generation"] == before["layout_generation"] == 1
    update(on_gpu)
    assert layout_of(maps)["regions"] == before["regions"]
    scheduler.during = lambda: map_everything(driver, on_gpu)
    scheduler.resume_memory_occupation(FakeRequest(["weights"]))
    after = layout_of(maps)
    assert after["regions"] == before["regions"]
    assert standing(maps)["layout_generation"] == 1
    assert standing(maps)["physical_epoch"] == 1
    assert diff(before, after).repaged


def test_memory_that_comes_back_in_other_allocations_is_another_layout(
    on_gpu: FakeRunner, driver: dict[int, list[tuple[int, int]]], scheduler: Any, maps: Path
) -> None:
    before = layout_of(maps)
    scheduler.during = driver.clear
    scheduler.release_memory_occupation(FakeRequest(["weights"]))
    scheduler.during = lambda: driver.update(
        {t.data_ptr(): [(t.data_ptr(), 512)] for t in on_gpu.model.parameters()}
    )
    scheduler.resume_memory_occupation(FakeRequest(["weights"]))
    after = layout_of(maps)
    assert after["layout_generation"] == 2
    assert {region["allocation_size"] for region in after["regions"]} == {512}
    assert diff(before, after).must_register_again


def test_a_weight_that_moved_while_released_has_none_of_the_old_ones_allocation(
    on_gpu: FakeRunner, driver: dict[int, list[tuple[int, int]]], scheduler: Any, maps: Path
) -> None:
    scheduler.during = driver.clear
    scheduler.release_memory_occupation(FakeRequest(["weights"]))
    kept = on_gpu.model[0].weight.data
    update(on_gpu, during=lambda: setattr(on_gpu.model[0].weight, "data", kept.clone()))
    region = next(r for r in layout_of(maps)["regions"] if "0.weight" in r["tensors"])
    assert region["allocation_source"] == "storage"
    assert region["ptr"] == region["allocation_ptr"] == on_gpu.model[0].weight.data_ptr()


# --- any sequence ---------------------------------------------------------------------------

tags = st.none() | st.lists(st.sampled_from(TAGS), unique=True, max_size=3)
steps = st.one_of(
    st.tuples(st.sampled_from(["release", "resume"]), tags, st.booleans()),
    st.tuples(st.sampled_from(["update", "stream", "fail", "settle"]), st.none(), st.just(True)),
)


def epoch_of(state: Any, tag: str) -> int:
    epoch: int = state["physical_epoch" if tag == "weights" else "kv_physical_epoch"]
    return epoch


@examples(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(steps, max_size=8), st.booleans())
def test_any_sequence_of_releases_and_resumes_is_told_as_it_is(
    maps: Path, sequence: list[tuple[str, list[str] | None, bool]], enabled: bool
) -> None:
    recorder._after_fork_in_child()  # every example begins with a fresh hook
    runner = FakeRunner(nn.Linear(2, 2))
    load(runner)
    settle()
    gone: set[str] = set()
    doubtful: set[str] = set()  # named by a release that failed: how far it came is not known
    epochs = {"weights": 0, "kv_cache": 0, "cuda_graph": 0}
    broken = False
    for what, named, success in sequence:
        failed = False
        if what in ("release", "resume"):
            details = {"tags": named or [], "physical": enabled}
            begun = recorder.begin(f"{what}_memory_occupation", what, [], details)
            recorder.finish(begun, None, None if success else RuntimeError("refused"))
            failed = not success
            touched = set(named or TAGS) if success and enabled else set()
            if what == "release":
                gone |= touched
                doubtful |= set(named or TAGS) if failed and enabled else set()
            else:
                rising = {tag: tag in gone for tag in touched}
                gone -= touched
                for tag in doubtful & touched & {"weights", "kv_cache"}:
                    rising[tag] = epoch_of(state_of(maps), tag) > epochs[tag]
                doubtful -= touched
                for tag, rises in rising.items():
                    epochs[tag] += rises
        elif what == "settle":
            settle()
        else:
            begun = recorder.begin("update", "stream" if what == "stream" else "update", [runner])
            recorder.finish(begun, (what != "fail", "said"), None)
            broken = what == "fail"
        state = state_of(maps)
        assert {tag for tag in TAGS if state["residency"][tag] == "released"} == gone
        expected = "ready"
        if "weights" in gone:
            expected = "released"
        elif failed or broken:
            expected = "failed"
        assert state["state"] == expected
        for tag in ("weights", "kv_cache"):
            assert epoch_of(state, tag) == epochs[tag]
        assert state["layout_generation"] == 1
        layout = layout_of(maps)
        assert layout["tensors"]["weight"]["ptr"] == runner.model.weight.data_ptr()
