"""How a method is wrapped: once, visibly, on its own class, and nothing but the named ones.

SGLang's classes are fakes here, with the signatures of the real ones; ``tests/real_sglang``
wraps the real ones.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from dataclasses import dataclass
from typing import Any

import pytest
from patched_methods import DISK, DISK_2, LOAD, Recorded, an_entry, fake_module, method

import sglang_weight_hook_patch_core as core

pytestmark = pytest.mark.usefixtures("release")


def test_a_module_patched_twice_is_wrapped_once(recorded: list[Any]) -> None:
    module = fake_module(LOAD, load_model=lambda self: None)
    core.patch_module(module)
    wrapper = module.ModelRunner.load_model
    core.patch_module(module)
    assert module.ModelRunner.load_model is wrapper
    module.ModelRunner().load_model()
    assert len(recorded) == 2


def test_the_new_class_of_a_reloaded_module_is_wrapped_too(recorded: list[Any]) -> None:
    for _ in range(2):
        module = fake_module(LOAD, load_model=lambda self: None)
        core.patch_module(module)
        module.ModelRunner().load_model()
    assert len(recorded) == 4


def test_the_signature_the_name_and_the_docstring_stay_visible() -> None:
    module = fake_module(DISK, update_weights_from_disk=method(DISK_2[0], DISK.method))
    before = module.ModelRunner.update_weights_from_disk
    core.patch_module(module)
    after = module.ModelRunner.update_weights_from_disk
    assert after is not before
    assert inspect.signature(after) == inspect.signature(before)
    assert inspect.unwrap(after) is before
    assert (after.__name__, after.__qualname__, after.__doc__, after.__module__) == (
        before.__name__,
        before.__qualname__,
        before.__doc__,
        before.__module__,
    )


@pytest.mark.skipif(sys.version_info < (3, 10), reason="dataclass(slots=True)")
def test_a_frozen_slotted_dataclass_is_wrapped_on_its_class(recorded: list[Any]) -> None:
    entry = an_entry("WeightUpdater.update_weights_from_tensor")

    @dataclass(frozen=True, slots=True)
    class WeightUpdater:
        runner: str

        def get_model_runner(self) -> str:
            return self.runner

        def update_weights_from_tensor(
            self, named_tensors: list[Any], load_format: str | None = None
        ) -> tuple[bool, str]:
            return True, "Success"

    module = types.ModuleType(entry.module)
    module.WeightUpdater = WeightUpdater  # type: ignore[attr-defined]
    core.patch_module(module)
    updater = WeightUpdater("its runner")
    assert updater.update_weights_from_tensor(named_tensors=[]) == (True, "Success")
    assert recorded[0].runners == ["its runner"]
    assert not hasattr(updater, "__dict__")


def test_an_inherited_method_is_wrapped_once_whichever_class_it_is_called_on(
    recorded: list[Any], release: Any
) -> None:
    release("0.5.9")
    mixin_entry = an_entry("SchedulerUpdateWeightsMixin.release_memory_occupation")
    mixin = fake_module(mixin_entry, release_memory_occupation=lambda self, recv_req: "freed")
    core.patch_module(mixin)
    scheduler = types.ModuleType("sglang.srt.managers.scheduler")
    base = mixin.SchedulerUpdateWeightsMixin
    scheduler.Scheduler = type("Scheduler", (base,), {})  # type: ignore[attr-defined]
    core.patch_module(scheduler)
    assert scheduler.Scheduler().release_memory_occupation("request") == "freed"
    assert [item.kind for item in recorded if isinstance(item, Recorded)] == [
        "release_memory_occupation"
    ]


def test_another_tools_wrapper_around_a_wrapped_method_still_works(recorded: list[Any]) -> None:
    module = fake_module(LOAD, load_model=lambda self: "loaded")
    core.patch_module(module)
    ours = module.ModelRunner.load_model

    @functools.wraps(ours)
    def theirs(self: Any) -> tuple[str, Any]:
        return "theirs", ours(self)

    module.ModelRunner.load_model = theirs
    core.patch_module(module)
    assert module.ModelRunner().load_model() == ("theirs", "loaded")
    assert len(recorded) == 2


def test_nothing_but_the_named_methods_is_touched() -> None:
    module = fake_module(LOAD, load_model=lambda self: None, forward=lambda self: None)
    untouched = module.ModelRunner.forward
    core.patch_module(module)
    assert module.ModelRunner.forward is untouched
    other = types.ModuleType("sglang.srt.managers.tokenizer_manager")
    other.ModelRunner = type("ModelRunner", (), {"load_model": untouched})  # type: ignore[attr-defined]
    core.patch_module(other)
    assert other.ModelRunner.load_model is untouched
