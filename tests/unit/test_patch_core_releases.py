"""Which methods the table expects in which release of SGLang, and how a missing one is reported.

SGLang's classes are fakes here, with the signatures of the real ones; ``tests/real_sglang``
wraps the real ones.
"""

from __future__ import annotations

import doctest
import logging
import sys
import types
from pathlib import Path
from typing import Any

import fake_sglang
import pytest
from patched_methods import LOAD, an_entry, fake_module

import sglang_weight_hook_patch_core as core
from sglang_weight_hook.publisher.events import EFFECTS

pytestmark = pytest.mark.usefixtures("release")


def test_every_effect_of_the_table_is_one_that_the_recorder_knows() -> None:
    assert {entry.effect for entry in core.ENTRY_POINTS} <= EFFECTS


def test_the_end_of_a_deferred_load_is_no_update_and_leaves_the_runner_loading() -> None:
    # SGLang 0.5.18 and later call it inside Scheduler.__init__ (managers/scheduler.py),
    # before drafts are settled: the weights are complete, the engine is not.
    assert an_entry("ModelRunner.finalize_startup_weight_load").effect == "commit"


RELEASES = [
    "0.4.6.post5",
    "0.4.7",
    "0.4.9.post6",
    "0.4.10.post2",
    "0.5.1.post3",
    "0.5.3.post3",
    "0.5.5.post3",
    "0.5.6.post2",
    "0.5.8.post1",
    "0.5.9",
    "0.5.10.post1",
    "0.5.12.post1",
    "0.5.15.post1",
    "0.5.18",
    "0.5.20",
    "0.5.21",
    "0.5.22",
    "0.5.23",
]


def expected_in(version: str, event: str, package: str = "sglang.srt") -> set[str]:
    return {
        entry.name
        for entry in core.ENTRY_POINTS
        if entry.event == event
        and entry.module.startswith(package)
        and core._expected(entry, version)
    }


def test_release_key_agrees_with_its_examples() -> None:
    finder = doctest.DocTestFinder()
    found = [test for test in finder.find(core, "core") if test.examples]
    assert found
    for test in found:
        assert doctest.DocTestRunner().run(test).failed == 0


def test_the_known_releases_are_in_the_order_of_their_keys() -> None:
    assert sorted(RELEASES, key=core.release_key) == RELEASES
    assert core.release_key("0.5.23+cu128") == core.release_key("0.5.23")


@pytest.mark.parametrize("version", RELEASES)
def test_each_release_has_exactly_the_places_that_its_source_has(version: str) -> None:
    key = core.release_key(version)
    since_components = key >= core.release_key("0.5.18")
    holder = "WeightUpdater" if since_components else "ModelRunner"
    writes = (
        "load_weights_from_distributed"
        if key >= core.release_key("0.5.21")
        else "update_weights_from_distributed"
    )
    assert expected_in(version, "load_model") == {"ModelRunner.load_model"}
    for event in ("update_weights_from_disk", "update_weights_from_tensor"):
        assert expected_in(version, event) == {f"{holder}.{event}"}
    assert expected_in(version, "update_weights_from_distributed") == {f"{holder}.{writes}"}
    assert expected_in(version, "update_weights_from_ipc") == (
        {f"{holder}.update_weights_from_ipc"} if key >= core.release_key("0.5.5.post3") else set()
    )
    session = {"WeightUpdater.begin_weight_update", "WeightUpdater.end_weight_update"}
    assert expected_in(version, "weight_update_session") == (
        session if key >= core.release_key("0.5.21") else set()
    )
    if key <= core.release_key("0.4.9.post6"):
        scheduler = "Scheduler"
    elif key <= core.release_key("0.5.12.post1"):
        scheduler = "SchedulerUpdateWeightsMixin"
    else:
        scheduler = "SchedulerWeightUpdaterManager"
    for event in ("release_memory_occupation", "resume_memory_occupation"):
        assert expected_in(version, event) == {f"{scheduler}.{event}"}
    experts = expected_in(version, "expert_location_update")
    assert ("ModelRunner.update_expert_location" in experts) == (not since_components)
    assert ("ExpertLocationUpdater.update" in experts) == (version != "0.4.6.post5")


@pytest.mark.parametrize("version", RELEASES)
def test_each_release_has_the_places_of_its_diffusion_worker(version: str) -> None:
    key = core.release_key(version)

    def since(first: str, *places: str) -> set[str]:
        return set(places) if key >= core.release_key(first) else set()

    def places(event: str) -> set[str]:
        return expected_in(version, event, "sglang.multimodal_gen")

    updater = "GPUWorkerPostTrainingMixin" if since("0.5.14", "it") else "GPUWorker"
    lora = "GPUWorker.set_lora" if since("0.5.6", "it") else "GPUWorker.set_lora_adapter"
    assert places("pipeline_ready") == since("0.5.5", "GPUWorker.__init__")
    assert places("late_component") == since("0.5.6", "ComposedPipelineBase.add_module")
    assert places("set_lora") == since("0.5.5", lora)
    for event in ("merge_lora_weights", "unmerge_lora_weights"):
        assert places(event) == since("0.5.5", f"GPUWorker.{event}")
    disk, tensor = "update_weights_from_disk", "update_weights_from_tensor"
    assert places(disk) == since("0.5.9", f"{updater}.{disk}")
    assert places(tensor) == since("0.5.14", f"{updater}.{tensor}")
    for event in ("release_memory_occupation", "resume_memory_occupation"):
        assert places(event) == since("0.5.15", f"GPUWorker.{event}")


@pytest.mark.parametrize("version", RELEASES)
def test_a_runner_that_nobody_builds_is_whole_with_the_last_step_that_its_release_has(
    version: str,
) -> None:
    step = "alloc_memory_pool" if core.release_key(version) >= (0, 5, 14) else "__init__"
    assert expected_in(version, "runner_ready") == {f"ModelRunner.{step}"}


@pytest.mark.parametrize("version", ["0.6.0", "1.0", "0.5.24.dev7+g123", "unknown", "0.0.0.dev0"])
def test_an_unknown_release_is_taken_for_one_after_the_newest(version: str) -> None:
    for event in {entry.event for entry in core.ENTRY_POINTS}:
        assert expected_in(version, event) == expected_in(core.NEWEST, event)


def updates_without_tensor() -> types.ModuleType:
    entry = an_entry("WeightUpdater.update_weights_from_disk")
    names = [
        entry.method
        for entry in core.ENTRY_POINTS
        if entry.site[1] == "WeightUpdater" and entry.method != "update_weights_from_tensor"
    ]
    return fake_module(entry, **{name: (lambda self, *args: "done") for name in names})


@pytest.mark.parametrize("version", ["0.5.23", "0.6.0", "unknown"])
def test_a_method_that_a_release_lacks_is_reported_once_and_the_rest_works(
    version: str, release: Any, recorded: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    release(version)
    for _ in range(3):
        module = updates_without_tensor()
        core.patch_module(module)
        assert module.WeightUpdater().update_weights_from_disk() == "done"
    warnings = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert version in warnings[0]
    assert "WeightUpdater.update_weights_from_tensor" in warnings[0]
    assert len(recorded) == 6
    assert core._missing == ["update_weights_from_tensor: WeightUpdater.update_weights_from_tensor"]


def test_a_class_that_a_release_lacks_is_reported_and_not_fatal(
    caplog: pytest.LogCaptureFixture,
) -> None:
    core.patch_module(types.ModuleType(LOAD.module))
    assert "ModelRunner.load_model" in caplog.text


def test_what_an_older_release_never_had_is_not_reported(
    release: Any, caplog: pytest.LogCaptureFixture
) -> None:
    release("0.4.6.post5")
    methods = {
        entry.method: lambda self: None
        for entry in core.ENTRY_POINTS
        if entry.site == core.RUNNER and core._expected(entry, "0.4.6.post5")
    }
    core.patch_module(fake_module(LOAD, **methods))
    assert caplog.records == []


def test_an_event_without_any_entry_point_is_reported_when_a_model_loads(
    recorded: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    methods = {
        entry.method: lambda self: None
        for entry in core.ENTRY_POINTS
        if entry.site == core.RUNNER and core._expected(entry, "0.5.23")
    }
    module = fake_module(LOAD, **methods)
    core.patch_module(module)
    assert caplog.records == []
    for _ in range(2):
        module.ModelRunner().load_model()
    reported = [
        text for text in caplog.messages if "WeightUpdater.update_weights_from_disk" in text
    ]
    assert len(reported) == 1
    assert "0.5.23" in reported[0]


def test_a_module_in_a_namespace_package_is_found_without_importing_its_parents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "regular_parent" / "namespace"
    inner.mkdir(parents=True)
    (tmp_path / "regular_parent" / "__init__.py").write_text("raise AssertionError\n")
    (inner / "leaf.py").write_text("raise AssertionError\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert core._exists_on_disk("regular_parent.namespace.leaf")
    assert not core._exists_on_disk("regular_parent.namespace.other")
    assert not core._exists_on_disk("regular_parent.nothing.leaf")


def test_the_version_is_unknown_where_sglang_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sglang", types.ModuleType("sglang"))
    monkeypatch.setattr("importlib.metadata.version", lambda name: None)
    assert core._sglang_version() == "unknown"


def test_the_missing_names_reach_the_state_file(maps: Any, release: Any) -> None:
    torch = pytest.importorskip("torch")
    release("0.6.0")
    core.patch_module(updates_without_tensor())
    module = fake_module(
        LOAD, load_model=lambda self: None, finalize_startup_weight_load=lambda self: None
    )
    core.patch_module(module)
    cls = type("Runner", (module.ModelRunner, fake_sglang.FakeRunner), {})
    runner = cls(torch.nn.Linear(2, 2))
    runner.load_model()
    text = (maps / "weight_state_0.json").read_text()
    assert "WeightUpdater.update_weights_from_tensor" in text
