"""Around which events a subscriber is called, and what it is told."""

from __future__ import annotations

import gc
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_sglang import FakeRunner, event, load, settle, stream, update

from sglang_weight_hook.layout import files
from sglang_weight_hook.publisher import recorder, settings, subscription
from sglang_weight_hook.publisher.subscribers import Region

torch = pytest.importorskip("torch")

PHYSICAL = {"tags": None, "physical": True}


def a_model() -> Any:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
    model.register_buffer("scale", torch.ones(3))
    return model


def published(**more: Any) -> FakeRunner:
    runner = FakeRunner(a_model(), **more)
    load(runner)
    settle()
    return runner


def state(maps: Path, slot: str = "0") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((maps / files.STATE.format(slot)).read_bytes())
    return found


def test_without_the_variable_nothing_is_imported_and_no_thread_is_started(
    run_python: Callable[..., Any],
) -> None:
    code = """
import sys, threading, torch
from fake_sglang import FakeRunner, load, settle, stream, update
runner = FakeRunner(torch.nn.Linear(2, 2))
load(runner); settle(); update(runner); stream(runner)
late = ("subscribers", "subscriber_calls", "subscriber_thread", "transport", "engines")
ours = [name for name in sys.modules if name.startswith("sglang_weight_hook.publisher.")
        and name.split(".")[2] in late]
engines = [name for name in sys.modules if name.split(".")[0] in ("mooncake", "nixl_cu12")]
print(ours, engines, threading.active_count())
"""
    done = run_python(
        "-c", code, SGLANG_WEIGHT_HOOK_CHECK_SECONDS="0", SGLANG_WEIGHT_HOOK_QUIET_MS="0"
    )
    assert done.stdout.split("\n")[0] == "[] [] 1"


def test_without_the_variable_a_bucket_calls_nothing_of_the_subscribers(
    maps: Path,
) -> None:
    runner = published()
    seen: set[str] = set()

    def profile(frame: Any, what: str, argument: Any) -> None:
        if what == "call":
            seen.add(f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}")

    sys.setprofile(profile)
    try:
        stream(runner)
    finally:
        sys.setprofile(None)
    assert any(name.startswith("recorder.py:") for name in seen)
    assert not any("subscri" in name for name in seen)


def test_a_load_and_an_update(told: Any, maps: Path) -> None:
    runner = published()
    update(runner)
    assert told.methods() == [
        ("before", "0"),
        ("after", "0"),
        ("after", "0"),  # the scheduler is built: nothing can be told before
        ("before", "0"),
        ("after", "0"),
    ]
    first, last = told.calls[0][2], told.calls[3][2]
    assert (first.kind, first.effects) == ("load_model", {"load"})
    assert (last.kind, last.effects, last.releases) == (
        "update_weights_from_disk",
        {"update"},
        frozenset(),
    )
    assert last.success is None
    assert told.threads == {"sglang-weight-hook a_subscriber:make"}
    assert state(maps)["subscribers"] == {"a_subscriber:make": None}


def test_before_is_under_the_lock_and_before_sglangs_own_method(told: Any, maps: Path) -> None:
    runner = published()
    seen: list[Any] = []
    told.does["before"] = lambda: seen.append((state(maps)["state"], state(maps)["lock"]))
    told.does["after"] = lambda: seen.append((state(maps)["state"], state(maps)["lock"]))
    update(runner, during=lambda: seen.append("sglang"))
    assert seen == [("updating", "held"), "sglang", ("updating", "held")]
    assert state(maps)["state"] == "ready"


def test_after_is_told_the_document_that_is_published(told: Any, maps: Path) -> None:
    runner = published()
    assert runner.model is not None  # alive
    written = json.loads((maps / files.LAYOUT.format("0")).read_bytes())
    assert told.documents[-1]["tensors"] == written["tensors"]
    assert told.documents[-1]["regions"] == written["regions"]
    assert told.documents[-1]["layout_generation"] == written["layout_generation"]


def test_the_first_diff_is_of_another_instance(told: Any) -> None:
    published()
    first = told.diffs[0]
    assert first.other_instance
    assert set(first.added) == {"0.weight", "0.bias", "1.weight", "1.bias", "scale"}
    assert not first.registrations_hold
    regions = {Region(r["ptr"], r["size"], r["device"]) for r in told.documents[0]["regions"]}
    assert set(first.regions_added) == regions


def test_an_update_in_place_changes_the_content_alone(told: Any) -> None:
    runner = published()
    update(runner, during=lambda: runner.model[0].weight.data.fill_(3))
    diff = told.diffs[-1]
    assert diff.registrations_hold
    assert diff.content_changed
    assert not diff.repaged
    assert (diff.moved, diff.added, diff.removed) == ((), (), ())
    assert len(diff.regions_kept) == len(told.documents[-1]["regions"])


def test_an_update_that_moves_names_what_moved(told: Any) -> None:
    runner = published()
    old = torch.nn.Parameter(torch.zeros(8, 8))

    def move() -> None:
        runner.model[0].weight = old
        runner.model.extra = torch.nn.Linear(2, 2)
        del runner.model.scale

    before = told.documents[-1]["tensors"]["0.weight"]["ptr"]
    update(runner, during=move)
    diff = told.diffs[-1]
    assert diff.moved == ("0.weight",)
    assert set(diff.added) == {"extra.weight", "extra.bias"}
    assert diff.removed == ("scale",)
    assert old.data_ptr() in {region.ptr for region in diff.regions_added}
    assert before in {region.ptr for region in diff.regions_removed}
    assert not diff.registrations_hold


def test_a_failed_update_is_told_as_one(told: Any) -> None:
    runner = published()
    event("update_weights_from_disk", "update", [runner], error=ValueError("no such file"))
    assert told.documents[-1]["event"]["success"] is False
    assert told.documents[-1]["state"] == "failed"


def test_an_update_that_is_rolled_back_is_told_where_the_weights_are(told: Any) -> None:
    runner = published()
    was = runner.model[0].weight

    def roll_back() -> None:
        runner.model[0].weight = torch.nn.Parameter(torch.zeros(8, 8))
        runner.model[0].weight = was

    event("update_weights_from_disk", "update", [runner], during=roll_back, result=(False, "no"))
    assert told.diffs[-1].registrations_hold
    assert told.documents[-1]["event"]["success"] is False


def test_a_release_says_what_it_takes_and_a_resume_that_the_pages_are_others(told: Any) -> None:
    runner = published()
    event("release_memory_occupation", "release", [runner], details=PHYSICAL)
    assert told.calls[-2][2].releases == {"weights", "kv_cache", "cuda_graph"}
    assert told.documents[-1]["state"] == "released"
    assert not told.diffs[-1].repaged
    event("resume_memory_occupation", "resume", [runner], details=PHYSICAL)
    assert told.diffs[-1].repaged
    assert not told.diffs[-1].registrations_hold
    assert told.diffs[-1].regions_kept


def test_a_release_without_a_memory_saver_takes_nothing(told: Any) -> None:
    runner = published()
    event("release_memory_occupation", "release", [runner], details={"tags": None})
    assert told.calls[-2][2].releases == frozenset()


def test_a_stream_is_one_event(told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_WEIGHT_HOOK_QUIET_MS", "100")
    settings._settings = None
    runner = published()
    told.calls.clear()
    for _ in range(5):
        stream(runner)
    assert told.methods() == [("before", "0")]
    wait_until(lambda: len(told.calls) == 2)
    assert told.methods() == [("before", "0"), ("after", "0")]
    assert told.diffs[-1].registrations_hold
    assert told.documents[-1]["event"]["calls"] == 5


def test_a_session_is_one_event(told: Any) -> None:
    runner = published()
    told.calls.clear()
    event("weight_update_session", "open", [runner])
    stream(runner)
    stream(runner)
    event("weight_update_session", "close", [runner])
    # A bucket is another thing that may happen to the weights than the opening.
    assert [(method, what) for method, _, what in told.calls if method == "after"] == [
        ("after", "weight_update_session")
    ]
    effects = [what.effects for method, _, what in told.calls if method == "before"]
    assert effects == [{"open"}, {"open", "stream"}, {"open", "stream", "close"}]


def test_a_release_inside_an_event_is_told_before_it_takes_the_pages(told: Any) -> None:
    runner = published()
    event("weight_update_session", "open", [runner])
    event("release_memory_occupation", "release", [runner], details=PHYSICAL)
    assert told.calls[-1][2].releases == {"weights", "kv_cache", "cuda_graph"}
    event("weight_update_session", "close", [runner])


def test_a_relocation_in_a_forward_waits_for_no_before(told: Any) -> None:
    runner = published()
    told.calls.clear()
    event("expert_relocation", "relocate", [runner])
    assert told.methods() == [("after", "0")]


def test_a_change_that_nobody_announced_is_told_afterwards(told: Any) -> None:
    runner = published()
    told.calls.clear()
    runner.model[0].weight.data = torch.zeros(8, 8)
    (tracked,) = recorder._tracked.values()
    recorder._Recorder.check(tracked, thoroughly=False)
    assert told.methods() == [("after", "0")]
    assert told.calls[-1][2] == "unannounced_change"
    assert told.diffs[-1].moved == ("0.weight",)


def test_each_slot_has_its_own_diff(told: Any) -> None:
    target, draft = published(), published(draft=True, draft_index=0)
    told.calls.clear()
    update(target)
    assert told.methods() == [("before", "0"), ("after", "0")]
    update(draft)
    assert told.methods()[2:] == [("before", "0_draft"), ("after", "0_draft")]
    assert told.diffs[-1].registrations_hold


def test_a_draft_that_shares_the_targets_embedding_is_told_with_it(told: Any) -> None:
    target = published()
    draft = FakeRunner(a_model(), draft=True, draft_index=0)
    draft.model[0].weight = target.model[0].weight
    load(draft)
    settle()
    told.calls.clear()
    update(target)
    assert told.methods() == [
        ("before", "0"),
        ("before", "0_draft"),
        ("after", "0"),
        ("after", "0_draft"),
    ]


def test_a_runner_that_is_gone(told: Any, maps: Path) -> None:
    runner = published()
    del runner
    gc.collect()
    wait_until(lambda: told.methods()[-1] == ("gone", "0"))
    assert not (maps / files.STATE.format("0")).exists()


def test_a_runner_made_again_is_another_instance(told: Any) -> None:
    runner = published()
    del runner
    gc.collect()
    published()
    assert told.diffs[-2].other_instance
    assert told.diffs[-2].regions_removed == ()


def test_a_map_that_is_lost_has_no_region_left(told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = published()

    def fail(*arguments: Any, **more: Any) -> None:
        raise RuntimeError("no")

    regions = told.diffs[-1].regions_kept or told.diffs[0].regions_added
    monkeypatch.setattr("sglang_weight_hook.publisher.capture.capture", fail)
    update(runner)
    assert set(told.diffs[-1].regions_removed) == set(regions)
    assert told.diffs[-1].regions_kept == ()


def test_the_end_of_the_process_is_told(start_python: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "at_the_end.py").write_text(
        "class S:\n"
        "    def before(self, slot, event): pass\n"
        "    def after(self, slot, document, diff): pass\n"
        "    def gone(self, slot): print('gone', slot, flush=True)\n"
    )
    code = """
import torch
from fake_sglang import FakeRunner, load, settle
runner = FakeRunner(torch.nn.Linear(2, 2))
load(runner); settle()
"""
    process = start_python(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{code}",
        SGLANG_WEIGHT_HOOK_SUBSCRIBERS="at_the_end:S",
    )
    output, _ = process.communicate(timeout=60)
    assert output == "gone 0\n"
    assert process.returncode == 0


def wait_until(holds: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_there_is_one_thread_a_subscriber(told: Any) -> None:
    published()
    published(gpu_id=1)
    names = [thread.name for thread in threading.enumerate()]
    assert names.count("sglang-weight-hook a_subscriber:make") >= 1
    assert subscription.current is not None
    assert len(subscription.current._threads) == 1


def test_an_event_over_one_whose_end_was_never_reported_is_told_before(told: Any) -> None:
    runner = published()
    release = ("release_memory_occupation", "release")
    recorder.begin(*release, [runner], PHYSICAL)  # and lost
    gc.collect()
    told.calls.clear()
    event(*release, [runner], details=PHYSICAL)
    assert told.methods()[0] == ("before", "0")
