"""A wrapper changes nothing of a call: its arguments, its result, its exceptions.

SGLang's classes are fakes here, with the signatures of the real ones; ``tests/real_sglang``
wraps the real ones.
"""

from __future__ import annotations

import types
from typing import Any

import pytest
from patched_methods import (
    CASES,
    DISK,
    DISK_1,
    FORMS,
    LOAD,
    Call,
    an_entry,
    bound,
    fake_module,
    method,
)

import sglang_weight_hook_patch_core as core
from sglang_weight_hook.publisher import recorder

pytestmark = pytest.mark.usefixtures("release")


def test_every_entry_of_the_table_has_its_signature_in_this_test() -> None:
    assert {(entry.site[1], entry.method) for entry in core.ENTRY_POINTS} == set(FORMS)


@pytest.mark.parametrize(("entry", "signature", "call"), CASES)
def test_a_wrapped_method_gets_the_same_arguments_and_returns_the_same_object(
    entry: core.EntryPoint, signature: str, call: Call, recorded: list[Any]
) -> None:
    seen: list[dict[str, Any]] = []
    answer = None if entry.method == "__init__" else object()

    def remember(arguments: dict[str, Any]) -> Any:
        seen.append(arguments)
        return answer

    original = method(signature, entry.method, remember)
    module = fake_module(entry, **{entry.method: original})
    unpatched, _ = bound(module, entry)
    unpatched(*call.args, **call.kwargs)

    core.patch_module(module)

    patched, owner = bound(module, entry)
    assert patched(*call.args, **call.kwargs) is answer
    without, through = seen
    assert {**through, "self": None} == {**without, "self": None}
    begun, finished = recorded
    chosen = through.get("weight_name_filter", through.get("target_modules"))
    is_filtered = entry.effect == "update" and chosen is not None
    assert (begun.kind, begun.effect) == (
        entry.event,
        "partial" if is_filtered else entry.effect,
    )
    assert finished == (f"the event of {entry.event}", answer, None)
    expected = {"self": [owner], "process": [], "caller": []}
    assert begun.runners == expected.get(entry.whose, ["the runner"])


@pytest.mark.parametrize("entry", core.ENTRY_POINTS, ids=lambda entry: entry.name)
def test_an_exception_passes_through_as_the_same_object(
    entry: core.EntryPoint, recorded: list[Any]
) -> None:
    problem = KeyboardInterrupt("stop")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise problem

    module = fake_module(entry, **{entry.method: fail})
    core.patch_module(module)
    patched, _ = bound(module, entry)
    with pytest.raises(KeyboardInterrupt) as caught:
        patched(recv_req="request")
    assert caught.value is problem
    assert caught.value.__context__ is None
    assert recorded[-1] == (f"the event of {entry.event}", None, problem)


def test_a_wrong_call_raises_the_type_error_that_it_raises_unpatched(recorded: list[Any]) -> None:
    module = fake_module(DISK, update_weights_from_disk=method(DISK_1[0], DISK.method))
    unpatched = module.ModelRunner.update_weights_from_disk
    core.patch_module(module)
    messages = []
    for function in (unpatched, module.ModelRunner.update_weights_from_disk):
        with pytest.raises(TypeError) as caught:
            function(object(), "m", "auto", recapture_cuda_graph=True)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("broken", ["begin", "finish"])
def test_a_failing_recorder_never_reaches_the_caller_and_is_logged_once(
    broken: str,
    recorded: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr(recorder, broken, fail)
    answer = (True, "ok")
    module = fake_module(DISK, update_weights_from_disk=lambda self, *args: answer)
    core.patch_module(module)
    for _ in range(3):
        assert module.ModelRunner().update_weights_from_disk("m", "auto") is answer
    assert [record.levelname for record in caplog.records if "on fire" in record.message] == [
        "WARNING"
    ]


def test_a_failing_recorder_does_not_replace_the_exception_of_the_call(
    recorded: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr(recorder, "finish", fail)
    problem = ValueError("no such model")

    def raising(self: Any) -> None:
        raise problem

    module = fake_module(LOAD, load_model=raising)
    core.patch_module(module)
    with pytest.raises(ValueError, match="no such model") as caught:
        module.ModelRunner().load_model()
    assert caught.value is problem


def test_an_updater_that_cannot_name_its_runner_is_an_event_of_all_runners(
    recorded: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    def lost(self: Any) -> None:
        raise AttributeError("get_model_runner")

    entry = an_entry("WeightUpdater.update_weights_from_disk")
    module = fake_module(entry, update_weights_from_disk=lambda self: 7, get_model_runner=lost)
    core.patch_module(module)
    assert module.WeightUpdater().update_weights_from_disk() == 7
    assert recorded[0].runners == []
    assert "update_weights_from_disk" in caplog.text


def test_only_the_last_step_of_a_runner_completes_it(recorded: list[Any]) -> None:
    entry = an_entry("ModelRunner.alloc_memory_pool")
    first = method("(self)", "__init__")
    module = fake_module(entry, __init__=first, alloc_memory_pool=lambda self: "a pool")
    core.patch_module(module)
    runner = module.ModelRunner()
    assert recorded == []
    assert runner.alloc_memory_pool() == "a pool"
    assert [begun.kind for begun in recorded[:1]] == ["runner_ready"]


def test_a_function_that_is_not_told_its_owner_finds_it_among_its_callers(
    recorded: list[Any],
) -> None:
    entry = next(entry for entry in core.ENTRY_POINTS if entry.whose == "caller")
    module = fake_module(entry, **{entry.method: lambda state_tensors: "a backend"})
    core.patch_module(module)

    class Daemon:
        model = "loaded"

        def export(self) -> Any:
            return getattr(module, entry.method)({})

    daemon = Daemon()
    assert daemon.export() == "a backend"
    assert recorded[0].runners == [daemon]


@pytest.mark.parametrize("by_name", [False, True])
def test_release_passes_on_its_tags_and_whether_memory_is_really_freed(
    by_name: bool, recorded: list[Any]
) -> None:
    entry = an_entry("SchedulerWeightUpdaterManager.release_memory_occupation")
    module = fake_module(
        entry,
        release_memory_occupation=lambda self, recv_req: None,
        memory_saver_adapter=types.SimpleNamespace(enabled=True),
    )
    core.patch_module(module)
    request = types.SimpleNamespace(tags=["kv_cache", "weights"])
    manager = module.SchedulerWeightUpdaterManager()
    if by_name:
        manager.release_memory_occupation(recv_req=request)
    else:
        manager.release_memory_occupation(request)
    assert recorded[0].details == {"tags": ["kv_cache", "weights"], "physical": True}


def test_without_a_memory_saver_nothing_is_physically_released(recorded: list[Any]) -> None:
    entry = an_entry("SchedulerWeightUpdaterManager.release_memory_occupation")
    module = fake_module(entry, release_memory_occupation=lambda self, recv_req: None)
    core.patch_module(module)
    request = types.SimpleNamespace(tags=None)
    module.SchedulerWeightUpdaterManager().release_memory_occupation(request)
    assert recorded[0].details == {"tags": [], "physical": False}
